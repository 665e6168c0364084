"""simomerge predict"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from simomerge.cli import options
from simomerge.cli.output import console, say, warning
from simomerge.core.errors import InputError
from simomerge.core.progress import progress

if TYPE_CHECKING:
    from simomerge.models.prediction import Frame


@click.command("predict")
@click.argument("model", type=options.place)
@click.argument("images", type=options.place, nargs=-1, required=True, metavar="IMAGE...")
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
    pictures are checked first, then each is read when its turn comes, in the order given. Those that cannot be read are
    left out and named at the end; the exit code is 2 then.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; give a folder to write into.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise InputError(f"{output} has files in it; choose another folder, or give --overwrite.")
    with console():
        progress("load", 0, 1)  # torch alone takes seconds
        written, broken, count = _predict(model, images, output, size, given)
    kinds = given["kinds"].split(",")
    others = [kind for kind in kinds if kind != "colours"] if "colours" in kinds else []
    values = [f"The values are next to them, as {' and '.join(others)}."] if others and written else []
    say(as_json, {"written": written, "broken": broken}, *written, *values)
    if broken:
        _report_broken(broken, count, len(written))


def _predict(
    model: str, images: Sequence[str], output: Path, size: str | None, given: Mapping[str, str]
) -> tuple[list[str], dict[str, str], int]:
    """What was written, path -> what is wrong for each image that cannot be read, and the number of images."""
    from simomerge.checkpoints.experts import trained_size
    from simomerge.core.machine import named_device
    from simomerge.core.pixels import height_width
    from simomerge.datasets.tasks import select_tasks
    from simomerge.models.model import load
    from simomerge.models.prediction import find_sources, find_unreadable, frames_of, predict_frames
    from simomerge.models.saving import Saver, check_kinds

    resized_to = height_width(size) if size else None
    kinds = given["kinds"].split(",")
    check_kinds(kinds)
    device = named_device(given["device"])
    sources = find_sources(images)
    broken = find_unreadable(sources)
    readable = [source for source in sources if source.path not in broken]
    if not readable:  # before anything is loaded or written
        _report_broken(broken, len(sources), 0)
    predictor = load(model)
    progress("load", 1, 1)
    if not predictor.tasks:
        raise InputError(f"{model}: an encoder without heads predicts nothing; give an expert or a merged model.")
    tasks = select_tasks(predictor.tasks, given["tasks"])
    saver = Saver(output, tasks, kinds, bool(given["overlay"]), bool(given["legend"]))
    saver.check_apart(sources)
    predictor.to(device)
    batch, half = int(given["batch_size"]), bool(given["half"])
    images_in_order = frames_of(readable, broken)
    if resized_to is None:
        images_in_order = _warn_of_other_size(images_in_order, trained_size(predictor.provenance))
    frames = predict_frames(predictor, images_in_order, batch, list(tasks), resized_to, half)
    total = 0 if any(source.is_video for source in readable) else len(readable)
    written: list[str] = []
    done = 0  # enumerate would keep a photograph and its maps, hundreds of megabytes, while the next is predicted
    try:
        for frame, maps in frames:
            written += map(str, saver.save(frame, maps))
            done += 1
            progress("predict", done, total or done)
            del frame, maps
        saver.close()
    finally:
        saver.discard()  # after an error or Ctrl-C no half video stays
    return written, broken, len(sources)


def _warn_of_other_size(frames: Iterator[Frame], trained: tuple[int, int] | None) -> Iterator[Frame]:
    """The same frames, with a warning before the first one whose size differs much from that of the training images."""
    from simomerge.checkpoints.experts import as_many_pixels, is_other_size

    for frame in frames:
        height, width = frame.image.shape[:2]
        if trained is not None and is_other_size((height, width), trained):
            better = as_many_pixels((height, width), trained)
            warning(
                f"{frame.source.path} has {width} x {height} pixels, the model's training images {trained[1]} x"
                f" {trained[0]}: objects have another size than it learned. Predictions may be better with --size"
                f" {better[0]}x{better[1]}; they keep the image's size."
            )
            trained = None
        yield frame


def _report_broken(broken: Mapping[str, str], given: int, written: int) -> NoReturn:
    """Name every image that cannot be read. Raises InputError."""
    if given == 1:
        raise InputError(*broken.values())
    for message in broken.values():
        warning(message)
    others = "the others are predicted" if written else "nothing is predicted"
    raise InputError(f"{len(broken)} of {given} images cannot be read ({', '.join(broken)}); {others}.")
