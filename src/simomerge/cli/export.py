"""simomerge export"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from simomerge.cli import options
from simomerge.cli.output import Table, console, say


@click.command("export")
@click.argument("model", type=options.place)
@options.output(model=False, help="File to write (OUT): .onnx, .xml (OpenVINO) or .pt2 (torch.export).")
@click.option("--size", required=True, metavar="HEIGHTxWIDTH", help="Size of the images in pixels.")
@click.option("--precision", type=options.Name(("fp32", "fp16", "int8")), default="fp32", show_default=True)
@click.option("--tasks", default="all", show_default=True, metavar="TASK,...", help="Tasks to export.")
@click.option("--images", metavar="FOLDER", help="Images without labels: int8 is calibrated on them.")
@click.option("--count", type=click.IntRange(1), default=64, show_default=True, help="Images to calibrate on.")
@click.option("--dynamic", is_flag=True, help="Leave height and width free.")
@click.option("--split", is_flag=True, help="Write the encoder and each head as a file of its own.")
@click.option("--raw", is_flag=True, help="Give logits instead of predictions.")
@click.option("--probabilities", is_flag=True, help="Also give the probability of every class.")
@click.option("--layout", type=options.Name(("bytes", "floats")), default="bytes", show_default=True)
@click.option("--opset", type=int, default=18, show_default=True, help="Version of ONNX's operators.")
@options.numbers("--limit", "limits", "Largest difference from torch for a task; may be repeated.")
@options.trust_code
def command(
    model: str, output: Path, size: str, tasks: str, images: str | None, as_json: bool, overwrite: bool, **settings: Any
) -> None:
    """Export MODEL to one file for ONNX Runtime, OpenVINO, TensorRT or torch.

    The file takes RGB images and gives the tasks by name, in their units. It is compared with torch before it is
    written; next to it lies one frame with its predictions, for a check on the device.
    """
    from simomerge.exporting.export import export

    limits = settings.pop("limits")
    with console():
        done = export(model, output, size, tasks, images, limits, overwrite, **settings)
    runtime = "" if output.suffix == ".pt2" else f"On the device: python -m simomerge.runtime check {done['files'][0]}"
    text = f"Wrote {', '.join(done['files'])} ({done['bytes'] / 1e6:.1f} MB, {done['seconds']:.0f} s)."
    say(as_json, done, "Difference from torch:", difference_table(done["verification"]), text, runtime)


def difference_table(rows: list[dict[str, Any]]) -> Table:
    """The rows of a verification."""
    cells = []
    for row in rows:
        images = f"{row['count']} {row['images']}"
        cells.append((row["output"], images, f"{row['difference']:.3g}", f"{row['limit']:g}", row["measure"]))
    return Table(("output", "images", "difference", "limit", "measure"), cells)
