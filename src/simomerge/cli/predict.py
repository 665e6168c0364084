"""simomerge predict"""

from __future__ import annotations

from pathlib import Path

import click

from simomerge.cli import options
from simomerge.cli.output import console, say
from simomerge.core.errors import InputError


@click.command("predict")
@click.argument("model")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@options.folder(None, "Folder to write (OUT).", required=True)
@click.option("--overwrite", is_flag=True, help="Write into OUT even if it has files; those of one name are replaced.")
@click.option(
    "--as",
    "kinds",
    default="colours,npy",
    show_default=True,
    metavar="KIND,...",
    help="Files to write: colours, npy, npz, png16, video.",
)
@click.option("--overlay", is_flag=True, help="Draw the colours over the image.")
@click.option(
    "--legend/--no-legend",
    default=True,
    show_default=True,
    help="Write below each picture what its colours mean. Without it, pictures have the size of the image.",
)
@click.option("--tasks", default="all", show_default=True, metavar="TASK,...", help="Tasks to predict.")
@click.option(
    "--size", metavar="HEIGHTxWIDTH", help="Resize images for the encoder. Predictions keep the image's size."
)
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Images of one size at once.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps. [default: a GPU if there is one]")
@click.option("--half", is_flag=True, help="Compute in half precision.")
@options.trust_code
@options.as_json
def command(
    model: str, images: tuple[str, ...], output: Path, overwrite: bool, as_json: bool, size: str | None, **given: str
) -> None:
    """Predict every task of MODEL for each IMAGE.

    An IMAGE is a picture, a folder, a pattern such as "day/*.jpg", a video file, or a camera such as camera:0. All
    pictures are checked first, then each is read when its turn comes, in the order given.
    """
    from simomerge.core.machine import named_device
    from simomerge.core.progress import progress
    from simomerge.datasets.pictures import parse_size
    from simomerge.datasets.tasks import select_tasks
    from simomerge.models.model import load
    from simomerge.models.prediction import check_sources, find_sources, frames_of, predict_frames
    from simomerge.models.saving import Saver

    height_width = parse_size(size) if size else None
    device = named_device(given["device"])
    sources = find_sources(images)
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; give a folder to write into.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise InputError(f"{output} has files in it; choose another folder, or give --overwrite.")
    check_sources(sources)  # before anything is written
    predictor = load(model)
    if not predictor.tasks:
        raise InputError(f"{model}: an encoder without heads predicts nothing; give an expert or a merged model.")
    tasks = select_tasks(predictor.tasks, given["tasks"])
    saver = Saver(output, tasks, given["kinds"].split(","), bool(given["overlay"]), bool(given["legend"]))
    written: list[str] = []
    total = 0 if any(source.is_video for source in sources) else len(sources)
    with console():
        predictor.to(device)
        batch, half = int(given["batch_size"]), bool(given["half"])
        frames = predict_frames(predictor, frames_of(sources), batch, list(tasks), height_width, half)
        try:
            for done, (frame, maps) in enumerate(frames, start=1):
                written += map(str, saver.save(frame, maps))
                progress("predict", done, total or done, "")
            saver.close()
        finally:
            saver.discard()  # after an error or Ctrl-C no half video stays
    say(as_json, {"written": written}, *written)
