"""Arrays of numbers in files of MATLAB's older format (version 5), such as the splits of NYUv2.

scipy's reader of this format ends the process for some damaged files, so this small one reads what is needed: named
arrays of real numbers, compressed or not. Source: "MAT-File Format" (MathWorks), chapter 1.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from simomerge.core.errors import InputError
from simomerge.core.regular import check_regular

_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MATRIX, _COMPRESSED = 14, 15
_LARGEST = 64_000_000
"""Bytes of a file, and of a compressed array. The files that are read here have kilobytes."""


def read_matlab(path: Path, *keys: str) -> list[np.ndarray]:
    """Variables of a small file in MATLAB's older format, as flat integer arrays.

    Raises:
        InputError: the file is missing, has another format, or does not have a variable.
    """
    check_regular(path, "give a MATLAB file.")
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    if path.stat().st_size > _LARGEST:
        raise InputError(f"{path}: larger than {_LARGEST // 10**6} MB; another file of this name?")
    content = path.read_bytes()
    try:
        order = {b"IM": "<", b"MI": ">"}[content[126:128]]
        variables = dict(_variables(content[128:], order, keys))
    except Exception as error:  # any of many kinds, for a damaged file
        reason = f"not a MATLAB file of version 5 ({error}), or a damaged one"
        raise InputError(f"{path}: {reason}; download it again.") from error
    if missing := [key for key in keys if key not in variables]:
        raise InputError(f"{path}: no variable {missing[0]!r} in it; another file of this name?")
    return [variables[key] for key in keys]


def _elements(content: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """The type and content of each element. Those of at most four bytes share eight bytes with their tag."""
    place = 0
    while place < len(content):
        kind, size = struct.unpack_from(f"{order}II", content, place)
        small = kind >> 16
        if small:
            kind, size = kind & 0xFFFF, small
        start = place + (4 if small else 8)
        if start + size > len(content) or (small and size > 4):
            raise ValueError("an element ends after the file")
        yield kind, content[start : start + size]
        padding = 0 if kind == _COMPRESSED else -size % 8
        place = place + 8 if small else start + size + padding


def _variables(content: bytes, order: str, keys: tuple[str, ...]) -> Iterator[tuple[str, np.ndarray]]:
    for kind, element in _elements(content, order):
        if kind == _COMPRESSED:
            unpacker = zlib.decompressobj()
            unpacked = unpacker.decompress(element, _LARGEST)
            yield from _variables(unpacked, order, keys)
        elif kind == _MATRIX:
            parts = _elements(element, order)
            _flags, (_, shape), (_, name) = next(parts), next(parts), next(parts)
            if name.decode("latin-1") in keys:
                code, values = next(parts)
                array = np.frombuffer(values, f"{order}{_NUMBERS[code]}")
                if array.size != math.prod(np.frombuffer(shape, f"{order}i4").tolist()):
                    raise ValueError("an array has another size than its values")
                if not np.isfinite(array).all() or (np.abs(array.astype(np.float64)) > 2**53).any():
                    raise ValueError("an array holds numbers that are no integers")
                yield name.decode("latin-1"), array.astype(np.int64)
