"""simomerge compress"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from simomerge.cli import options
from simomerge.cli.next_step import next_step
from simomerge.cli.output import Table, console, say
from simomerge.core.errors import InputError

if TYPE_CHECKING:
    from simomerge.merging.disk.compress import Compression


@click.command("compress")
@options.base
@options.experts
@click.option("--threshold", default="auto", show_default=True, help="Lambda of the masks: a number or 'auto'.")
@click.option(
    "--dtype",
    type=click.Choice(["F16", "BF16", "F32"], case_sensitive=False),
    default="F16",
    show_default=True,
    help="Storage of the merged task vector.",
)
@options.output()
def command(base: str, experts: dict[str, str], output: Path, as_json: bool, **given: Any) -> None:
    """Store EXPERTs that were fine-tuned from BASE in one folder, with one bit per parameter each (TALL-masks).

    `simomerge restore` restores each expert approximately; the table shows the errors. No data are needed.

    \b
    simomerge compress rooms-base depth=runs/depth normals=runs/normals -o runs/compressed
    """
    threshold = given["threshold"] if given["threshold"] == "auto" else _number(given["threshold"])
    from simomerge.merging.disk.compress import compress

    with console():
        done = compress(base, experts, output, threshold, given["dtype"].upper(), given["overwrite"])
    sizes = f"{done.bytes_before / 1e6:.1f} MB -> {done.bytes_after / 1e6:.1f} MB, base included"
    first = next(iter(done.tasks))
    say(
        as_json,
        {"output": str(output), "ratio": done.ratio, **asdict(done)},
        f"Compressed {', '.join(done.tasks)}: {sizes} ({done.ratio:.2f} times smaller).",
        table(done),
        f"Folder: {output}",
        next_step("restore", output, first, "-o", f"{output}-{first}"),
    )


def table(done: Compression) -> Table:
    """One row per task: its mask, and the relative errors of its weights and of its task vector."""
    rows = [
        (task, f"{fit.threshold:.2g}", f"{fit.density:.0%}", f"{fit.weights_error:.2%}", f"{fit.task_vector_error:.1%}")
        for task, fit in done.tasks.items()
    ]
    return Table(("task", "lambda", "in mask", "weights error", "task vector error"), rows)


def _number(threshold: str) -> float:
    try:
        return float(threshold)
    except ValueError:
        raise InputError(f"--threshold {threshold}: give a number, or 'auto'.") from None
