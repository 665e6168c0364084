"""simomerge run"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from simomerge.cli.options import console, json_option, report_run, say, track_option, workers_option


@click.command("run")
@click.argument("recipe")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Replace a value, as tune.steps=20.")
@click.option("--dry-run", is_flag=True, help="Say which stages there are and which are done, and stop.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Run folder; by default the recipe's.")
@workers_option
@track_option
@json_option
def command(
    recipe: str,
    changes: tuple[str, ...],
    dry_run: bool,
    output: Path | None,
    workers: int | None,
    trackers: tuple[str, ...],
    as_json: bool,
) -> None:
    """Carry out RECIPE, a YAML file: experts, joint MTL, merges, re-alignments, evaluation, report.

    A second run does only what changed, and a killed one goes on where it was. docs/recipes.md says what a recipe
    may hold; those in recipes/ are to be copied.
    """
    from simomerge.core.assets import resolve_source
    from simomerge.core.distributed import join_processes
    from simomerge.recipes import plan_of, read_recipe, run_recipe
    from simomerge.training.tracking import track

    join_processes()
    said = read_recipe(recipe, changes)
    folder = output or Path(said.output)
    base = resolve_source(said.base)
    if dry_run:
        stages = plan_of(said.recipe, base, folder, said.data, said.data_options)
        done = sum(there for _, there in stages)
        lines = [f"{'done   ' if there else 'to do  '}{name}" for name, there in stages]
        rows = [{"stage": name, "done": there} for name, there in stages]
        say(as_json, {"stages": rows}, *lines, "", f"{done} of {len(stages)} stages are done in {folder}.")
        return
    with track(trackers, folder / "logs"), console():
        results: dict[str, Any] = run_recipe(
            said.recipe, base, folder, workers, said.data, said.title, said.data_options
        )
    report_run(results, folder, as_json)
