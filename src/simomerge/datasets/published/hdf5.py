"""Slices of HDF5 files, such as MATLAB 7.3 writes, read without the rest of the file."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.core.errors import InputError

_MEND = "pip install 'simomerge[hdf5]'"


@dataclass(frozen=True)
class Frame:
    """One image's slice of an HDF5 file; stands where the path of a file does.

    Args:
        file: the HDF5 file.
        key: its array, the images along the first axis.
        index: which of them.
    """

    file: Path
    key: str
    index: int

    def of(self, key: str) -> Frame:
        """The same image in another array."""
        return replace(self, key=key)

    def read(self) -> np.ndarray:
        """The slice as MATLAB shows it: MATLAB's axes are HDF5's in reverse.

        Raises:
            InputError: the file cannot be read, or has no such array or image.
        """
        arrays = open_hdf5(self.file)
        try:
            return np.ascontiguousarray(arrays[self.key][self.index].T)
        except (KeyError, IndexError, ValueError, OSError) as error:
            raise InputError(f"{self}: cannot be read ({error}); download the file anew.") from error

    def is_file(self) -> bool:
        return self.file.is_file()

    def resolve(self) -> Frame:
        return replace(self, file=self.file.resolve())

    def __str__(self) -> str:
        return f"{self.file}, {self.key} {self.index}"


def open_hdf5(path: Path) -> Any:
    """The file, opened once per process: an HDF5 handle does not survive a fork. Raises InputError."""
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    return _opened(path, path.stat().st_mtime_ns, os.getpid())


@lru_cache(maxsize=4)
def _opened(path: Path, _changed: int, _process: int) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise InputError(f"{path}: reading HDF5 needs h5py: {_MEND}.") from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path}: not a whole HDF5 file ({error}); download it anew.") from error


def read_matlab(path: Path, *keys: str) -> list[np.ndarray]:
    """Flat integer arrays of a small file of MATLAB's older format.

    Raises:
        InputError: no such file, another format, or no such variable.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise InputError(f"{path}: reading MATLAB files needs scipy: {_MEND}.") from error
    try:
        said = loadmat(path)
    except Exception as error:  # of a broken file scipy raises whatever it stumbles over
        raise InputError(f"{path}: not a MATLAB file ({error}); download it anew.") from error
    if lacking := [key for key in keys if key not in said]:
        raise InputError(f"{path}: no variable {lacking[0]!r} in it; another file of this name?")
    return [np.asarray(said[key]).ravel().astype(np.int64) for key in keys]
