"""simomerge demo"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from simomerge.cli import options
from simomerge.cli.output import console, report_run


@click.command("demo")
@click.option("--tasks", default="segmentation,depth,normals", show_default=True, help="Names, or 'all' for five.")
@click.option("--head", type=options.Name(["linear", "dpt"]), default="linear", show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Number of repetitions.")
@click.option("--full", is_flag=True, help="The full benchmark, which takes tens of minutes per seed.")
@click.option(
    "--base", type=options.place, default="rooms-base", show_default=True, help="Foundation encoder to start from."
)
@options.folder(Path("runs/demo"), "Folder of the run (OUT).")
@options.workers
@options.as_json
def command(tasks: str, base: str, output: Path, workers: int | None, as_json: bool, **given: Any) -> None:
    """Train experts, merge, re-align and compare them; write OUT/report.html and OUT/results.json.

    Everything is made on this machine: the images (ray-traced rooms), the experts, the joint model. A second run
    reuses what is already in OUT.
    """
    from dataclasses import replace

    from simomerge.core.distributed import join_processes
    from simomerge.recipes.demo import ALL_TASKS, demo_recipe
    from simomerge.recipes.run import run_recipe
    from simomerge.training.run_folder import RunFolder

    join_processes()
    names = ALL_TASKS if tasks == "all" else tuple(tasks.split(","))
    recipe = replace(demo_recipe(names, given["head"], given["seeds"], given["full"]), base=base)
    with console():
        results = run_recipe(recipe, output, workers)
    report_run(results, RunFolder.of(output), as_json)
