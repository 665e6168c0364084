"""Pictures in tar files, as WebDataset writes them: read one by one, without unpacking.

Only the place of each picture is kept in memory, 16 bytes for each, so that a million of them are no problem. Python's
tarfile finds the places; WebDataset's own reader has no access by number.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.core.errors import InputError

SUFFIX = ".tar"


class TarPictures(Sequence[Any]):
    """The pictures in tar files, in the order of the files and within them, as PIL images.

    Args:
        files: The tar files.
        suffixes: Of the members that are pictures. Others, such as WebDataset's ``.json`` and ``.cls``, are left out.

    Raises:
        InputError: A file is no tar file, or is truncated; or there is no picture in any.

    Example:
        >>> TarPictures([Path("shards/00000.tar")], (".jpg",))[0].size                             # doctest: +SKIP
        (640, 480)
    """

    def __init__(self, files: Sequence[Path], suffixes: Sequence[str]) -> None:
        self.files = list(files)
        found = [_places(file, tuple(suffixes)) for file in self.files]
        self._places = np.concatenate(found) if found else np.zeros((0, 2), np.int64)
        self._ends = np.cumsum([len(each) for each in found])
        if not len(self._places):
            raise InputError(f"{self.files[0].parent}: no picture in its tar files (looked for {', '.join(suffixes)}).")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        from PIL import Image

        start, size = (int(number) for number in self._places[index])
        with self.file(index).open("rb") as handle:
            handle.seek(start)
            content = handle.read(size)
        try:
            return Image.open(io.BytesIO(content))
        except OSError as error:  # UnidentifiedImageError too
            raise InputError(f"{self.name(index)}: cannot be read as an image ({error}).") from error

    def file(self, index: int) -> Path:
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
        lines = [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in self.files]
        used = hashlib.sha256(np.asarray(positions, np.int64).tobytes()).hexdigest()
        return hashlib.sha256("\n".join([*lines, used]).encode()).hexdigest()


def _places(file: Path, suffixes: tuple[str, ...]) -> np.ndarray:
    """Start and size of every picture in a tar file, int64 (N, 2)."""
    found = []
    try:
        with tarfile.open(file, "r:") as opened:
            for member in opened:
                opened.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them
                if member.isfile() and member.name.lower().endswith(suffixes):
                    found.append((member.offset_data, member.size))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{file}: cannot be read as an uncompressed tar file ({error}); write it again.") from error
    if found and sum(found[-1]) > file.stat().st_size:
        raise InputError(f"{file}: is truncated; copy it again.")
    return np.array(found, np.int64).reshape(-1, 2)
