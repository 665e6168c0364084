"""Datasets on disk, whatever their layout: rows of images and targets, read one at a time.

A layout is described by a `Manifest`: rows that name the files of an image and its targets, and per task how they are
stored. Reading, decoding, resizing and checking are the same for all layouts.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from simomerge.core.errors import InputError
from simomerge.core.images import read_image, to_tensor
from simomerge.core.schema import check_whole
from simomerge.datasets.base import DenseDataset, check_size, spread
from simomerge.datasets.published.hdf5 import Frame
from simomerge.datasets.stored import Source, Stored, may_be_truncated, read_array

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
"""Other names of splits, as they are often written."""


def known_split(name: str) -> str:
    """The split that a name means: one of `SPLITS` if it is another name of it, else the name.

    Example:
        >>> known_split("Validation"), known_split("night")
        ('val', 'night')
    """
    word = name.strip().lower()
    return SPLIT_NAMES.get(word, word if word in SPLITS else name.strip())


@dataclass(frozen=True)
class Row:
    """One image: its source, its targets by task, and files such as masks that are read with the targets."""

    image: Source
    targets: Mapping[str, Source]
    others: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """A dataset on disk.

    Attributes:
        path: the manifest's file or the dataset's folder, for messages.
        tasks: how the targets of each task are stored.
        rows: the images by split.
        size: (height, width) to resize images and targets to; None for their own size.
        image: reads a source as RGB (H, W, 3), uint8 or floats in [0, 1].
        missing: split -> a message if something is known to be missing, else empty. Such a split cannot be used.
        table: the table of images, if a manifest names one.
    """

    path: Path
    tasks: Sequence[Stored]
    rows: Mapping[str, Sequence[Row]]
    size: tuple[int, int] | None
    image: Callable[[Any], np.ndarray] = read_image
    missing: Callable[[str], str] = lambda split: ""
    table: Path | None = None

    @property
    def stored(self) -> dict[str, Stored]:
        """`tasks` by name."""
        return {stored.task.name: stored for stored in self.tasks}

    def files(self) -> Iterator[Path]:
        """The manifest itself and all files that it names."""
        yield from (self.path, *([self.table] if self.table else []))
        for row in chain.from_iterable(self.rows.values()):
            yield from map(_file, (row.image, *row.targets.values(), *row.others))


class Rows(DenseDataset):
    """One split of a manifest's images, read when they are asked for.

    A task has targets for every image of the split, or is left out.

    Args:
        manifest: the dataset.
        split: one of its splits.
        count: number of images, evenly over the split; all by default, and if there are fewer.

    Raises:
        InputError: the split is unknown, or known to be incomplete.
    """

    def __init__(self, manifest: Manifest, split: str, count: int | None = None) -> None:
        split = split if split in manifest.rows else known_split(split)
        if split not in manifest.rows:
            raise InputError(f"{manifest.path}: no split {split!r}; it has {', '.join(manifest.rows)}.")
        if missing := manifest.missing(split):
            raise InputError(missing)
        if manifest.size is not None:
            check_size(manifest.size)
        if count is not None:
            check_whole("count", count)
        self.path = manifest.path
        self.rows = list(manifest.rows[split])
        if count is not None and count < len(self.rows):
            self.rows = [self.rows[i] for i in spread(len(self.rows), count)]
        self.size = manifest.size
        self._first_size: tuple[int, int] | None = None
        self._stored, self._read_image = manifest.stored, manifest.image
        without = {name: [row for row in self.rows if name not in row.targets] for name in self._stored}
        self._incomplete = {name: rows for name, rows in without.items() if rows}
        tasks = {name: stored.task for name, stored in self._stored.items() if name not in self._incomplete}
        super().__init__(tasks, len(self.rows))

    def select(self, tasks: str | Iterable[str]) -> DenseDataset:
        """The same images with some of the tasks. Raises InputError if one is unknown, or an image has no target."""
        names = tasks.split(",") if isinstance(tasks, str) else list(tasks)
        for name in names:
            if rows := self._incomplete.get(name):
                raise InputError(
                    f"{self.path}: {len(rows)} of {len(self.rows)} images have no target of {name!r}, first"
                    f" {rows[0].image}: give it, or leave them out."
                )
        return super().select(names if tasks != "all" else tasks)

    def _picked(self, count: int) -> Sequence[int]:
        """Indices evenly over the split, because neighbours show one scene."""
        return spread(len(self), count)

    def _subset(self, indices: Sequence[int]) -> DenseDataset:
        chosen = copy.copy(self)
        chosen.rows, chosen._count, chosen._first_size = [self.rows[i] for i in indices], len(indices), None
        return chosen

    def group(self, index: int) -> str:
        return str(_file(self.rows[index].image).parent)

    def fingerprint(self) -> str:
        """sha256 of how images and chosen tasks are stored, and of the files' names, sizes and dates."""
        folder = self.path if self.path.is_dir() else self.path.parent
        chosen = [(name, self._stored[name]) for name in sorted(self.tasks)]
        lines = [str(self.size), *(f"{name} {s.task} {s.scale} {s.ignore}" for name, s in chosen)]
        lines += [f"{name} {s.ignored_colours}" for name, s in chosen if s.ignored_colours]
        stat = lru_cache(maxsize=None)(_size_and_date)
        for row in self.rows:
            targets = [row.targets[name] for name, _ in chosen]
            for source in (row.image, *targets, *(row.others if targets else ())):
                lines.append(f"{str(source).replace(str(folder), '', 1)} {stat(_file(source))}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def check_files(self, deeply: bool = False) -> None:
        """Check that the files of images and chosen tasks exist and, if ``deeply``, that none is truncated.

        Raises:
            InputError: files are missing or damaged; names the first ones.
        """
        files = dict.fromkeys(file for row in self.rows for file in self._files(row))
        if missing := [file for file in files if not file.is_file()]:
            raise InputError(f"{len(missing)} of {len(files)} files are not there: {', '.join(map(str, missing[:3]))}.")
        for file in files if deeply else ():
            if file.suffix != ".mat" and may_be_truncated(file):
                read_array(file)

    def _files(self, row: Row) -> Iterator[Path]:
        yield _file(row.image)
        yield from (_file(row.targets[name]) for name in self.tasks if name in row.targets)
        yield from row.others if self.tasks else ()

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        image = self.image(index)
        sample = {"image": image}
        for name in self.tasks:  # a target that is the image itself is not read again
            sample[name] = image.clone() if self._is_image(name, index) else self._target(name, index)
            if sample[name].shape[-2:] != image.shape[-2:]:
                raise self._other_size(self.rows[index].targets[name], sample[name], "its image", image.shape[-2:])
        return sample

    def image(self, index: int) -> Tensor:
        source = self.rows[index].image
        array = self._read_image(source)
        try:
            image = to_tensor(array, self.size)[0]
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
        if self.size is None:  # all images must have one size, because they are batched
            if self._first_size is None:
                self._first_size = self._read_image(self.rows[0].image).shape[:2]
            if image.shape[-2:] != self._first_size:
                raise self._other_size(source, image, "the first image", self._first_size)
        return image

    def _other_size(self, source: Source, found: Tensor, other: str, size: Sequence[int]) -> InputError:
        height, width = size
        return InputError(
            f"{source} is {found.shape[-1]} x {found.shape[-2]} pixels, {other} {width} x {height}: add"
            f" `size: [{height}, {width}]` to {self.path.name} to resize them."
        )

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        return {name: self._target(name, index) for name in tasks}

    def _is_image(self, name: str, index: int) -> bool:
        """Whether a target is the image itself, as for most autoencoders."""
        stored, row = self._stored[name], self.rows[index]
        unchanged = stored.scale is None and not stored.ignore
        return stored.task.kind == "autoencoder" and unchanged and row.targets[name] == row.image

    def _target(self, name: str, index: int) -> Tensor:
        if self._is_image(name, index):
            return self.image(index)
        row = self.rows[index]
        return self._stored[name].read(row.targets[name], self.size, row.image)


def _file(source: Source) -> Path:
    return source.file if isinstance(source, Frame) else source


def _size_and_date(file: Path) -> tuple[int, int] | None:
    """Size and modification date of a file; None if it does not exist."""
    found = file.stat() if file.is_file() else None
    return found and (found.st_size, found.st_mtime_ns)
