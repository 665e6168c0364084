"""Values in weight files, which are read piece by piece and may change or shrink meanwhile."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from simomerge.core.errors import InputError

_MOST_MAPPED = 16
"""Files that are mapped into memory. Each keeps a descriptor, of which a system may allow a process only few."""
_RUN = 1 << 15
"""Values that are read at once to give a sample of them."""


class WeightFile:
    """A file whose tensors are read from any thread: mapped into memory, or, after the first ones, read by pieces.

    Where a mapped file becomes shorter, the system ends the process; `simomerge.core.files.explain_lost_pages` lets it
    say why. Pieces that are missing raise InputError.
    """

    _mapped = 0
    _lock = Lock()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = _state(path)
        self._content: np.ndarray | None = None
        if WeightFile._mapped < _MOST_MAPPED and self._state[2]:
            WeightFile._mapped += 1
            self._content = np.memmap(path, dtype=np.uint8, mode="r")

    def __del__(self) -> None:
        if getattr(self, "_content", None) is not None:
            WeightFile._mapped -= 1

    def array(self, start: int, dtype: str, size: int) -> Any:
        """A flat array of the file from byte ``start`` on; slices of it are numpy arrays."""
        if self._content is None:
            return Pieces(self.path, start, np.dtype(dtype), size)
        end = start + size * np.dtype(dtype).itemsize
        return np.asarray(self._content[start:end]).view(dtype)

    def check_unchanged(self) -> None:
        """Raise InputError if the file is not what it was when it was opened."""
        if _state(self.path) != self._state:
            raise InputError(f"{self.path} changed while it was read: repeat this when nobody writes it.")


class Pieces:
    """One flat tensor of a file, which is opened for every slice that is read."""

    def __init__(self, path: Path, start: int, dtype: np.dtype[Any], size: int) -> None:
        self._path, self._start, self._dtype, self._size = path, start, dtype, size

    def __getitem__(self, part: slice) -> np.ndarray:
        begin, end, step = part.indices(self._size)
        if step == 1:
            return self._read(begin, max(end - begin, 0))
        places, run = range(begin, end, step), max(_RUN // step, 1)
        runs = [places[at : at + run] for at in range(0, len(places), run)]
        thinned = [self._read(run[0], run[-1] - run[0] + 1)[::step].copy() for run in runs]
        return np.concatenate(thinned) if thinned else np.empty(0, self._dtype)

    def _read(self, begin: int, count: int) -> np.ndarray:
        try:
            read = np.fromfile(self._path, self._dtype, count, offset=self._start + begin * self._dtype.itemsize)
        except OSError as error:
            raise InputError(f"{self._path}: cannot be read ({error.strerror}).") from error
        if len(read) < count:
            raise InputError(f"{self._path} became shorter while it was read: repeat this when it is complete.")
        return read


def _state(path: Path) -> tuple[int, int, int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
