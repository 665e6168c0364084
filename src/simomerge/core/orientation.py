"""The EXIF orientation of pictures: cameras store the pixels lying, with a tag that says how to turn them upright."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.core.regular import check_regular

_TAG = 0x0112
_LATE = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
"""Chunks of a PNG file that can hold the tag."""


def orientation(path: Path) -> int | None:
    """The EXIF orientation of a picture, from 1 (upright) to 8; None if it has no such tag, or is no picture.

    Source: the tag Orientation (274) in section 4.6.4 of the Exif standard (CIPA DC-008).
    """
    if path.suffix.lower() == ".npy":
        return None
    try:
        check_regular(path, "give a picture.")
        return _orientation(path, path.stat().st_mtime_ns)
    except Exception:  # missing, damaged, or no picture: reading it says so
        return None


@lru_cache(maxsize=4096)
def _orientation(path: Path, date: int) -> int | None:
    from PIL import Image

    with Image.open(path) as image:
        late = image.format != "PNG" or _has_late_text(path)
        # Pillow decodes a PNG file to find a tag behind its pixels. Most files have nothing there.
        found = image.getexif() if late else Image.Image.getexif(image)
        tag = found.get(_TAG)
    return tag if tag in range(1, 9) else None


def _has_late_text(path: Path) -> bool:
    """Whether a PNG file has EXIF tags or text after its pixels."""
    with path.open("rb") as file:
        file.seek(8)
        pixels = False
        while len(head := file.read(8)) == 8:
            pixels = pixels or head[4:] == b"IDAT"
            if pixels and head[4:] in _LATE:
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, 1)
    return False


def turned(array: np.ndarray, tag: Any) -> np.ndarray:
    """An array (H, W, ...) as stored, turned upright; a view. The tag 1, None and unknown ones change nothing.

    Example:
        >>> turned(np.array([[1, 2], [3, 4]]), 6).tolist()
        [[3, 1], [4, 2]]
    """
    if tag in (5, 6, 7, 8):  # the rows of the stored picture are columns of the upright one
        array = array.swapaxes(0, 1)
    rows, columns = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}.get(tag, (1, 1))
    return array[::rows, ::columns]
