"""Whether a file was cut off or overwritten, from its first and last bytes: thousands are looked at in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np

_STARTS = {
    ".png": (b"\x89PNG\r\n\x1a\n",),
    ".jpg": (b"\xff\xd8",),
    ".jpeg": (b"\xff\xd8",),
    ".tif": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    ".tiff": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
}
_PNG_END = b"IEND\xaeB`\x82"


def damage(file: Path) -> str:
    """What is wrong with an NPY, PNG, JPEG or TIFF file, in words; empty where nothing can be seen from its ends.

    Raises:
        OSError: the file cannot be opened.
    """
    kind, size = file.suffix.lower(), file.stat().st_size
    if not size:
        return "an empty file"
    if kind == ".npy":
        return _npy_damage(file, size)
    with file.open("rb") as handle:
        starts = _STARTS.get(kind, ())
        if starts and not handle.read(8).startswith(starts):
            return f"not a {kind[1:].upper()} file"
        if kind == ".png":
            handle.seek(max(0, size - 64))  # some writers leave a few bytes behind the end
            if _PNG_END not in handle.read():
                return "a PNG file that was cut off"
    return ""


def _npy_damage(file: Path, size: int) -> str:
    try:
        with file.open("rb") as handle:
            version = np.lib.format.read_magic(handle)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(handle)
            needed = handle.tell() + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    except (ValueError, EOFError) as error:
        return f"not an NPY file ({error})"
    return f"an NPY file that was cut off: {size:,} of {needed:,} bytes" if size < needed else ""
