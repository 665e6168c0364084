"""Whether a file looks whole, from its first and last bytes: thousands are looked at in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np

_ENDS = {b"\x89PNG\r\n\x1a\n": b"IEND\xaeB`\x82", b"\xff\xd8": b"\xff\xd9"}
"""How PNG and JPEG files begin and end."""

_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"GIF8", b"BM", b"RIFF", b"P5", b"P6")


def looks_whole(file: Path) -> bool:
    """Whether an NPY file or a picture seems to be one, and not to have been cut off.

    A few whole ones do not look it, such as PNGs with much behind their end: read those to know.

    Raises:
        OSError: the file cannot be opened.
    """
    size = file.stat().st_size
    if file.suffix.lower() == ".npy":
        return _npy_needs(file) <= size
    with file.open("rb") as handle:
        start = handle.read(8)
        handle.seek(max(0, size - 64))
        for kind, end in _ENDS.items():
            if start.startswith(kind):
                return end in handle.read()
        return start.startswith(_STARTS)


def _npy_needs(file: Path) -> float:
    """How many bytes the header promises; without end where there is no header."""
    try:
        with file.open("rb") as handle:
            version = np.lib.format.read_magic(handle)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(handle)
            return handle.tell() + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    except (ValueError, EOFError):
        return float("inf")
