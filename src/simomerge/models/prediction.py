"""Predictions for many pictures and for video: what to read, in which order, and in which batches."""

from __future__ import annotations

import glob
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from simomerge.core.errors import InputError
from simomerge.core.images import check_image, read_image, to_tensor
from simomerge.core.progress import progress
from simomerge.datasets.pictures import picture_files
from simomerge.datasets.stored import may_be_truncated
from simomerge.models.model import SimoModel
from simomerge.runtime import video_frames
from simomerge.runtime.scene import VIDEOS


@dataclass(frozen=True)
class Source:
    """A picture, a video file or a camera.

    Attributes:
        path: Its path, or "camera:N".
        name: The start of the names of its results; unique among the sources.
    """

    path: str
    name: str

    @property
    def is_camera(self) -> bool:
        return self.path.startswith("camera:")

    @property
    def is_video(self) -> bool:
        return self.is_camera or Path(self.path).suffix.lower() in VIDEOS


@dataclass(frozen=True)
class Frame:
    """One image to predict.

    Attributes:
        name: The start of the names of its results.
        image: uint8 RGB (H, W, 3).
        source: Where it comes from.
    """

    name: str
    image: np.ndarray
    source: Source


def find_sources(given: Sequence[str]) -> list[Source]:
    """Pictures, folders, glob patterns, videos and cameras as sources, in the order given; folders in their own order.

    Raises:
        InputError: There is no such file or folder, or a pattern matches nothing.
    """
    paths: list[str] = []
    for each in given:
        if each.startswith("camera:") or Path(each).is_file():
            paths.append(each)
        elif Path(each).is_dir():
            videos = sorted(file for file in Path(each).iterdir() if file.suffix.lower() in VIDEOS and file.is_file())
            try:
                pictures = picture_files(Path(each))
            except InputError:
                if not videos:
                    raise
                pictures = []
            paths += map(str, [*pictures, *videos])
        elif glob.has_magic(each):
            # Patterns of pathlib are relative to one folder; these may start anywhere.
            found = sorted(name for name in glob.glob(each, recursive=True) if Path(name).is_file())  # noqa: PTH207
            if not found:
                raise InputError(f"{each}: no file matches this pattern.")
            paths += found
        else:
            raise InputError(f"{each}: no such image file; give pictures, folders, patterns, videos or camera:0.")
    stems = [path.replace(":", "-") if path.startswith("camera:") else Path(path).stem for path in paths]
    # The frames of a video are named after it, too, as clip-000001: pictures may have such names.
    starts = {f"{stem}-" for path, stem in zip(paths, stems, strict=True) if Path(path).suffix.lower() in VIDEOS}
    unique = len(set(stems)) == len(stems) and not any(stem.startswith(tuple(starts)) for stem in stems)
    return [
        Source(path, stem if unique else f"{stem}-{number}")
        for number, (path, stem) in enumerate(zip(paths, stems, strict=True), start=1)
    ]


def find_unreadable(sources: Sequence[Source]) -> dict[str, str]:
    """Path -> what is wrong, for each picture that cannot be read, from its first and last bytes: quick for many."""
    broken: dict[str, str] = {}
    began = time.monotonic()
    for done, source in enumerate(sources, start=1):
        if source.is_video:
            continue
        try:
            check_image(source.path)
            if may_be_truncated(Path(source.path)):
                read_image(source.path)
        except (InputError, OSError) as error:
            broken[source.path] = str(error)
        if time.monotonic() - began > 0.5:  # a short check reports no progress
            progress("check", done, len(sources))
    return broken


def frames_of(sources: Sequence[Source], broken: dict[str, str]) -> Iterator[Frame]:
    """The images of sources, each read when it is asked for. Frames of a video are numbered from 1.

    Args:
        sources: The sources.
        broken: Path -> what is wrong: those that cannot be read are left out, and entered here.
    """
    for source in sources:
        try:
            if not source.is_video:
                yield Frame(source.name, read_image(source.path), source)
                continue
            for number, image in enumerate(video_frames(source.path), start=1):
                yield Frame(f"{source.name}-{number:06d}", image, source)
        except InputError as error:
            broken[source.path] = str(error)


def predict_frames(
    model: SimoModel,
    frames: Iterator[Frame],
    batch_size: int = 1,
    tasks: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    half: bool = False,
) -> Iterator[tuple[Frame, dict[str, np.ndarray]]]:
    """Each frame with its predictions, in order. Neighbours of one size run as one batch.

    Args:
        model: The model.
        frames: The frames.
        batch_size: Frames that run together, at most.
        tasks, size: As in `SimoModel.predict`.
        half: Compute in half precision: float16 on a GPU, bfloat16 on a CPU.
    """
    waiting: list[Frame] = []
    device = next(model.parameters()).device
    kind = torch.float16 if device.type == "cuda" else torch.bfloat16

    def run() -> Iterator[tuple[Frame, dict[str, np.ndarray]]]:
        batch = torch.cat([to_tensor(frame.image) for frame in waiting])
        with torch.autocast(device.type, kind, enabled=half):
            found = model.predict_batch(batch, tasks=tasks, size=size)
        arrays = {name: value.cpu().numpy() for name, value in found.items()}
        for index, frame in enumerate(waiting):
            yield frame, {name: value[index] for name, value in arrays.items()}
        waiting.clear()

    for frame in frames:
        if waiting and waiting[0].image.shape != frame.image.shape:
            yield from run()
        waiting.append(frame)
        if len(waiting) >= batch_size:
            yield from run()
    if waiting:
        yield from run()
