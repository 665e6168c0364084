"""Saves predictions: coloured pictures, values as 16-bit PNG, NPY or NPZ, and videos."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from simomerge.core.caution import warn
from simomerge.core.environment import install_command
from simomerge.core.errors import InputError
from simomerge.core.files import atomic_file
from simomerge.core.png16 import write_png16
from simomerge.datasets.colours import colourise
from simomerge.datasets.legend import legend_of, with_legend
from simomerge.datasets.tasks import Task
from simomerge.models.prediction import Frame, Source

KINDS = ("colours", "npy", "npz", "png16", "video")
"""What can be written: a coloured PNG per task; the values of a task as NPY or as PNG of 16 bits; the values of all
tasks in one NPZ; one MP4 per video with the image and all tasks next to each other."""

RATE = 25
"""Frames per second of the videos of cameras, and of video files that do not say theirs."""

_ENDINGS = {"colours": "-{}.png", "png16": "-{}-16.png", "npy": "-{}.npy", "npz": ".npz", "video": ".mp4"}
"""How the name of a file ends after that of its frame, by kind. A video is named after its source."""
_LARGEST = 65535
SCALES16 = {"depth": 0.001, "disparity": 1 / 256, "binary": 1 / _LARGEST}
"""The ``scale`` with which a manifest reads PNG files of 16 bits back, by kind: depth is stored in millimetres,
disparity as KITTI stores it, and a mask as probabilities. All other kinds need no scale."""
_STORED16 = ("segmentation", "depth", "disparity", "normals")

Maps = Mapping[str, np.ndarray]


def stored16(task: Task, values: np.ndarray) -> np.ndarray:
    """Predictions as uint16 (H, W) or (H, W, 3), for a PNG file that a manifest reads.

    Labels are stored as they are, normals as ``65535 (v + 1) / 2``, and all other values divided by `SCALES16`, or by
    1 / 65535. Values that do not fit become the largest one that does. The manifest's task needs ``scale`` if its kind
    is in `SCALES16`, and no scale otherwise. It reads a disparity of 0 as a pixel without a value.

    Example:
        >>> stored16(Task("depth"), np.array([[1.234, 99.0]], np.float32)).tolist()
        [[1234, 65535]]
        >>> stored16(Task("disparity"), np.array([[1.5, 200.0]], np.float32)).tolist()
        [[384, 51200]]
    """
    if task.kind == "segmentation":
        return values.astype(np.uint16)
    values = values * 0.5 + 0.5 if task.kind == "normals" else values
    stored = np.rint(values / SCALES16.get(task.kind, 1 / _LARGEST)).clip(0, _LARGEST).astype(np.uint16)
    return stored.transpose(1, 2, 0) if stored.ndim == 3 else stored


def compact(task: Task, values: np.ndarray) -> np.ndarray:
    """Labels as uint8, or as uint16 with more than 256 classes; other values as they are.

    Example:
        >>> compact(Task("parts", "segmentation", ("head", "arm")), np.array([[0, 1]])).dtype
        dtype('uint8')
    """
    if task.kind != "segmentation":
        return values
    return values.astype(np.uint8 if task.channels <= 256 else np.uint16)


def check_kinds(kinds: Iterable[str]) -> None:
    """Raise InputError for a kind of output that is not in `KINDS`."""
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"unknown kind of output {kind!r}; choose some of {', '.join(KINDS)}.")


class Saver:
    """Writes predictions into a folder.

    Args:
        folder: The folder; it is created when the first file is written.
        tasks: The tasks.
        kinds: Some of `KINDS`.
        overlay: Draw colours over the image, half and half.
        legend: Write below each coloured picture what its colours mean. Frames of a video have none.

    Raises:
        InputError: An unknown kind.
    """

    def __init__(
        self,
        folder: Path,
        tasks: Mapping[str, Task],
        kinds: Sequence[str],
        overlay: bool = False,
        legend: bool = False,
    ) -> None:
        check_kinds(kinds)
        unbounded = [name for name, task in tasks.items() if not (task.kind in _STORED16 or task.behaviour.bounded)]
        if "png16" in kinds and unbounded:
            raise InputError(f"task {unbounded[0]!r} has values of any size, which 16 bits cannot hold; use npy.")
        self.folder, self.tasks, self.kinds, self.overlay, self.legend = folder, tasks, kinds, overlay, legend
        self._video: _Video | None = None
        self._warned: set[str] = set()
        self._limits: dict[tuple[Source, str], tuple[float, float]] = {}

    def check_apart(self, sources: Iterable[Source]) -> None:
        """Raise InputError if a file to write would replace one of the sources. Nothing is written."""
        if not self.folder.is_dir():
            return
        sources = list(sources)
        inputs = {_identity(Path(source.path)): source.path for source in sources if not source.is_camera}
        endings = {_ENDINGS[kind].format(task) for kind in self.kinds for task in self.tasks}
        for source, ending in ((source, ending) for source in sources for ending in endings):
            paths = [self.folder / f"{source.name}{ending}"]
            if source.is_video:  # its frames have numbers of six digits or more
                paths += self.folder.glob(f"{glob.escape(source.name)}-{'[0-9]' * 6}*{ending}")
            for path in paths:
                if path.exists() and (given := inputs.get(_identity(path))):
                    raise InputError(f"{path} is the input {given} and would be replaced: choose another folder.")

    def save(self, frame: Frame, maps: Maps) -> list[Path]:
        """Write the files of one frame, and return their paths: the pictures, or what else was asked for."""
        written: dict[str, list[Path]] = {kind: [] for kind in self.kinds}
        for task, values in maps.items():
            paths = {kind: self.folder / f"{frame.name}{ending.format(task)}" for kind, ending in _ENDINGS.items()}
            if "npy" in self.kinds:
                with atomic_file(paths["npy"]) as file:
                    np.save(file, compact(self.tasks[task], values))
                written["npy"].append(paths["npy"])
            if "png16" in self.kinds:
                path = paths["png16"]
                with atomic_file(path) as file:
                    write_png16(file, stored16(self.tasks[task], values))
                self._warn_of_large(path, task, values)
                written["png16"].append(path)
            if "colours" in self.kinds:
                colours = self._coloured(frame, task, values)
                if self.legend and not frame.source.is_video:
                    colours = with_legend(colours, legend_of(self.tasks[task], values))
                with atomic_file(paths["colours"]) as file:
                    _write_png(file, colours)
                written["colours"].append(paths["colours"])
        if "npz" in self.kinds:
            path = self.folder / f"{frame.name}{_ENDINGS['npz']}"
            with atomic_file(path) as file:
                named = {task: compact(self.tasks[task], values) for task, values in maps.items()}
                np.savez_compressed(file, allow_pickle=False, **named)
            written["npz"].append(path)
        if "video" in self.kinds:
            written["video"] += self._add_to_video(frame, maps)
        return written.get("colours") or [path for paths in written.values() for path in paths]

    def _warn_of_large(self, path: Path, task: str, values: np.ndarray) -> None:
        """Warn of the first file of a task in which not all values fit into 16 bits."""
        scale = SCALES16.get(self.tasks[task].kind)
        if scale is None or task in self._warned or not values.max() / scale >= _LARGEST + 0.5:
            return
        self._warned.add(task)
        warn(
            f"{path}: 16 bits hold {task} up to {_LARGEST * scale:.6g} only, and the largest value is"
            f" {values.max():.6g}. Larger values become {_LARGEST * scale:.6g} here and in later files; use npy."
        )

    def _coloured(self, frame: Frame, task: str, values: np.ndarray) -> np.ndarray:
        """The colours of a task. All frames of a video share the range of its first one."""
        limits = None
        if frame.source.is_video and values.ndim == 2 and self.tasks[task].kind != "segmentation":
            own = float(values.min()), float(values.max())
            limits = self._limits.setdefault((frame.source, task), own)
        colours = colourise(self.tasks[task], values, limits)
        return (frame.image // 2 + colours // 2) if self.overlay else colours

    def _add_to_video(self, frame: Frame, maps: Maps) -> list[Path]:
        path, new = self.folder / f"{frame.source.name}{_ENDINGS['video']}", self._video is None
        if self._video is None or self._video.path != path:
            self.close()
            self._video, new = _Video(path, frame.source), True
        images = [frame.image, *(self._coloured(frame, task, values) for task, values in maps.items())]
        self._video.add(np.concatenate(images, 1))
        return [path] if new else []

    def close(self) -> None:
        """Finish the video that is being written."""
        if self._video is not None:
            self._video.close()
            self._video = None

    def discard(self) -> None:
        """Remove the video that is being written, if it was not finished."""
        if self._video is not None:
            self._video.container.close()
            self._video.unfinished.unlink(missing_ok=True)
            self._video = None


def _identity(path: Path) -> tuple[int, int]:
    """The same for all names of one file, such as links and other capital letters where the system ignores them."""
    about = path.stat()
    return about.st_dev, about.st_ino


def _write_png(file: BinaryIO, colours: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(colours).save(file, "PNG")


class _Video:
    """An MP4 file with the frames per second of its source; under a temporary name until it is closed."""

    def __init__(self, path: Path, source: Source) -> None:
        try:
            import av
        except ImportError as error:
            raise InputError(f"{path}: video needs PyAV: {install_command('video')}.") from error
        self.av: Any = av
        self.path, self.unfinished = path, path.with_name(f".{path.stem}.unfinished.mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rate = _rate_of(source, av)
        self.container = av.open(str(self.unfinished), "w")
        self.stream: Any = None

    def add(self, image: np.ndarray) -> None:
        height, width = (side // 2 * 2 for side in image.shape[:2])  # the codec halves the colours' resolution
        if self.stream is None:
            self.stream = self.container.add_stream("libx264", rate=self.rate)
            self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"
        frame = self.av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), format="rgb24")
        self.container.mux(self.stream.encode(frame))

    def close(self) -> None:
        if self.stream is not None:
            self.container.mux(self.stream.encode())
        self.container.close()
        self.unfinished.replace(self.path)


def _rate_of(source: Source, av: Any) -> Fraction:
    """The average number of frames per second of a video file that can be read; `RATE` for all other sources."""
    if source.is_camera or not source.is_video:
        return Fraction(RATE)
    with av.open(source.path) as container:
        return container.streams.video[0].average_rate or Fraction(RATE)
