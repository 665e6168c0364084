"""simomerge diff"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click

from simomerge.cli import options
from simomerge.cli.output import Table, say

if TYPE_CHECKING:
    from simomerge.merging.disk.diff import Difference


@click.command("diff")
@click.argument("first", type=options.place)
@click.argument("second", type=options.place)
@click.option(
    "--base", type=options.place, help="Compare the task vectors of two experts of this base, instead of their weights."
)
@click.option(
    "--top",
    type=click.IntRange(0),
    default=20,
    show_default=True,
    help="Number of tensors to show, largest difference first.",
)
@options.as_json
def command(first: str, second: str, base: str | None, top: int, as_json: bool) -> None:
    """Compare two checkpoints per tensor: norms, distance, cosine and sign agreement.

    \b
    simomerge diff rooms-base runs/depth
    simomerge diff runs/depth runs/normals --base rooms-base
    """
    from simomerge.merging.disk.diff import as_dicts, diff_on_disk

    found = diff_on_disk(first, second, base)
    total, *tensors = found
    tensors = sorted(tensors, key=lambda one: -_relative(one))[:top]
    what = "task vectors" if base else "weights"
    rows = [
        (
            one.name,
            f"{one.first:.4g}",
            f"{one.second:.4g}",
            f"{_relative(one):.4g}",
            f"{one.cosine:.4f}",
            f"{one.sign_agreement:.1%}",
        )
        for one in [total, *tensors]
    ]
    say(
        as_json,
        {"first": first, "second": second, "base": base, "differences": as_dicts(found)},
        f"{what} of {first} (a) and {second} (b), {len(found) - 1} tensors; the {len(tensors)} furthest apart:",
        Table(("tensor", "|a|", "|b|", "|b-a|/|a|", "cosine", "same sign"), rows),
    )


def _relative(one: Difference) -> float:
    """|b - a| / |a|; infinite if a is zero and b is not."""
    if one.first:
        return one.distance / one.first
    return math.inf if one.distance else 0.0
