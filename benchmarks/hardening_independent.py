"""What other libraries read in the files that `hardening.py` damages: safetensors, numpy, csv and Pillow.

A damaged file that a reader of simomerge accepts must hold for it what it holds for them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from safetensors import safe_open

from simomerge.checkpoints import open_checkpoint
from simomerge.core.images import read_image
from simomerge.datasets.stored import read_array
from simomerge.datasets.tables import read_table


class WrongAccept(Exception):
    """A reader accepted a file that another library refuses, or in which it finds other values."""


def compared(
    read: Callable[[Path], Any], ours: Callable[[Path], Any], theirs: Callable[[Path], Any]
) -> Callable[[Path], Any]:
    """A reader that then also compares what we and another library find in the file."""

    def both(file: Path) -> None:
        read(file)
        found = ours(file)
        try:
            expected = theirs(file)
        except Exception as error:  # any library's own
            raise WrongAccept(f"refused elsewhere: {error}") from error
        if not _same(found, expected):
            raise WrongAccept(f"{found} instead of {expected}")

    return both


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, list):  # of the tables that a file may stand for
        return ours in theirs
    if isinstance(theirs, Mapping):
        return ours.keys() == theirs.keys() and all(_same(ours[name], theirs[name]) for name in theirs)
    return bool(ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes())


def _tensors(file: Path) -> dict[str, np.ndarray]:
    with safe_open(file, framework="numpy") as content:
        return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - it is no mapping


def _shards(index: Path) -> dict[str, np.ndarray]:
    places = json.loads(index.read_text())["weight_map"]
    return {name: _tensors(index.with_name(shard))[name] for name, shard in places.items()}


def _tables(file: Path) -> list[list[dict[str, str]]]:
    """The table with each of three separators."""
    found = []
    for separator in ",;\t":
        with file.open(encoding="utf-8-sig", newline="") as content:
            lines = [list(map(str.strip, line)) for line in csv.reader(content, delimiter=separator)]
        names, *rows = [line for line in lines if any(line)]
        found.append([{name: value for name, value in zip(names, row, strict=False) if name} for row in rows])
    return found


def _picture(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


PAIRS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "a.safetensors": (lambda file: dict(open_checkpoint(file).items()), _tensors),
    "shards/model.safetensors.index.json": (lambda file: dict(open_checkpoint(file.parent).items()), _shards),
    "manifest.csv": (lambda file: read_table(file, "image"), _tables),
    "d.npy": (read_array, lambda file: np.load(file, allow_pickle=False)),
    "i.png": (read_image, _picture),
}
"""By file: our reader, and that of another library."""
