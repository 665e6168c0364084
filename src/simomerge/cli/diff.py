"""simomerge diff"""

from __future__ import annotations

import click

from simomerge.cli.options import json_option, say


@click.command("diff")
@click.argument("first")
@click.argument("second")
@click.option("--base", help="Compare the task vectors of two experts of this base instead of the weights.")
@click.option("--top", type=click.IntRange(0), default=20, show_default=True, help="Tensors shown, largest first.")
@json_option
def command(first: str, second: str, base: str | None, top: int, as_json: bool) -> None:
    """Say how two checkpoints differ: norms, distance, cosine and sign agreement, per tensor.

    \b
    simomerge diff rooms-base runs/depth
    simomerge diff runs/depth runs/normals --base rooms-base
    """
    from simomerge.ondisk.diff import as_dicts, diff_on_disk

    found = diff_on_disk(first, second, base)
    whole, tensors = found[0], found[1:]
    if not as_json:
        tensors = sorted(tensors, key=lambda one: -one.distance / max(one.first, 1e-30))[:top]
    what = "task vectors" if base else "weights"
    width = max((len(one.name) for one in tensors), default=4)
    say(
        as_json,
        {"first": first, "second": second, "base": base, "differences": as_dicts(found)},
        f"{what} of {first} (a) and {second} (b), {len(found) - 1} tensors; the {len(tensors)} furthest apart:",
        f"  {'tensor':<{width}}  {'|a|':>9}  {'|b|':>9}  {'|b-a|/|a|':>9}  {'cosine':>7}  {'same sign':>9}",
        *(
            f"  {one.name:<{width}}  {one.first:9.4g}  {one.second:9.4g}  {one.distance / max(one.first, 1e-30):9.4g}"
            f"  {one.cosine:7.4f}  {one.sign_agreement:9.1%}"
            for one in [whole, *tensors]
        ),
    )
