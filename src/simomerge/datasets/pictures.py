"""Images without labels: a folder of pictures, a list of images, or a dataset whose labels nobody reads."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simomerge.core.errors import InputError
from simomerge.core.images import to_tensor
from simomerge.datasets.base import DenseDataset

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


class Pictures(DenseDataset):
    """Pictures without targets, read when they are asked for.

    Args:
        sources: paths, PIL images, arrays or tensors; see `simomerge.core.images.to_tensor`.
        size: (height, width) in pixels to make them; as they are by default.

    Example:
        >>> Pictures([np.zeros((48, 64, 3), np.uint8)], size=(24, 32)).image(0).shape
        torch.Size([3, 24, 32])
    """

    def __init__(self, sources: Sequence[Any], size: tuple[int, int] | None = None) -> None:
        super().__init__({}, len(sources))
        self.sources = list(sources)
        self.size = size

    def image(self, index: int) -> Tensor:
        return to_tensor(self.sources[index], self.size)[0]

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        return {}

    def name(self, index: int) -> str:
        """What to call a picture in a message."""
        source = self.sources[index]
        return str(source) if isinstance(source, (str, Path)) else f"image {index}"


def as_images(source: Any, count: int | None = None, size: str | tuple[int, int] | None = None) -> Any:
    """What a user calls images, as something with ``image(i)`` and a length.

    Args:
        source: a folder (searched with its subfolders), a picture's path, a sequence of images, or a dataset.
        count: how many to take, evenly over the folder or sequence (neighbouring frames of a video are nearly the
            same); all where fewer are there, and by default.
        size: (height, width) or "HEIGHTxWIDTH" to make pictures; as they are by default.

    Raises:
        InputError: no such folder, no picture in it, a count below 1, or a size that is none.

    Example:
        >>> len(as_images([np.zeros((8, 8, 3), np.uint8)] * 10, count=4))
        4
    """
    if count is not None and count < 1:
        raise InputError(f"{count} images asked for; use at least 1.")
    if isinstance(source, (str, Path)):
        source = _files(Path(source))
    if isinstance(source, Pictures):
        source, size = source.sources, size or source.size
    if hasattr(source, "image") and hasattr(source, "__len__"):
        if not len(source):
            raise InputError("the dataset has no images; give at least one.")
        if size is not None:
            raise InputError("a dataset's images have their own size; leave size out, or give a folder of pictures.")
        if count is None or count >= len(source):
            return source
        return source.take(count) if hasattr(source, "take") else _First(source, count)
    if isinstance(source, (np.ndarray, Tensor)) and source.ndim == 4:
        source = list(source)
    if not isinstance(source, Sequence) or not len(source):
        raise InputError("images: give a folder of pictures, a list of at least one image, or a dataset.")
    if count is not None and count < len(source):
        source = [source[i] for i in np.linspace(0, len(source) - 1, count).round().astype(int)]
    return Pictures(source, _parse_size(size))


def _parse_size(size: str | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    parts = size.lower().split("x") if isinstance(size, str) else [str(value) for value in size]
    if len(parts) != 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"size {size}: give HEIGHTxWIDTH in pixels, such as 480x640.")
    return int(parts[0]), int(parts[1])


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: no such folder of images.")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise InputError(f"{path}: no picture in it (looked for {', '.join(SUFFIXES)}, also in subfolders).")
    return found


def image_batches(
    images: Any, batch_size: int = 32, max_pixels: int = 1 << 21, start: int = 0, step: int = 1
) -> Iterator[tuple[list[int], Tensor]]:
    """Every readable image once, in batches of one size: their indices and float tensors (B, 3, H, W).

    Neighbours of one size share a batch. Pictures that cannot be read are left out, and a warning names them at the
    end.

    Args:
        images: as `as_images` gives.
        batch_size, max_pixels: the most images, and pixels of all of them together, in a batch of more than one.
        start, step: take images start, start + step, ...: one process's share.

    Raises:
        InputError: none of the images can be read.
    """
    kept: list[tuple[int, Tensor]] = []
    unreadable: list[tuple[str, str]] = []
    for index in range(start, len(images), step):
        try:
            image = images.image(index)
        except InputError as error:
            if not isinstance(images, Pictures):
                raise
            unreadable.append((images.name(index), str(error)))
            continue
        full = len(kept) >= min(batch_size, max(1, max_pixels // image[0].numel()))
        if kept and (full or kept[0][1].shape != image.shape):
            yield [i for i, _ in kept], torch.stack([tensor for _, tensor in kept])
            kept = []
        kept.append((index, image))
    if kept:
        yield [i for i, _ in kept], torch.stack([tensor for _, tensor in kept])
    if unreadable:
        _report(unreadable, len(range(start, len(images), step)), alone=step == 1)


def readable(images: Any, one_size: bool = False) -> Any:
    """The images without those that cannot be read, which a warning names: for work that looks at them repeatedly.

    Args:
        images: as `as_images` gives; not so many that each may not be opened once more.
        one_size: they must be of one size.

    Raises:
        InputError: none can be read, or two differ in size where they must not.
    """
    if not isinstance(images, Pictures):
        return images
    kept, unreadable = [], []
    first: tuple[int, int] | None = None
    for index, source in enumerate(images.sources):
        try:
            height, width = images.image(index).shape[-2:]
        except InputError as error:
            unreadable.append((images.name(index), str(error)))
            continue
        first = first or (height, width)
        if one_size and (height, width) != first:
            raise InputError(
                f"{images.name(index)} is {width} x {height} pixels, the first {first[1]} x {first[0]}; this needs"
                " images of one size: give size=(height, width), or --size HEIGHTxWIDTH."
            )
        kept.append(source)
    if unreadable:
        _report(unreadable, len(images), alone=True)
    return Pictures(kept, images.size)


def _report(unreadable: Sequence[tuple[str, str]], asked: int, alone: bool) -> None:
    """Say which images were left out; ``alone``: no other process has any."""
    if alone and len(unreadable) == asked:
        raise InputError(f"none of the {asked} images can be read, first {unreadable[0][0]} ({unreadable[0][1]}).")
    shown = ", ".join(name for name, _ in unreadable[:3]) + (", ..." if len(unreadable) > 3 else "")
    warnings.warn(f"{len(unreadable)} of {asked} images cannot be read and were left out: {shown}", stacklevel=3)


class _First:
    """The first images of whatever has ``image(i)``."""

    def __init__(self, source: Any, count: int) -> None:
        self.source = source
        self.count = count

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> Tensor:
        found: Tensor = self.source.image(index)
        return found
