"""simomerge compress"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from simomerge.cli.options import check_output, console, json_option, output_option, overwrite_option, parse_pairs, say
from simomerge.core.errors import InputError

if TYPE_CHECKING:
    from simomerge.merging.disk.compress import Compression


@click.command("compress")
@click.argument("base")
@click.argument("experts", nargs=-1, required=True, metavar="TASK=EXPERT...")
@click.option("--threshold", default="auto", show_default=True, help="Lambda of the masks: a number or 'auto'.")
@click.option(
    "--dtype",
    type=click.Choice(["F16", "BF16", "F32"], case_sensitive=False),
    default="F16",
    show_default=True,
    help="Storage of the merged task vector.",
)
@output_option()
@overwrite_option
@json_option
def command(
    base: str,
    experts: tuple[str, ...],
    threshold: str,
    dtype: str,
    output: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Store EXPERTs that were fine-tuned from BASE in one folder, with one bit per parameter each (TALL-masks).

    `simomerge restore` restores each expert approximately; the table shows the errors. No data are needed.

    \b
    simomerge compress rooms-base depth=runs/depth normals=runs/normals -o runs/compressed
    """
    check_output(output, overwrite)
    named = parse_pairs(experts)
    wanted = threshold if threshold == "auto" else _number(threshold)
    from simomerge.merging.disk.compress import compress

    with console():
        done = compress(base, named, output, wanted, dtype.upper(), overwrite)
    sizes = f"{_megabytes(done.bytes_before)} -> {_megabytes(done.bytes_after)}, base included"
    say(
        as_json,
        {"output": str(output), "ratio": done.ratio, **asdict(done)},
        f"Compressed {', '.join(done.tasks)}: {sizes} ({done.ratio:.2f} times smaller).",
        *table(done),
        f"Folder: {output}",
        f"Next: simomerge restore {output} {next(iter(done.tasks))} -o {output}-{next(iter(done.tasks))}",
    )


def table(done: Compression) -> list[str]:
    """One line per task: its mask, and the relative errors of its weights and of its task vector."""
    lines = [f"  {'task':<14} {'lambda':>6}  {'in mask':>7}  {'error of weights':>16}  {'of the task vector':>18}"]
    lines += [
        f"  {task:<14} {fit.threshold:>6.2g}  {fit.density:>7.0%}  {fit.weights_error:>16.2%}"
        f"  {fit.task_vector_error:>18.1%}"
        for task, fit in done.tasks.items()
    ]
    return lines


def _number(threshold: str) -> float:
    try:
        return float(threshold)
    except ValueError:
        raise InputError(f"--threshold {threshold}: give a number, or 'auto'.") from None


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
