"""simomerge run"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from simomerge.cli import options
from simomerge.cli.output import console, report_run, say
from simomerge.core.progress import starting


@click.command("run")
@click.argument("recipe", type=options.place, required=False)
@options.changes
@click.option("--dry-run", is_flag=True, help="List the stages and which of them are done, and stop.")
@click.option("--schema", is_flag=True, help="Print the JSON schema of recipes, for editors, and stop.")
@options.folder(None, "Folder of the run, or its URL, such as s3://BUCKET/RUN. [default: the recipe's]", urls=True)
@options.workers
@options.ray
@options.shard
@options.track
@options.precision
@options.trust_code
@options.as_json
def command(
    recipe: str | None, changes: tuple[str, ...], output: str | Path | None, as_json: bool, **given: Any
) -> None:
    """Run RECIPE, a YAML file: experts, joint model, merges, re-alignments, evaluation, report.

    A second run repeats only what changed, and an interrupted run resumes. docs/recipes.md describes the keys of a
    recipe; copy one from recipes/ to start.
    """
    from simomerge.core.distributed import join_processes
    from simomerge.recipes.file import read_recipe, recipe_schema
    from simomerge.recipes.run import plan_of, run_recipe
    from simomerge.training.run_folder import RunFolder
    from simomerge.training.sharding import sharded
    from simomerge.training.tracking import track

    if given["schema"]:
        starting.end()
        click.echo(json.dumps(recipe_schema(), indent=2))
        return
    if recipe is None and Path(given["ray"] or "").is_file():
        raise click.UsageError(f"--ray took the recipe {given['ray']} as its ADDRESS; give the recipe before --ray.")
    if recipe is None:
        raise click.UsageError("give a RECIPE, such as recipes/rooms-small.yaml.")
    join_processes()
    chosen = read_recipe(recipe, changes)
    folder = RunFolder.of(output or chosen.output)
    if given["dry_run"]:
        stages = plan_of(chosen, folder)
        done = sum(finished for _, finished in stages)
        lines = [f"{'done   ' if finished else 'to do  '}{name}" for name, finished in stages]
        rows = [{"stage": name, "done": finished} for name, finished in stages]
        say(as_json, {"stages": rows}, *lines, "", f"{done} of {len(stages)} stages are done in {folder.shown()}.")
        return
    with sharded(given["shard"], given["offload"]), track(given["trackers"], folder.path / "logs"), console():
        results = run_recipe(chosen, folder, given["workers"], given["ray"])
    report_run(results, folder, as_json)
    folder.send("logs")
