"""Pictures in tar files, as WebDataset writes them: read one by one, without unpacking, on a disk or at a URL.

Only the place of each picture is kept in memory, 16 bytes for each, so that a million of them are no problem. Python's
tarfile finds the places; WebDataset's own reader has no access by number. The places in files at a URL are kept in the
cache folder, because finding them reads the whole file.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from simomerge.core.errors import InputError
from simomerge.core.files import atomic_file, cache_folder
from simomerge.core.kept import kept_array
from simomerge.core.progress import progress
from simomerge.core.regular import check_regular
from simomerge.core.remote import RemoteFile, last_name

SUFFIX = ".tar"
_DAMAGED = (tarfile.TarError, EOFError)


class TarPictures(Sequence[Any]):
    """The pictures in tar files, in the order of the files and within them, as PIL images.

    Args:
        files: The tar files, or those at URLs.
        suffixes: Of the members that are pictures. Others, such as WebDataset's ``.json`` and ``.cls``, are left out.

    Raises:
        InputError: A file is no tar file, or is truncated; or there is no picture in any.

    Example:
        >>> TarPictures([Path("shards/00000.tar")], (".jpg",))[0].size                             # doctest: +SKIP
        (640, 480)
    """

    def __init__(self, files: Sequence[Path] | Sequence[RemoteFile], suffixes: Sequence[str]) -> None:
        self.files = [_LocalFile(file) if isinstance(file, Path) else file for file in files]
        found = [_kept_places(file, tuple(suffixes)) for file in self.files]
        self._places = np.concatenate(found) if found else np.zeros((0, 2), np.int64)
        self._ends = np.cumsum([len(each) for each in found])
        if not len(self._places):
            raise InputError(f"{self.files[0]}: no picture in the tar files (looked for {', '.join(suffixes)}).")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        from PIL import Image

        start, size = (int(number) for number in self._places[index])
        content = self.file(index).read(start, size)
        try:
            image = Image.open(io.BytesIO(content))
            image.load()  # here, where a damaged picture can be named
            return image
        except Exception as error:  # Pillow raises many kinds of errors for damaged files
            raise InputError(f"{self.name(index)}: cannot be read as an image ({error}).") from error

    def file(self, index: int) -> _LocalFile | RemoteFile:
        """The tar file of a picture."""
        return self.files[int(np.searchsorted(self._ends, index, side="right"))]

    def name(self, index: int) -> str:
        """How messages refer to a picture."""
        file = int(np.searchsorted(self._ends, index, side="right"))
        return f"{self.files[file]}, picture {index - (int(self._ends[file - 1]) if file else 0) + 1}"

    def group(self, index: int) -> str:
        """The tar file of a picture, as a name."""
        return str(self.file(index))

    def fingerprint(self, positions: Sequence[int]) -> str:
        """sha256 of the tar files' names, sizes and dates, and of which pictures are used."""
        names = [file.path.name if isinstance(file, _LocalFile) else last_name(file.url) for file in self.files]
        lines = [f"{name} {file.size} {file.version}" for name, file in zip(names, self.files, strict=True)]
        used = hashlib.sha256(np.asarray(positions, np.int64).tobytes()).hexdigest()
        return hashlib.sha256("\n".join([*lines, used]).encode()).hexdigest()


@dataclass(frozen=True)
class _LocalFile:
    """A file on a disk, with what `RemoteFile` has."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def version(self) -> str:
        return str(self.path.stat().st_mtime_ns)

    def open(self, passing: tuple[type[Exception], ...] = ()) -> BinaryIO:
        check_regular(self.path, "give a tar file.")
        return self.path.open("rb")

    def read(self, start: int, size: int) -> bytes:
        with self.open() as handle:
            handle.seek(start)
            return handle.read(size)


def _kept_places(file: _LocalFile | RemoteFile, suffixes: tuple[str, ...]) -> np.ndarray:
    """`_places`, kept in the cache folder if the file is at a URL."""
    if isinstance(file, _LocalFile):
        return _places(file, suffixes)
    key = hashlib.sha256(f"{file} {file.size} {file.version} {suffixes}".encode()).hexdigest()[:24]
    kept = cache_folder() / "tars" / f"{key}.npy"
    with suppress(InputError):
        return kept_array(kept, "it is made again.", np.int64, (None, 2))
    progress("tar files", 0, 1, f"looking through {file}")
    found = _places(file, suffixes)
    with atomic_file(kept, durable=False) as handle:
        np.save(handle, found)
    return found


def _places(file: _LocalFile | RemoteFile, suffixes: tuple[str, ...]) -> np.ndarray:
    """Start and size of every picture in a tar file, int64 (N, 2)."""
    found = []
    try:
        with file.open(_DAMAGED) as stream, tarfile.open(fileobj=stream, mode="r:") as opened:
            for member in opened:
                opened.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them
                if member.isfile() and member.name.lower().endswith(suffixes):
                    found.append((member.offset_data, member.size))
    except InputError:
        raise
    except (OSError, *_DAMAGED) as error:
        raise InputError(f"{file}: cannot be read as an uncompressed tar file ({error}); write it again.") from error
    if found and file.size is not None and sum(found[-1]) > file.size:
        raise InputError(f"{file}: is truncated; copy it again.")
    return np.array(found, np.int64).reshape(-1, 2)
