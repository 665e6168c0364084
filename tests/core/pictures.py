"""A PNG writer for kinds that Pillow cannot write: written from the standard (ISO/IEC 15948), without filters."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
"""The colour types of PNG files."""
PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row, first column, step of rows and step of columns of the seven passes of an interlaced file."""


def write_png(
    path: Path,
    values: np.ndarray,
    bits: int,
    colour: int,
    palette: np.ndarray | None = None,
    interlaced: bool = False,
    late: tuple[bytes, bytes] | None = None,
) -> Path:
    """Write values (H, W) or (H, W, C); ``late`` is the name and the content of a chunk behind the pixels."""
    passes = [values[r::dr, c::dc] for r, c, dr, dc in PASSES] if interlaced else [values]
    lines = b"".join(line for part in passes for line in _lines(part, bits))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour, 0, 0, int(interlaced))
    chunks = [(b"IHDR", header)]
    chunks += [(b"PLTE", palette.astype(np.uint8).tobytes())] if palette is not None else []
    chunks += [(b"IDAT", zlib.compress(lines))] + ([late] if late else []) + [(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks))
    return path


def _lines(values: np.ndarray, bits: int) -> Iterator[bytes]:
    if not values.size:
        return
    for row in values.reshape(values.shape[0], -1):
        if bits >= 8:
            packed = row.astype(f">u{bits // 8}").tobytes()
        else:
            text = "".join(format(int(value), f"0{bits}b") for value in row)
            text += "0" * (-len(text) % 8)
            packed = bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))
        yield b"\0" + packed


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def upright(array: np.ndarray, tag: int) -> np.ndarray:
    """An array as stored, turned by an EXIF orientation: pixel by pixel, from the table of the Exif standard.

    The table says at which side of the upright picture the first row and the first column of the stored one are.
    """
    sides = {1: "TL", 2: "TR", 3: "BR", 4: "BL", 5: "LT", 6: "RT", 7: "RB", 8: "LB"}[tag]
    height, width = array.shape[:2]
    swapped = sides[0] in "LR"
    turned = np.empty((width, height, *array.shape[2:]) if swapped else array.shape, array.dtype)
    for row in range(height):
        for column in range(width):
            place = {"T": row, "B": height - 1 - row, "L": row, "R": height - 1 - row}[sides[0]]
            other = {"T": column, "B": width - 1 - column, "L": column, "R": width - 1 - column}[sides[1]]
            turned[(other, place) if swapped else (place, other)] = array[row, column]
    return turned
