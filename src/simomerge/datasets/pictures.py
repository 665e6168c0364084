"""Images without labels: a folder of pictures, a list of images, or a dataset whose labels are not read."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simomerge.core.caution import warn
from simomerge.core.errors import InputError
from simomerge.core.images import to_tensor
from simomerge.core.pixels import height_width
from simomerge.core.progress import progress
from simomerge.core.remote import RemoteError
from simomerge.core.schema import check_whole
from simomerge.datasets.base import DenseDataset
from simomerge.datasets.batches import BATCH_PIXELS, images_within
from simomerge.datasets.groups import evenly
from simomerge.datasets.tars import SUFFIX as TAR
from simomerge.datasets.tars import TarPictures

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
NOT_READ = (".heic", ".heif", ".avif", ".jxl", ".gif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2")
"""Pictures of formats that are not read. In folders, a warning says so."""

KEPT_BYTES = 128 << 20
"""Images that a check has decoded stay in memory until they are used, up to this size of all of them together."""

KEPT_SIZES = 1 << 16
"""Images whose sizes are remembered."""

SHOWN_EVERY = 100
"""Images that a check decodes between two lines of progress."""

CHECKED_OF_DATASET = 4096
"""Images of a dataset whose sizes a check compares. Pictures are all checked, because some may be unreadable."""


class Images(DenseDataset):
    """Images without labels, each read when it is asked for. `as_images` makes one from what a user gives.

    It remembers which images were read and how that went, and shares this with what `take`, `skip` and `readable`
    return: a check decodes only images that were never decoded, and the next use of such an image costs nothing.

    Args:
        source: a sequence of paths, PIL images, arrays or tensors (see `simomerge.core.images.to_tensor`); or a
            dataset, that is anything with ``image(i)`` and a length.
        size: (height, width) in pixels to resize pictures to; their own size by default.
        crop: cut pictures at their centre to the shape of ``size`` first, instead of distorting them.

    Example:
        >>> Images([np.zeros((48, 64, 3), np.uint8)], size=(24, 32)).image(0).shape
        torch.Size([3, 24, 32])
    """

    def __init__(self, source: Any, size: tuple[int, int] | None = None, crop: bool = False) -> None:
        super().__init__({}, len(source))
        self.source = source
        self.size = size
        self.crop = crop
        self.is_dataset = hasattr(source, "image")
        self._positions: Sequence[int] = range(len(source))
        self._memory = _Memory()

    def image(self, index: int) -> Tensor:
        position = self._positions[index]
        kept = self._memory.decoded.pop(position, None)
        return self._read(position) if kept is None else kept

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        return {}

    def name(self, index: int) -> str:
        """How messages refer to an image: its path, or its number in the source."""
        position = self._positions[index]
        if isinstance(self.source, TarPictures):
            return self.source.name(position)
        source = None if self.is_dataset else self.source[position]
        return str(source) if isinstance(source, (str, Path)) else f"image {position}"

    def group(self, index: int) -> str:
        position = self._positions[index]
        if isinstance(self.source, (DenseDataset, TarPictures)):
            return self.source.group(position)
        source = None if self.is_dataset else self.source[position]
        return str(Path(source).parent) if isinstance(source, (str, Path)) else ""

    def fingerprint(self) -> str:
        """sha256 of the names, sizes and dates of the pictures; for a dataset, its own fingerprint."""
        if self.is_dataset:
            return str(getattr(self.source, "fingerprint", str)())
        if isinstance(self.source, TarPictures):
            return self.source.fingerprint(self._positions)
        sources = [self.source[place] for place in self._positions]
        files = [Path(each).absolute() for each in sources if isinstance(each, (str, Path)) and Path(each).is_file()]
        folder = os.path.commonpath([file.parent for file in files]) if files else ""  # which may be moved
        stats = ((file.relative_to(folder), file.stat()) for file in files)
        lines = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def resized(self, size: str | tuple[int, int], crop: bool = False) -> Images:
        """The same pictures in another size: (height, width) or "HEIGHTxWIDTH". Raises InputError."""
        if self.is_dataset:
            raise InputError("a dataset's images have their own size; leave size out, or give a folder of pictures.")
        chosen = copy.copy(self)
        chosen.size, chosen.crop, chosen._memory = height_width(size), crop, _Memory()
        return chosen

    def readable(self, one_size: bool = False) -> Images:
        """The images without those that cannot be read. Use it before work that reads images repeatedly.

        A dataset's images are checked only for their size, and of many only `CHECKED_OF_DATASET`, spread evenly.

        Args:
            one_size: require images of one size.

        Raises:
            InputError: no image can be read, or ``one_size`` is set and two images differ in size.

        Warns:
            UserWarning: some images were left out; names the first three.
        """
        if self.is_dataset and not one_size:
            return self
        kept, unreadable = list[int](), list[int]()
        first: tuple[int, int] | None = None
        checked = CHECKED_OF_DATASET if self.is_dataset else len(self)
        for done, index in enumerate(evenly(range(len(self)), checked), 1):
            # Only decoding finds a truncated picture: the size in its header looks right.
            size = self._size(index)
            (unreadable if size is None else kept).append(index)
            first = first or size
            if one_size and first and size and size != first:
                by_option = "give size=(height, width), or --size HEIGHTxWIDTH"
                way = "let the dataset resize them" if self.is_dataset else by_option
                raise InputError(
                    f"{self.name(index)} is {size[1]} x {size[0]} pixels, the first {first[1]} x {first[0]}; this needs"
                    f" images of one size: {way}."
                )
            if checked > SHOWN_EVERY and (done % SHOWN_EVERY == 0 or done == checked):
                progress("images", done, checked, "checked")
        self.report(unreadable, len(self), every_image=True)
        return self._subset(kept) if unreadable else self

    def _size(self, index: int) -> tuple[int, int] | None:
        """(height, width) of an image, which is decoded only if it never was; None if it cannot be read."""
        position = self._positions[index]
        if not self._memory.knows(position) and (image := self.try_image(index)) is not None:
            self._memory.keep(position, image)
            return (int(image.shape[-2]), int(image.shape[-1]))
        return self._memory.sizes.get(position)

    def try_image(self, index: int) -> Tensor | None:
        """An image; None if it is a picture that cannot be read. Raises the error of a dataset or of a URL."""
        try:
            return self.image(index)
        except InputError as error:
            if self.is_dataset or isinstance(error, RemoteError):
                raise
            self._memory.errors[self._positions[index]] = str(error)
            return None

    def _read(self, position: int) -> Tensor:
        image: Tensor
        if self.is_dataset:
            image = self.source.image(position)
        else:
            image = to_tensor(self.source[position], self.size, self.crop)[0]
        self._memory.note(position, (image.shape[-2], image.shape[-1]))
        return image

    def report(self, unreadable: Sequence[int], asked: int, every_image: bool) -> None:
        """Warn of the images that were left out of ``asked`` ones. Raises InputError if that is all of them."""
        if not unreadable:
            return
        if every_image and len(unreadable) == asked:
            reason = self._memory.errors[self._positions[unreadable[0]]]
            raise InputError(f"none of the {asked} images can be read, first {self.name(unreadable[0])} ({reason}).")
        shown = ", ".join(map(self.name, unreadable[:3])) + (", ..." if len(unreadable) > 3 else "")
        warn(f"{len(unreadable)} of {asked} images cannot be read and were left out: {shown}")

    def _picked(self, count: int) -> Sequence[int]:
        """Pictures evenly over the sequence: neighbouring frames of a video are nearly the same."""
        if isinstance(self.source, DenseDataset) and len(self) == len(self.source):
            return self.source._picked(count)
        return range(count) if self.is_dataset else evenly(range(len(self)), count)

    def _subset(self, indices: Sequence[int]) -> Images:
        chosen = copy.copy(self)
        chosen._positions, chosen._count = [self._positions[index] for index in indices], len(indices)
        return chosen


class _Memory:
    """What reading images has shown, by their position in the source."""

    def __init__(self) -> None:
        self.sizes: dict[int, tuple[int, int]] = {}
        self.errors: dict[int, str] = {}
        self.decoded: dict[int, Tensor] = {}
        self._bytes = 0

    def knows(self, position: int) -> bool:
        return position in self.sizes or position in self.errors

    def note(self, position: int, size: tuple[int, int]) -> None:
        """Remember the size of an image, unless a million images would fill the memory."""
        if len(self.sizes) < KEPT_SIZES:
            self.sizes[position] = size

    def keep(self, position: int, image: Tensor) -> None:
        """Keep a decoded image for its next use, if there is room."""
        if position not in self.decoded and self._bytes + image.nbytes <= KEPT_BYTES:
            self._bytes += image.nbytes
            self.decoded[position] = image

    def __getstate__(self) -> dict[str, Any]:
        """Without the decoded images: reading them again is faster than sending them to another process."""
        return {**self.__dict__, "decoded": {}, "_bytes": 0}


def as_images(source: Any, count: int | None = None, size: str | tuple[int, int] | None = None) -> Images:
    """What a user gives as images, as one type. `Images` are returned as they are, or ``count`` of them.

    Args:
        source: a folder (searched with its subfolders and linked folders) of pictures or of tar files with pictures, a
            path of one of these, a sequence of images, a dataset, or `Images`.
        count: images to take, evenly over a folder or sequence. All are taken if there are fewer, and by default.
        size: (height, width) or "HEIGHTxWIDTH" in pixels to resize pictures to; their own size by default.

    Raises:
        InputError: the folder is missing or has no picture, the count is no whole number of 1 or more, or the size is
            not a size.

    Example:
        >>> len(as_images([np.zeros((8, 8, 3), np.uint8)] * 10, count=4))
        4
    """
    if count is not None:
        check_whole("count", count)
    images = source if isinstance(source, Images) else Images(_sequence(source))
    if size is not None:
        images = images.resized(size)
    return images if count is None or count >= len(images) else images._subset(images._picked(count))


def _sequence(source: Any) -> Any:
    """A dataset as it is, and everything else as a list of at least one image."""
    if isinstance(source, (str, Path)):
        return pictures_of(Path(source))
    if hasattr(source, "image") and hasattr(source, "__len__"):
        if not len(source):
            raise InputError("the dataset has no images; give at least one.")
        return source
    if isinstance(source, (np.ndarray, Tensor)) and source.ndim == 4:
        source = list(source)
    if not isinstance(source, Sequence) or not len(source):
        raise InputError("images: give a folder of pictures, a list of at least one image, or a dataset.")
    return list(source)


def pictures_of(path: Path) -> Sequence[Any]:
    """The pictures of a folder, or those in its tar files if it has no other pictures; or those of one tar file.

    Raises:
        InputError: There is none, or a tar file is damaged.
    """
    if path.suffix == TAR and path.is_file():
        return TarPictures([path], SUFFIXES)
    if path.is_dir():
        found = sorted(each for each in _all_files(path, set()) if each.is_file())
        tars = [each for each in found if each.suffix.lower() == TAR]
        if tars and not any(each.suffix.lower() in SUFFIXES for each in found):
            return TarPictures(tars, SUFFIXES)
    return picture_files(path)


def picture_files(path: Path) -> list[Path]:
    """A picture, or all pictures of a folder and its subfolders, in order. Raises InputError if there is none."""
    if path.is_file():
        return [path]
    return files_of(path, SUFFIXES)


def files_of(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files of a folder, its subfolders and linked folders with one of some suffixes, by name.

    Raises:
        InputError: no such folder, or no such file in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of images.")
    files = list(_all_files(folder, set()))
    found = sorted(p for p in files if p.suffix.lower() in suffixes and p.is_file())
    others = sorted({p.suffix.lower() for p in files} & set(NOT_READ))
    if not found:
        seen = f", found {', '.join(others)}" if others else ""
        raise InputError(f"{folder}: no picture in it (looked for {', '.join(suffixes)}, also in subfolders{seen}).")
    if others:
        count = sum(p.suffix.lower() in NOT_READ for p in files)
        warn(
            f"{folder}: pictures of formats that are not read ({', '.join(others)}) are left out: {count} of them;"
            " convert them."
        )
    return found


def _all_files(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """The files of a folder, its subfolders and linked folders, each folder once; none that is hidden.

    Hidden ones, such as ``.thumbnails`` and ``._a.jpg`` of macOS, are copies or no pictures.
    """
    if (real := folder.resolve()) in seen:
        return
    seen.add(real)
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except PermissionError:  # such as lost+found
        return
    for path in sorted(entries, key=lambda path: (path.is_symlink(), path)):
        if path.is_dir():
            yield from _all_files(path, seen)
        else:
            yield path


def image_batches(
    images: Any, batch_size: int = 32, max_pixels: int = BATCH_PIXELS, start: int = 0, step: int = 1
) -> Iterator[tuple[list[int], Tensor]]:
    """Every readable image once, in batches of one size: their indices and float tensors (B, 3, H, W).

    Neighbours of one size share a batch. Pictures that cannot be read are left out, and a warning names them at the
    end.

    Args:
        images: as in `as_images`.
        batch_size: the largest number of images in a batch.
        max_pixels: the largest number of pixels in a batch, unless it holds a single image.
        start, step: read images start, start + step, ... only: one process's share.

    Raises:
        InputError: no image can be read.
    """
    images = as_images(images)
    kept: list[tuple[int, Tensor]] = []
    unreadable = []
    for index in range(start, len(images), step):
        image = images.try_image(index)
        if image is None:
            unreadable.append(index)
            continue
        full = len(kept) >= images_within(batch_size, image, max_pixels)
        if kept and (full or kept[0][1].shape != image.shape):
            yield [i for i, _ in kept], torch.stack([tensor for _, tensor in kept])
            kept = []
        kept.append((index, image))
    if kept:
        yield [i for i, _ in kept], torch.stack([tensor for _, tensor in kept])
    images.report(unreadable, len(range(start, len(images), step)), every_image=step == 1)
