"""What a browser sends is read here, within limits, and nothing else of it is used."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from simomerge.core.errors import InputError
from simomerge.core.images import read_image, to_tensor

MAX_BYTES = 20_000_000
"""Larger files are refused, by the server while they arrive and again here."""

MAX_PICTURES = 64
"""A fold uses at most this number of pictures."""

SHOWN_SIDE = 640
"""The longest side of a photo in the page, in pixels; larger photos are reduced to it when they arrive."""

KEPT = 2 * MAX_PICTURES
"""Decoded pictures that are kept; each takes at most 1.2 MB."""

_STARTS = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG"}
"""The first bytes of the formats that are read, with WebP. Pillow would also run other programs for some formats."""


def read_photo(path: str | Path, name: str = "") -> np.ndarray:
    """An uploaded photo as uint8 RGB (H, W, 3), its longest side at most `SHOWN_SIDE` pixels.

    The last `KEPT` photos are kept, so that a file is not decoded again while it stays the same. Do not change the
    array.

    Args:
        path: Where the server has stored it.
        name: What the user calls it, for messages; the name of the file by default.

    Raises:
        InputError: The file is too large, has too many pixels, is not a JPEG, PNG or WebP picture, or is gone.
    """
    path, name = Path(path), shown_name(name or Path(path).name)
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"{name} is no longer on the server; give it again.") from error
    if found.st_size > MAX_BYTES:
        size = f"{found.st_size / 1e6:.0f} MB"
        raise InputError(f"{name} has {size}; give a picture of at most {MAX_BYTES // 1_000_000} MB.")
    return _decoded(path, name, found.st_mtime_ns, found.st_size)


@lru_cache(KEPT)
def _decoded(path: Path, name: str, modified: int, size: int) -> np.ndarray:
    """`read_photo` for a file that was modified at some time (in nanoseconds) and has some size (in bytes)."""
    if not _format(path):
        raise InputError(f"{name} is not a JPEG, PNG or WebP picture; convert it first.")
    try:
        image = read_image(path, (SHOWN_SIDE, SHOWN_SIDE))
    except InputError as error:  # without the server's path
        raise InputError(str(error).replace(str(path), name)) from error
    scale = SHOWN_SIDE / max(image.shape[:2])
    if scale >= 1:
        return image
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    small = to_tensor(image, (height, width))[0]
    return (small * 255).round().byte().permute(1, 2, 0).numpy()


def read_pictures(paths: Sequence[str | Path]) -> list[np.ndarray]:
    """Uploaded pictures for a fold, each as `read_photo` reads it.

    Raises:
        InputError: There are more than `MAX_PICTURES`, or one cannot be read.
    """
    if len(paths) > MAX_PICTURES:
        raise InputError(f"{len(paths)} pictures; give at most {MAX_PICTURES}, of different scenes.")
    return [read_photo(path) for path in paths]


def shown_name(name: str) -> str:
    """A file's name for messages: its last part, shortened.

    Example:
        >>> shown_name("../../etc/passwd"), len(shown_name("a" * 300 + ".png"))
        ('passwd', 60)
    """
    last = name.replace("\\", "/").rpartition("/")[2] or "the file"
    return last if len(last) <= 60 else f"{last[:40]}...{last[-17:]}"


def _format(path: Path) -> str:
    with path.open("rb") as handle:
        start = handle.read(12)
    if start[:4] == b"RIFF" and start[8:] == b"WEBP":
        return "WebP"
    return next((name for first, name in _STARTS.items() if start.startswith(first)), "")
