"""simomerge demo"""

from __future__ import annotations

from pathlib import Path

import click

from simomerge.cli.options import console, json_option, report_run, workers_option


@click.command("demo")
@click.option("--tasks", default="segmentation,depth,normals", show_default=True, help="Names, or 'all' for five.")
@click.option("--head", type=click.Choice(["linear", "dpt"]), default="linear", show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Repetitions.")
@click.option("--full", is_flag=True, help="The benchmark's size: tens of minutes a seed.")
@click.option("--base", default="rooms-base", show_default=True, help="Foundation encoder to start from.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True)
@workers_option
@json_option
def command(
    tasks: str, head: str, seeds: int, full: bool, base: str, output: Path, workers: int | None, as_json: bool
) -> None:
    """Train experts, merge them, re-align, compare; write OUTPUT/report.html and results.json.

    Everything is made here: the images (rooms, ray-cast), the experts, the joint model. A second run reuses
    what is there.
    """
    from dataclasses import replace

    from simomerge.core.distributed import join_processes
    from simomerge.recipes.recipe import ALL_TASKS, demo_recipe
    from simomerge.recipes.run import run_recipe

    join_processes()
    names = ALL_TASKS if tasks == "all" else tuple(tasks.split(","))
    recipe = replace(demo_recipe(names, head, seeds, full), base=base)
    with console():
        results = run_recipe(recipe, output, workers)
    report_run(results, output, as_json)
