"""simomerge diff"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click

from simomerge.cli.options import json_option, say

if TYPE_CHECKING:
    from simomerge.merging.disk.diff import Difference


@click.command("diff")
@click.argument("first")
@click.argument("second")
@click.option("--base", help="Compare the task vectors of two experts of this base, not their weights.")
@click.option(
    "--top",
    type=click.IntRange(0),
    default=20,
    show_default=True,
    help="Number of tensors to show, largest difference first.",
)
@json_option
def command(first: str, second: str, base: str | None, top: int, as_json: bool) -> None:
    """Compare two checkpoints per tensor: norms, distance, cosine and sign agreement.

    \b
    simomerge diff rooms-base runs/depth
    simomerge diff runs/depth runs/normals --base rooms-base
    """
    from simomerge.merging.disk.diff import as_dicts, diff_on_disk

    found = diff_on_disk(first, second, base)
    total, tensors = found[0], found[1:]
    if not as_json:
        tensors = sorted(tensors, key=lambda one: -_relative(one))[:top]
    what = "task vectors" if base else "weights"
    width = max(len(name) for name in ("tensor", *(one.name for one in tensors)))
    say(
        as_json,
        {"first": first, "second": second, "base": base, "differences": as_dicts(found)},
        f"{what} of {first} (a) and {second} (b), {len(found) - 1} tensors; the {len(tensors)} furthest apart:",
        f"  {'tensor':<{width}}  {'|a|':>9}  {'|b|':>9}  {'|b-a|/|a|':>9}  {'cosine':>7}  {'same sign':>9}",
        *(
            f"  {one.name:<{width}}  {one.first:9.4g}  {one.second:9.4g}  {_relative(one):9.4g}"
            f"  {one.cosine:7.4f}  {one.sign_agreement:9.1%}"
            for one in [total, *tensors]
        ),
    )


def _relative(one: Difference) -> float:
    """|b - a| / |a|; infinite if a is zero and b is not."""
    if one.first:
        return one.distance / one.first
    return math.inf if one.distance else 0.0
