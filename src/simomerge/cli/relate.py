"""simomerge relate"""

from __future__ import annotations

from dataclasses import asdict

import click

from simomerge.cli.options import console, images_option, json_option, parse_pairs, say, size_option
from simomerge.errors import InputError


@click.command("relate")
@click.argument("model")
@click.argument("experts", nargs=-1, required=True, metavar="TASK=EXPERT...")
@click.option(
    "--alignment",
    "aligned",
    is_flag=True,
    default=True,
    help="How far merged features are from each expert's, before and after a linear map. [default]",
)
@images_option
@size_option
@click.option("--count", type=click.IntRange(4), default=64, show_default=True, help="Images.")
@json_option
def command(
    model: str,
    experts: tuple[str, ...],
    aligned: bool,
    images: str | None,
    size: str | None,
    count: int,
    as_json: bool,
) -> None:
    """Compare a merged MODEL's features with its EXPERTs', tap by tap, on images without labels.

    R2 is 1 where merged features equal the expert's; what it lacks after the map is not linear, or needs more images.
    """
    named = parse_pairs(experts)
    if images is None:
        raise InputError("relate --alignment looks at images without labels: give --images FOLDER.")
    from simomerge.assemble import load_experts
    from simomerge.datasets.pictures import as_images
    from simomerge.model import load
    from simomerge.relations import alignment

    with console() as progress:
        rows = alignment(load(model), load_experts(**named), as_images(images, count, size), count, progress)
    lines = [f"{'task':<14} {'block':>5} {'R2 before':>10} {'after map':>10} {'CKA before':>11} {'after map':>10}"]
    lines += [
        f"{row.task:<14} {row.tap:>5} {row.r2_before:>10.3f} {row.r2_after:>10.3f} {row.cka_before:>11.3f}"
        f" {row.cka_after:>10.3f}"
        for row in rows
    ]
    mean = sum(row.r2_after for row in rows) / len(rows)
    lines.append(f"Mean R2 after the map: {mean:.3f}. Next: simomerge realign {model} ... --method fold")
    say(as_json, {"alignment": [asdict(row) for row in rows]}, *lines)
