"""simomerge run"""

from __future__ import annotations

import json
from pathlib import Path

import click

from simomerge.cli.options import console, json_option, report_run, say, track_option, workers_option


@click.command("run")
@click.argument("recipe", required=False)
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Replace a value, as tune.steps=20.")
@click.option("--dry-run", is_flag=True, help="List the stages and which of them are done, and stop.")
@click.option("--schema", is_flag=True, help="Print the JSON schema of recipes, for editors, and stop.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Run folder; by default the recipe's.")
@workers_option
@track_option
@json_option
def command(
    recipe: str | None,
    changes: tuple[str, ...],
    dry_run: bool,
    schema: bool,
    output: Path | None,
    workers: int | None,
    trackers: tuple[str, ...],
    as_json: bool,
) -> None:
    """Carry out RECIPE, a YAML file: experts, joint MTL, merges, re-alignments, evaluation, report.

    A second run does only what changed, and a killed one resumes where it was. docs/recipes.md says what a recipe
    may hold; those in recipes/ are to be copied.
    """
    from simomerge.core.distributed import join_processes
    from simomerge.recipes.file import read_recipe, recipe_schema
    from simomerge.recipes.run import plan_of, run_recipe
    from simomerge.training.tracking import track

    if schema:
        click.echo(json.dumps(recipe_schema(), indent=2))
        return
    if recipe is None:
        raise click.UsageError("give a RECIPE, such as recipes/rooms-small.yaml.")
    join_processes()
    chosen = read_recipe(recipe, changes)
    folder = output or Path(chosen.output)
    if dry_run:
        stages = plan_of(chosen, folder)
        done = sum(finished for _, finished in stages)
        lines = [f"{'done   ' if finished else 'to do  '}{name}" for name, finished in stages]
        rows = [{"stage": name, "done": finished} for name, finished in stages]
        say(as_json, {"stages": rows}, *lines, "", f"{done} of {len(stages)} stages are done in {folder}.")
        return
    with track(trackers, folder / "logs"), console():
        results = run_recipe(chosen, folder, workers)
    report_run(results, folder, as_json)
