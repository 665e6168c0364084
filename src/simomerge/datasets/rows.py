"""Images and targets row by row: what every dataset on disk is, whatever its layout.

A layout is a `Manifest`: rows that say where an image and its targets are, and for each task how they are stored.
Reading, decoding, resizing and checking are the same for all of them.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simomerge.core.errors import InputError
from simomerge.core.images import read_image, resized, to_tensor
from simomerge.datasets.base import DenseDataset, check_size
from simomerge.datasets.published.hdf5 import Frame
from simomerge.datasets.tasks import IGNORE_LABEL, Task
from simomerge.datasets.whole import looks_whole

Source = Path | Frame
"""Where an image or a target is: a file, or one image's slice of an HDF5 file."""


def read_array(path: Source) -> np.ndarray:
    """The numbers in an NPY file, a picture or a slice, as stored: palette indices, 16 and 32 bits are kept.

    Raises:
        InputError: no such file, or not readable as any of them.
    """
    from PIL import Image

    if isinstance(path, Frame):
        return path.read()
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    try:
        if path.suffix.lower() == ".npy":
            loaded = np.load(path, allow_pickle=False)
            if not isinstance(loaded, np.ndarray):
                raise ValueError("it holds several arrays")
            return loaded
        with Image.open(path) as picture:
            array = np.asarray(picture)
            # Older Pillows open 16-bit PNGs as 32 bits, which PNGs never have.
            return array.astype(np.uint16) if picture.format == "PNG" and array.dtype == np.int32 else array
    except Exception as error:  # of a damaged file Pillow raises whatever it stumbles over
        raise InputError(f"{path}: cannot be read ({error}); give a PNG, TIFF, JPEG or NPY file.") from error


def read_picture(path: Source) -> np.ndarray:
    """An image as encoders are shown it, upright and in three colours, or an NPY file's numbers. Raises InputError."""
    if isinstance(path, Frame) or path.suffix.lower() == ".npy":
        return read_array(path)
    return read_image(path)


@dataclass(frozen=True)
class Stored:
    """How the targets of a task are stored.

    Attributes:
        task: what they are targets of.
        scale: stored value -> the task's unit, such as 0.001 for a depth in millimetres; None for the usual one of the
            file's dtype.
        ignore: stored values of pixels that do not count.
        array: source -> its numbers (H, W) or (H, W, 3); a dataset's own code is undone here, and NaN stands for no
            value.
    """

    task: Task
    scale: float | None = None
    ignore: tuple[float, ...] = ()
    array: Callable[[Any], np.ndarray] = read_array

    def read(self, path: Source, size: tuple[int, int] | None = None) -> Tensor:
        """The target in a file, as `tasks.KINDS` says, in its own or another size. Raises InputError."""
        stored = self.array(path)
        channels = 3 if self.task.kind in ("normals", "autoencoder") else 1
        if stored.ndim == 3 and channels == 3 and stored.shape[0] == 3 != stored.shape[2]:
            stored = stored.transpose(1, 2, 0)
        if stored.ndim == 3 and stored.shape[2] == 1:
            stored = stored[..., 0]
        if stored.ndim != (3 if channels == 3 else 2) or (channels == 3 and stored.shape[2] < 3):
            expected = "(H, W, 3)" if channels == 3 else "(H, W)"
            raise InputError(f"{path}: {self.task.name} of shape {stored.shape}; give {expected}.")
        if size is not None and self.task.kind != "autoencoder":  # before decoding: there are fewer pixels to decode
            stored = stored[np.ix_(*_nearest(stored.shape[:2], size))]
        stored = stored[..., :3] if channels == 3 else stored  # without a picture's transparency
        ignored = np.isin(stored, self._ignored(stored.dtype))
        return torch.from_numpy(np.ascontiguousarray(self._decoded(stored, ignored, path)))

    def _ignored(self, dtype: np.dtype[Any]) -> np.ndarray:
        """What to ignore in the numbers of a file: 65.535 of float64 is none of float32, and -1 no byte."""
        if dtype.kind not in "uib":
            return np.array(self.ignore).astype(dtype)
        low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        return np.array([v for v in self.ignore if low <= v <= high and v == int(v)]).astype(dtype)

    def _decoded(self, stored: np.ndarray, ignored: np.ndarray, path: Source) -> np.ndarray:
        kind = self.task.kind
        if kind == "segmentation":
            return self._labels(stored, ignored, path)
        values = stored.astype(np.float32) * np.float32(self._unit(stored))
        if kind == "normals":
            return _unit_normals(stored, values, np.asarray(ignored.all(-1))).transpose(2, 0, 1)
        if kind in ("depth", "disparity"):
            return np.where(ignored | ~(values > 0) | ~np.isfinite(values), np.float32(0), values)[None]
        invalid = np.float32(-1 if kind == "edges" else np.nan)
        if kind == "autoencoder":
            return np.where(ignored.all(-1, keepdims=True), invalid, values).transpose(2, 0, 1)
        return np.where(ignored | np.isnan(values), invalid, values)[None]

    def _unit(self, stored: np.ndarray) -> float:
        if self.scale is not None:
            return self.scale
        if stored.dtype.kind == "u" and self.task.kind not in ("depth", "disparity"):
            return 1 / float(np.iinfo(stored.dtype).max)
        return 1.0

    def _labels(self, stored: np.ndarray, ignored: np.ndarray, path: Source) -> np.ndarray:
        if stored.dtype.kind not in "uib":
            raise InputError(f"{path}: {self.task.name} of dtype {stored.dtype}; labels are whole numbers.")
        labels = stored.astype(np.int64)
        ignored = ignored | (labels == IGNORE_LABEL)
        strange = labels[~ignored & ((labels < 0) | (labels >= len(self.task.classes)))]
        if strange.size:
            raise InputError(
                f"{path}: label {int(strange[0])} of {self.task.name}, which has classes 0 to"
                f" {len(self.task.classes) - 1}; name it under ignore, or give its class."
            )
        return np.where(ignored, IGNORE_LABEL, labels)


