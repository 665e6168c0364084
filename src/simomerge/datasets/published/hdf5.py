"""Slices of HDF5 files, such as MATLAB 7.3 writes, read without the rest of the file."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.core.environment import install_command
from simomerge.core.errors import InputError
from simomerge.core.pixels import MAX_PIXELS
from simomerge.core.regular import check_regular

_LARGEST = 8 * MAX_PIXELS
"""Bytes of an image, and of a chunk of HDF5."""


@dataclass(frozen=True)
class Frame:
    """One image's slice of an HDF5 file; used like the path of a file.

    Args:
        file: the HDF5 file.
        key: an array in it, with the images along the first axis.
        index: the image.
    """

    file: Path
    key: str
    index: int

    def of(self, key: str) -> Frame:
        """The same image in another array."""
        return replace(self, key=key)

    def read(self) -> np.ndarray:
        """The slice as MATLAB shows it; MATLAB's order of the axes is the reverse of HDF5's.

        Raises:
            InputError: the file cannot be read, or has no such array or image.
        """
        arrays = open_hdf5(self.file)
        try:
            array = arrays[self.key]
            _check(array)
            return np.ascontiguousarray(array[self.index].T)
        except Exception as error:  # h5py raises many kinds of errors for damaged files
            raise InputError(f"{self}: cannot be read ({error}); download the file again.") from error

    def is_file(self) -> bool:
        return self.file.is_file()

    def resolve(self) -> Frame:
        return replace(self, file=self.file.resolve())

    def __str__(self) -> str:
        return f"{self.file}, {self.key} {self.index}"


def open_hdf5(path: Path) -> Any:
    """The file, opened once per process, because an HDF5 handle does not survive a fork. Raises InputError."""
    check_regular(path, "give an HDF5 file.")
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    return _opened(path, path.stat().st_mtime_ns, os.getpid())


def count_images(path: Path, key: str, name: str) -> int:
    """The length of an array of a file; ``name`` is that of the file to give. Raises InputError."""
    arrays = open_hdf5(path)
    try:
        return int(arrays[key].shape[0])
    except Exception as error:  # h5py raises many kinds of errors for damaged files
        raise InputError(f"{path}: no array {key!r} in it; give the labelled dataset, {name}.") from error


def _check(array: Any) -> None:
    """Raise ValueError if an array is no stack of images, or reading one image would take much memory."""
    if not math.prod(array.shape[1:]) or array.dtype.kind not in "buif":
        raise ValueError(f"{array.dtype} of shape {array.shape} is no stack of images")
    # HDF5 stores arrays in chunks, which it reads and unpacks whole: few bytes in a file can be many in memory.
    size = max(math.prod(array.shape[1:]), math.prod(array.chunks or ())) * array.dtype.itemsize
    if size > _LARGEST:
        raise ValueError(
            f"{array.dtype} of shape {array.shape} in chunks of {array.chunks}: an image takes {size:,} bytes, more"
            f" than {_LARGEST:,}"
        )


@lru_cache(maxsize=4)
def _opened(path: Path, _changed: int, _process: int) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise InputError(f"{path}: reading HDF5 needs h5py: {install_command('hdf5')}.") from error
    try:
        return h5py.File(path, "r")
    except Exception as error:  # h5py raises many kinds of errors for damaged files
        raise InputError(f"{path}: not a complete HDF5 file ({error}); download it again.") from error
