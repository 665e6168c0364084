"""Reading images and targets from files: NPY arrays, pictures and slices of HDF5 files, decoded and resized."""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from simomerge.core.errors import InputError
from simomerge.core.images import read_image, resized
from simomerge.core.pixels import (
    MAX_PIXELS,
    OTHER_STARTS,
    TIFF_STARTS,
    grey_palette_indices,
    largest_value,
    read_pixels,
)
from simomerge.core.regular import check_regular
from simomerge.datasets.colours import is_grey, labels_of_colours, labels_of_palette
from simomerge.datasets.losses import IGNORE_LABEL
from simomerge.datasets.published.hdf5 import Frame
from simomerge.datasets.tasks import Task
from simomerge.datasets.upright import turned_like, turned_vectors

Source = Path | Frame
"""Where an image or a target is: a file, or one image's slice of an HDF5 file."""

_PICTURE_ENDS = {b"\x89PNG\r\n\x1a\n": b"IEND\xaeB`\x82", b"\xff\xd8": b"\xff\xd9"}
"""The first and last bytes of PNG and JPEG files."""
_PICTURE_STARTS = (*OTHER_STARTS, b"GIF8", b"BM", b"RIFF", b"P5", b"P6")


def read_array(path: Source, colours: bool = False) -> np.ndarray:
    """The numbers in an NPY file, a picture or a slice, as stored; pictures are turned upright by their EXIF tag.

    Values of all depths are kept. Palettes give their indices, or their colours (H, W, 3) with ``colours``; see
    `simomerge.core.pixels.read_pixels`.

    Raises:
        InputError: the file is missing or cannot be read as any of them.
    """
    if isinstance(path, Frame):
        return path.read()
    check_regular(path, "give a PNG, TIFF, PFM, JPEG or NPY file.")
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    try:
        if path.suffix.lower() == ".npy":
            return _read_npy(path)
        return read_pixels(path, colours)
    except InputError:
        raise
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        raise InputError(f"{path}: cannot be read ({error}); give a PNG, TIFF, PFM, JPEG or NPY file.") from error


def _read_npy(path: Path) -> np.ndarray:
    """The numbers in an NPY file, after checking its header. Raises ValueError."""
    with path.open("rb") as handle:
        shape, dtype = _npy_header(handle)
        if dtype.kind not in "buif":
            raise ValueError(f"it holds {dtype.name} instead of numbers")
        count = math.prod(shape)
        if not 0 < count <= 4 * MAX_PIXELS:  # at most four values for each pixel
            raise ValueError(f"its shape is {shape}, but a map has 1 to {MAX_PIXELS:,} pixels")
        if handle.tell() + count * dtype.itemsize > path.stat().st_size:
            raise ValueError("its end is missing")
    loaded: np.ndarray = np.load(path, allow_pickle=False)
    return loaded


