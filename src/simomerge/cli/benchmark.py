"""simomerge benchmark"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from simomerge.cli import options
from simomerge.cli.output import Table, console, say, warning
from simomerge.core.errors import InputError


@click.command("benchmark")
@click.argument("targets", type=options.place, nargs=-1, required=True, metavar="MODEL|FILE...")
@click.option("--size", required=True, metavar="HEIGHTxWIDTH", help="Size of the images in pixels.")
@click.option("--images", metavar="FOLDER", help="Images to predict. [default: rendered rooms]")
@click.option(
    "--batch", "batches", multiple=True, type=click.IntRange(1), help="Batch size; may be repeated. [default: 1]"
)
@click.option("--runs", type=click.IntRange(1), default=20, show_default=True, help="Timed runs of each batch size.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--provider", metavar="NAME", help="Execution provider of onnxruntime. [default: cpu]")
@click.option(
    "--data", metavar="DATA", help="Also evaluate on this dataset, and give Delta_MTL against the first target."
)
@click.option("--split", default="test", show_default=True)
@click.option("--count", type=click.IntRange(1), default=256, show_default=True, help="Images to evaluate on.")
@options.trust_code
@options.as_json
def command(
    targets: tuple[str, ...], size: str, data: str | None, split: str, count: int, as_json: bool, **given: Any
) -> None:
    """Time models and exported files on this machine, each in a process of its own.

    Models joined by "+" run one after the other: `runs/depth+runs/normals` are two experts. Differences are those from
    the first target.
    """
    from simomerge.core.pixels import height_width
    from simomerge.datasets.load import load_data
    from simomerge.exporting.benchmark import benchmark

    given["batches"] = given["batches"] or (1,)
    if data and (file := next((part for each in targets for part in each.split("+") if part.endswith(".pt2")), None)):
        raise InputError(f"{file}: --data evaluates model folders, .onnx and .xml files; leave this one out.")
    dataset = load_data(data, split=split, count=count) if data else None
    with console():
        if dataset is not None:
            check_tasks(targets, dataset, given["threads"], given["provider"])
        rows = benchmark(targets, height_width(size), **given)
        if dataset is not None:
            add_scores(rows, dataset, given["threads"], given["provider"])
    say(
        as_json,
        {"rows": rows, "threads": given["threads"], "size": size},
        *tables(rows, dataset.tasks if dataset else {}),
    )


def check_tasks(targets: Sequence[str], dataset: Any, threads: int, provider: str | None) -> None:
    """Raise InputError if a target cannot be evaluated on a dataset, before anything is timed."""
    from simomerge.exporting.benchmark import scored_tasks
    from simomerge.models.model import load
    from simomerge.runtime import Scene
    from simomerge.training.evaluate import shared_tasks

    for part in dict.fromkeys(part for target in targets for part in target.split("+")):
        if _is_file(part):
            scored_tasks(Scene(part, provider, threads), dataset.tasks)
            continue
        tasks = load(part).tasks
        try:
            shared_tasks(tasks, dataset.tasks)
        except InputError as error:
            raise InputError(f"{part}: {error}") from error


def add_scores(rows: list[dict[str, Any]], dataset: Any, threads: int, provider: str | None) -> None:
    """Add the metrics of every target on a dataset, and Delta_MTL against the first one: None if there is none."""
    from simomerge.exporting.benchmark import evaluate_file
    from simomerge.models.model import load
    from simomerge.training.evaluate import evaluate

    for row in rows:
        row["scores"] = {}
        for part in row["target"].split("+"):
            is_file = _is_file(part)
            scores = evaluate_file(part, dataset, threads, provider) if is_file else evaluate(load(part), dataset)
            row["scores"] |= scores
        row["delta_mtl"] = _delta(row, rows[0]["scores"], dataset.tasks)


def _is_file(part: str) -> bool:
    return Path(part).suffix in (".onnx", ".xml")


def _delta(row: dict[str, Any], baseline: dict[str, Any], tasks: Any) -> float | None:
    """Delta_MTL over the tasks that both have. Without any, or with a baseline of 0, it is None."""
    from simomerge.training.evaluate import delta_mtl

    shared = {task: scores for task, scores in row["scores"].items() if task in baseline}
    try:
        return delta_mtl(shared, baseline, tasks) if shared else None
    except InputError as error:  # the times and scores are shown all the same
        warning(f"{row['target']}: no Delta_MTL, because {error}")
        return None


def tables(rows: list[dict[str, Any]], tasks: Mapping[str, Any]) -> list[Table]:
    """One row per target: time, throughput, memory, size, differences, and the main metrics of tasks if there are any.

    A task that a target does not have, and a Delta_MTL that does not exist, are "–".
    """
    from simomerge.report.facts import MISSING
    from simomerge.runtime import MEASURES

    batches = list(rows[0]["per_second"])
    speeds = [f"images/s at {size}" for size in batches]
    head = ["target", "ms", "5 to 95 %", "CPU ms", *speeds, "memory MB", "disk MB", "difference"]
    cells = []
    for row in rows:
        ms, size = row["milliseconds"], (f"{row['memory'] / 1e6:.0f}", f"{row['disk'] / 1e6:.1f}")
        apart = (f"{name} {each['value']:.2g} {MEASURES[each['measure']]}" for name, each in row["difference"].items())
        speeds = [f"{row['per_second'][batch]:.2f}" for batch in batches]
        range_ = f"{ms['low']:.1f} to {ms['high']:.1f}"
        cells.append(
            (row["target"], f"{ms['median']:.1f}", range_, f"{ms['cpu']:.1f}", *speeds, *size, "; ".join(apart))
        )
    shown = [Table(head, cells)]
    if "scores" in rows[0]:
        main = {task: tasks[task].metric for row in rows for task in row["scores"]}
        lines = []
        for row in rows:
            found = [row["scores"].get(task, {}).get(metric) for task, metric in main.items()]
            values = [MISSING if value is None else f"{value:.4g}" for value in found]
            delta = MISSING if row["delta_mtl"] is None else f"{row['delta_mtl']:+.2f}"
            lines.append((row["target"], *values, delta))
        shown.append(Table(["target", *(f"{task} {metric}" for task, metric in main.items()), "Delta_MTL %"], lines))
    return shown