def _unit_normals(stored: np.ndarray, values: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """Unit vectors; integers stand for -1..1, and black for no normal."""
    if stored.dtype.kind == "u":
        values = 2 * values[..., :3] - 1
        ignored = ignored | ~stored[..., :3].any(-1)
    values = np.where(np.isfinite(values[..., :3]), values[..., :3], np.float32(0))
    length = np.linalg.norm(values, axis=-1, keepdims=True)
    return np.where(ignored[..., None] | (length < 0.1), np.float32(0), values / np.maximum(length, 1e-6))


@dataclass(frozen=True)
class Row:
    """One image: where it is, its split, where its targets are, and what else is read with them, such as masks."""

    image: Source
    split: str
    targets: Mapping[str, Source]
    others: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """A dataset on disk.

    Attributes:
        path: what its messages name: the manifest's file, or the dataset's folder.
        stored: by task, how its targets are stored.
        rows: the images of all splits.
        size: (height, width) to make images and targets; None for as they are.
        image: source -> RGB (H, W, 3), uint8 or floats in [0, 1].
        lacking: what is known to be missing, in plain words; `simomerge data check` reports it.
    """

    path: Path
    stored: Mapping[str, Stored]
    rows: tuple[Row, ...]
    size: tuple[int, int] | None
    image: Callable[[Any], np.ndarray] = read_image
    lacking: tuple[str, ...] = ()

    def splits(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.split, []).append(row)
        return found


class Rows(DenseDataset):
    """One split of a manifest's images, read when they are asked for.

    Args:
        manifest: the dataset.
        split: one of its splits.
        count: so many images, evenly over the split, or all where fewer are there.
        size: (height, width) to make images and targets; the manifest's by default.

    Raises:
        InputError: no such split.
    """

    def __init__(
        self, manifest: Manifest, split: str, count: int | None = None, size: tuple[int, int] | None = None
    ) -> None:
        splits = manifest.splits()
        if split not in splits:
            raise InputError(f"{manifest.path}: no split {split!r}; it has {', '.join(splits)}.")
        for given in (size, manifest.size):
            if given is not None:
                check_size(given)
        if count is not None and count < 1:
            raise InputError(f"{count} images asked for; give 1 or more.")
        self.manifest = manifest
        self.rows = splits[split]
        if count is not None and count < len(self.rows):
            self.rows = _chosen(self.rows, slice(count))
        self.size = size or manifest.size
        self._first_size: tuple[int, int] | None = None
        # A task of which one image has no target is none of the split's; which image that is, for the message.
        without = {name: [row for row in self.rows if name not in row.targets] for name in manifest.stored}
        self._lacking = {name: rows for name, rows in without.items() if rows}
        have = [name for name in manifest.stored if name not in self._lacking]
        super().__init__({name: manifest.stored[name].task for name in have}, len(self.rows))

    def select(self, tasks: str | Iterable[str]) -> DenseDataset:
        """The same images with some of the tasks. Raises InputError."""
        names = tasks.split(",") if isinstance(tasks, str) else list(tasks)
        for name in names:
            if rows := self._lacking.get(name):
                raise InputError(
                    f"{self.manifest.path}: {len(rows)} of {len(self.rows)} images have no target of {name!r}, first"
                    f" {rows[0].image}: give it, or leave them out."
                )
        return super().select(names if tasks != "all" else tasks)

    def take(self, count: int) -> DenseDataset:
        """``count`` of the images, evenly over the split: neighbours show one scene."""
        super().take(count)  # which checks the count
        return self._with(_chosen(self.rows, slice(count)))

    def skip(self, count: int) -> DenseDataset:
        """All images but those that `take` takes."""
        super().skip(count)
        return self._with(_chosen(self.rows, slice(count, None)))

    def _with(self, rows: list[Row]) -> DenseDataset:
        chosen = copy.copy(self)
        chosen.rows, chosen._count, chosen._first_size = rows, len(rows), None
        return chosen

    def fingerprint(self) -> str:
        """sha256 of what the images and the chosen tasks are made of: how they are stored, and the files' names in the
        dataset's folder, sizes and dates."""
        folder = self.manifest.path if self.manifest.path.is_dir() else self.manifest.path.parent
        said = [str(self.size)]
        said += [f"{name} {s.task} {s.scale} {s.ignore}" for name, s in self._stored()]
        stat = lru_cache(maxsize=None)(_stat)
        for row in self.rows:
            targets = [row.targets[name] for name, _ in self._stored()]
            for source in (row.image, *targets, *(row.others if targets else ())):
                file = source.file if isinstance(source, Frame) else source
                place = str(source).replace(str(folder), "", 1)
                said.append(f"{place} {stat(file)}")
        return hashlib.sha256("\n".join(said).encode()).hexdigest()

    def check_files(self, deeply: bool = False) -> None:
        """See to it that the files of images and chosen tasks are there, and, ``deeply``, that none was cut off.

        Raises:
            InputError: some are not, or are damaged (the message names the first).
        """
        files = dict.fromkeys(file for row in self.rows for file in self._files(row))
        if missing := [file for file in files if not file.is_file()]:
            raise InputError(f"{len(missing)} of {len(files)} files are not there: {', '.join(map(str, missing[:3]))}.")
        for file in files if deeply else ():
            if file.suffix != ".mat" and not looks_whole(file):
                read_array(file)

    def _files(self, row: Row) -> Iterator[Path]:
        sources = [row.image, *(row.targets[name] for name in self.tasks if name in row.targets)]
        yield from (source.file if isinstance(source, Frame) else source for source in sources)
        yield from row.others if self.tasks else ()

    def _stored(self) -> list[tuple[str, Stored]]:
        return [(name, self.manifest.stored[name]) for name in sorted(self.tasks)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        image = self.image(index)
        sample = {"image": image}
        for name in self.tasks:  # a target that is the image itself is not read again
            sample[name] = image.clone() if self._is_image(name, index) else self._target(name, index)
        size = tuple(image.shape[-2:])
        for name in self.tasks:
            height, width = sample[name].shape[-2:]
            if (height, width) != size:
                raise InputError(
                    f"{self.rows[index].targets[name]} is {width} x {height} pixels, its image {size[1]} x {size[0]}:"
                    f" say `size: [height, width]` in {self.manifest.path.name} to make them alike."
                )
        return sample

    def image(self, index: int) -> Tensor:
        source = self.rows[index].image
        array = self.manifest.image(source)
        try:
            image = to_tensor(array, self.size)[0]
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
        if self.size is None:
            self._check_size(index, image)
        return image

    def _check_size(self, index: int, image: Tensor) -> None:
        """Batches are of one size."""
        if self._first_size is None:
            height, width = self.manifest.image(self.rows[0].image).shape[:2]
            self._first_size = int(height), int(width)
        height, width = self._first_size
        if tuple(image.shape[1:]) != (height, width):
            raise InputError(
                f"{self.rows[index].image} is {image.shape[2]} x {image.shape[1]} pixels, the first image {width} x"
                f" {height}: say `size: [{height}, {width}]` in {self.manifest.path.name} to make them alike."
            )

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        return {name: self._target(name, index) for name in tasks}

    def _is_image(self, name: str, index: int) -> bool:
        """Whether a target is the very image: an autoencoder is to give what the encoder was given."""
        stored, row = self.manifest.stored[name], self.rows[index]
        plain = stored.scale is None and not stored.ignore
        return stored.task.kind == "autoencoder" and plain and row.targets[name] == row.image

    def _target(self, name: str, index: int) -> Tensor:
        if self._is_image(name, index):
            return self.image(index)
        target = self.manifest.stored[name].read(self.rows[index].targets[name], self.size)
        return target if self.size is None else resize_target(self.tasks[name], target, self.size)


def _chosen(rows: Sequence[Row], which: slice) -> list[Row]:
    """Some of the rows, in their order. Multiples of the golden ratio lie evenly: so does every beginning of the order
    of their fractions, and what one such beginning has, a longer one has too."""
    order = np.argsort(np.arange(len(rows)) * ((5**0.5 - 1) / 2) % 1)
    return [rows[i] for i in sorted(order[which])]


def _stat(file: Path) -> tuple[int, int] | None:
    """Size and date of a file, where it is."""
    found = file.stat() if file.is_file() else None
    return found and (found.st_size, found.st_mtime_ns)


def resize_target(task: Task, target: Tensor, size: tuple[int, int]) -> Tensor:
    """A target (..., H, W) in another size: the nearest pixel, for between two labels, depths or normals lies none that
    is true; but pictures, such as an autoencoder's, as images are."""
    if target.shape[-2:] == size:
        return target
    if task.kind == "autoencoder":
        return resized(target[None], size)[0]
    rows, columns = map(torch.from_numpy, _nearest(target.shape[-2:], size))
    return target[..., rows[:, None], columns]


def _nearest(old: Sequence[int], new: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The rows and the columns of the old size whose centres are nearest to those of the new one."""
    rows, columns = (
        ((np.arange(wanted) + 0.5) * (there / wanted)).astype(np.int64).clip(max=there - 1)
        for there, wanted in zip(old, new, strict=True)
    )
    return rows, columns