def _npy_header(handle: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape and dtype that the header of an NPY file names. Raises ValueError or EOFError."""
    version = np.lib.format.read_magic(handle)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, _, dtype = read(handle)
    except (ValueError, EOFError):
        raise
    except Exception as error:  # Python reads the header: damaged ones raise many kinds of errors
        raise ValueError("its header is not that of an NPY file") from error
    return shape, dtype


def read_picture(path: Source) -> np.ndarray:
    """An image as encoders get it, upright and in three colours, or an NPY file's numbers. Raises InputError."""
    if isinstance(path, Frame) or path.suffix.lower() == ".npy":
        return read_array(path)
    return read_image(path)


def may_be_truncated(file: Path) -> bool:
    """Whether an NPY file or picture is or may be truncated, from its first and last bytes: quick for many files.

    Some complete files may seem truncated, such as a PNG with many bytes after its end: read those to be sure. A
    truncated picture is found only if it is a PNG, JPEG or TIFF file; of other pictures only the first bytes are
    checked.

    Raises:
        OSError: the file cannot be opened.
        InputError: it is a named pipe, a device or a folder.
    """
    check_regular(file, "give a picture or an NPY file.")
    size = file.stat().st_size
    with file.open("rb") as handle:
        if file.suffix.lower() == ".npy":
            return _npy_size(handle) > size
        start = handle.read(8)
        if start.startswith(TIFF_STARTS):
            return _tiff_size(file) > size
        handle.seek(max(0, size - 64))
        for kind, end in _PICTURE_ENDS.items():
            if start.startswith(kind):
                return end not in handle.read()
        return not start.startswith(_PICTURE_STARTS)


def _tiff_size(file: Path) -> float:
    """The size in bytes that the directory of a TIFF file implies; infinite if the directory cannot be read."""
    from PIL import Image

    try:
        with warnings.catch_warnings(), file.open("rb") as handle, Image.open(handle) as image:
            warnings.simplefilter("ignore")  # of a directory that is cut off
            tags: Any = getattr(image, "tag_v2", {})
            strips = ((tags.get(offsets, ()), tags.get(counts, ())) for offsets, counts in ((273, 279), (324, 325)))
            ends = [offset + count for pair in strips for offset, count in zip(*pair, strict=False)]
            return float(max(ends, default=np.inf))
    except UnidentifiedImageError:  # kinds that only tifffile knows, or files whose directory is cut off
        with file.open("rb") as handle:
            start = handle.read(16)
        order, wide = ("<" if start[:1] == b"I" else ">"), start[2:4] in (b"+\0", b"\0+")
        if len(start) < 16:
            return float("inf")
        (offset,) = struct.unpack(f"{order}Q", start[8:16]) if wide else struct.unpack(f"{order}I", start[4:8])
        return float(offset + 2)
    except Exception:  # Pillow raises many kinds of errors for damaged files
        return float("inf")


def _npy_size(handle: Any) -> float:
    """The size in bytes that the header of an NPY file implies; infinite if there is no valid header."""
    try:
        shape, dtype = _npy_header(handle)
        return float(handle.tell() + math.prod(shape) * dtype.itemsize)
    except (ValueError, EOFError, OverflowError):
        return float("inf")


@dataclass(frozen=True)
class Stored:
    """How the targets of a task are stored.

    Attributes:
        task: the task.
        scale: factor from stored values to the task's unit, such as 0.001 for a depth in millimetres; None for the
            usual factor of the file's dtype.
        ignore: stored values of pixels that do not count.
        array: reads the numbers (H, W) or (H, W, 3) of a source. It decodes what is special to a dataset; NaN marks
            pixels without a value.
        ignored_colours: like ``ignore``, for labels that are stored as colours.
    """

    task: Task
    scale: float | None = None
    ignore: tuple[float, ...] = ()
    array: Callable[[Any], np.ndarray] = read_array
    ignored_colours: tuple[tuple[int, int, int], ...] = ()

    def read(self, path: Source, size: tuple[int, int] | None = None, image: Source | None = None) -> Tensor:
        """The target in a file, as `simomerge.datasets.tasks.KINDS` describes it.

        Args:
            path: the file.
            size: (height, width) to resize the target to; its own size by default.
            image: the image of the target. If it has an EXIF orientation and the target has none, the target is turned
                as the image is, or refused if its size does not say how it was made.

        Raises:
            InputError: the file cannot be read, or does not hold a target of this task.
        """
        stored = self.as_stored(path)
        stored, turn = turned_like(stored, path, image)
        own_size = stored.shape[:2]
        if size is not None and self.task.kind != "autoencoder":  # before decoding, which is then of fewer pixels
            stored = stored[np.ix_(*_nearest(own_size, size))]
        values = self._decoded(*self._without_transparency(stored), path)
        if self.task.behaviour.directed:
            values = turned_vectors(values, turn, path)
        if self.task.kind == "flow" and size is not None:  # in pixels of the image as it is read
            values *= np.array([size[1] / own_size[1], size[0] / own_size[0]], np.float32)[:, None, None]
        target = torch.from_numpy(np.ascontiguousarray(values))
        return target if size is None else resize_target(self.task, target, size)

    def as_stored(self, path: Source) -> np.ndarray:
        """The numbers (H, W) or (H, W, C) of a target. Raises InputError if the shape is not that of the task."""
        stored = self.array(path)
        if self.task.kind == "segmentation" and self.array is read_array and isinstance(path, Path):
            stored = self._of_colours(self._grey_or_index(stored, path), path)
        channels = 1 if self.task.kind == "segmentation" else self.task.channels
        if channels > 1 and stored.ndim == 2 and self.array is read_array:
            stored = read_array(path, colours=True)
        if stored.ndim == 3 and channels > 1 and stored.shape[0] == channels != stored.shape[2]:
            stored = stored.transpose(1, 2, 0)
        picture = isinstance(path, Path) and path.suffix.lower() != ".npy"
        grey_planes = (1, 3, 4) if picture else (1,)
        if stored.ndim == 3 and channels == 1 and stored.shape[2] in grey_planes and is_grey(stored):
            stored = stored[..., 0]
        planes = stored.shape[2] if stored.ndim == 3 else 1
        if stored.ndim != (3 if channels > 1 else 2) or planes not in (channels, *self._more_planes(stored, channels)):
            expected = f"(H, W, {channels})" if channels > 1 else "(H, W)"
            raise InputError(f"{path}: {self.task.name} of shape {stored.shape}; give {expected}.")
        return stored

    def _more_planes(self, stored: np.ndarray, channels: int) -> tuple[int, ...]:
        """Numbers of planes that a file may have in addition to the task's: with transparency, or KITTI's mask."""
        if self.task.kind == "flow":
            return (3,) if stored.dtype == np.uint16 else ()
        return (channels + 1,) if channels == 3 else ()

    def _without_transparency(self, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the task's channels alone, and where they are to be ignored."""
        if self.task.kind == "flow" and stored.shape[2] == 3:  # KITTI: 64 per pixel from 2^15 on, and a mask
            values = (stored[..., :2].astype(np.float32) - 2**15) / 64
            return values, np.broadcast_to(stored[..., 2:] == 0, values.shape)
        stored = stored[..., : self.task.channels] if stored.ndim == 3 else stored
        return stored, np.isin(stored, self._ignored(stored.dtype))

    def _of_colours(self, stored: np.ndarray, path: Path) -> np.ndarray:
        """The labels of a picture whose colours are those of the classes; every other file as it is."""
        if not self.task.colours or stored.dtype != np.uint8 or path.suffix.lower() == ".npy":
            return stored
        if stored.ndim == 3 and stored.shape[2] in (3, 4) and not is_grey(stored):
            found: np.ndarray = labels_of_colours(stored, self.task, self.ignored_colours, path)
            return found
        colours = read_array(path, colours=True)
        if stored.ndim == 2 and colours.ndim == 3:
            return labels_of_palette(stored, colours, self.task, self.ignored_colours, path)
        return stored

    def _grey_or_index(self, greys: np.ndarray, path: Path) -> np.ndarray:
        """The labels of a picture with a palette of greys: its greys or its indices, whichever are labels of the task.

        Programs that compress PNG files give a grey picture such a palette, and other programs store indices in one.
        The greys of the latter rise with the index; greys in another order are the values themselves.

        Raises:
            InputError: Both are labels of the task, they differ, and the greys rise with the index.
        """
        indices = None if path.suffix.lower() == ".npy" else grey_palette_indices(path)
        if indices is None or np.array_equal(indices, greys) or not self._are_labels(indices):
            return greys
        _, first = np.unique(indices, return_index=True)
        rise = bool((np.diff(greys.reshape(-1)[first].astype(int)) > 0).all())
        if self._are_labels(greys) and not rise:
            return greys
        if self._are_labels(greys):
            raise InputError(
                f"{path}: the greys of its palette are labels of {self.task.name}, and so are its indices; save it as a"
                " grey picture without a palette, or with colours in the palette."
            )
        return indices

    def _are_labels(self, values: np.ndarray) -> bool:
        known = {*range(len(self.task.classes)), *self.ignore}
        return values.ndim == 2 and set(np.unique(values).tolist()) <= known

    def _ignored(self, dtype: np.dtype[Any]) -> np.ndarray:
        """`ignore` in the dtype of a file, without the values that the dtype cannot hold."""
        if dtype.kind not in "uib":
            return np.array(self.ignore).astype(dtype)
        low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        return np.array([v for v in self.ignore if low <= v <= high and v == int(v)]).astype(dtype)

    def _decoded(self, stored: np.ndarray, ignored: np.ndarray, path: Source) -> np.ndarray:
        kind = self.task.kind
        if kind == "segmentation":
            return self._labels(stored, ignored, path)
        if kind == "binary":
            return _mask(stored, ignored, self.scale, path)[None]
        self._check_signed(stored, ignored, path)
        values = stored.astype(np.float32) * np.float32(self._unit(stored, path))
        if kind == "normals":
            return _unit_normals(stored, values, np.asarray(ignored.all(-1))).transpose(2, 0, 1)
        if kind in ("depth", "disparity"):
            return np.where(ignored | ~(values > 0) | ~np.isfinite(values), np.float32(0), values)[None]
        invalid = np.float32(self.task.behaviour.invalid)
        if values.ndim == 3:
            invalid_pixels = ignored.all(-1, keepdims=True) | ~np.isfinite(values).all(-1, keepdims=True)
            return np.where(invalid_pixels, invalid, values).transpose(2, 0, 1)
        return np.where(ignored | ~np.isfinite(values), invalid, values)[None]

    def _check_signed(self, stored: np.ndarray, ignored: np.ndarray, path: Source) -> None:
        """Raise InputError for signed integers that would be read as they are, but cannot be values of the task."""
        bounded = self.task.behaviour.bounded or self.task.kind == "normals"
        if self.scale is None and bounded and stored.dtype.kind == "i" and np.abs(stored[~ignored]).max(initial=0) > 1:
            raise InputError(
                f"{path}: {self.task.name} holds signed integers ({stored.dtype}) above 1. Save it as uint8 or uint16,"
                " whose range is known, or as floats."
            )

    def _unit(self, stored: np.ndarray, path: Source) -> float:
        if self.scale is not None:
            return self.scale
        if stored.dtype.kind != "u" or not (self.task.behaviour.bounded or self.task.kind == "normals"):
            return 1.0
        if self.array is read_array and isinstance(path, Path):
            return 1 / largest_value(path, stored.dtype)
        return 1 / float(np.iinfo(stored.dtype).max)

    def _labels(self, stored: np.ndarray, ignored: np.ndarray, path: Source) -> np.ndarray:
        if stored.dtype.kind not in "uib":
            raise InputError(f"{path}: {self.task.name} of dtype {stored.dtype}; labels are integers.")
        labels = stored.astype(np.int64)
        ignored = ignored | (labels == IGNORE_LABEL)
        unknown = labels[~ignored & ((labels < 0) | (labels >= len(self.task.classes)))]
        if unknown.size:
            raise InputError(
                f"{path}: label {int(unknown[0])} of {self.task.name}, which has classes 0 to"
                f" {len(self.task.classes) - 1}; name it under ignore, or add its class."
            )
        return np.where(ignored, IGNORE_LABEL, labels)


def _mask(stored: np.ndarray, ignored: np.ndarray, scale: float | None, path: Source) -> np.ndarray:
    """A mask of zeros and ones, -1 where ignored. Files hold 0 and 1, or 0 and the largest value of their type.

    Raises:
        InputError: The file has other values and there is no scale.
    """
    if scale is not None or stored.dtype.kind == "f":
        values = stored.astype(np.float32) * np.float32(scale or 1)
        return np.where(ignored | ~np.isfinite(values), np.float32(-1), values)
    found = np.unique(stored[~ignored])
    largest = found.max(initial=0)
    if (
        (found != 0).sum() > 1
        or (largest > 1 and largest not in (255, np.iinfo(stored.dtype).max))
        or found.min(initial=0) < 0
    ):
        raise InputError(
            f"{path}: a binary mask with the values {', '.join(map(str, found[:4].tolist()))}; it holds 0 and 1, or 0"
            " and the largest value of its type. Name others under ignore, or give a scale."
        )
    return np.where(ignored, np.float32(-1), (stored > 0).astype(np.float32))


def _unit_normals(stored: np.ndarray, values: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """Unit vectors. Unsigned integers encode -1 to 1, and black means that there is no normal."""
    if stored.dtype.kind == "u":
        values = 2 * values - 1
        ignored = ignored | ~stored.any(-1)
    finite = np.isfinite(values).all(-1)
    values, ignored = np.where(finite[..., None], values, np.float32(0)), ignored | ~finite
    length = np.linalg.norm(values, axis=-1, keepdims=True)
    return np.where(ignored[..., None] | (length < 0.1), np.float32(0), values / np.maximum(length, 1e-6))


def resize_target(task: Task, target: Tensor, size: tuple[int, int]) -> Tensor:
    """A target (..., H, W) in another size.

    Each pixel takes the value of the nearest one, because a mixture of labels, depths or normals is wrong. The images
    of an autoencoder are resized as images are.
    """
    if target.shape[-2:] == size:
        return target
    if task.kind == "autoencoder":
        return resized(target[None], size)[0]
    rows, columns = map(torch.from_numpy, _nearest(target.shape[-2:], size))
    return target[..., rows[:, None], columns]


def _nearest(old: Sequence[int], new: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The rows and the columns of the old size whose centres are nearest to those of the new size."""
    rows, columns = (
        ((np.arange(wanted) + 0.5) * (available / wanted)).astype(np.int64).clip(max=available - 1)
        for available, wanted in zip(old, new, strict=True)
    )
    return rows, columns
