"""The layout in which MTAN and Auto-Lambda publish NYUv2 and Cityscapes: a folder per modality, a file per image.

    {train,val}/{image,MODALITY,...}/{0,1,2,...}.npy        or, in Auto-Lambda's Cityscapes, .png and .tif

Source: github.com/lorenmt/mtan and github.com/lorenmt/auto-lambda.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from simomerge.core.errors import InputError
from simomerge.datasets.rows import Row
from simomerge.datasets.stored import Source, read_array

STRETCHES = 20


def held_out(total: int, first: int, of: int) -> np.ndarray:
    """Which images of an ordered list belong to the second of two splits: bool (total,).

    The list is cut into twenty stretches of equal length. The first part of each stretch, ``first`` images out of every
    ``of``, belongs to the first split. Neighbours in the list show one scene, so few scenes are in both splits, and
    both splits have scenes from everywhere in the list. There are no random numbers: the result is always the same.

    Args:
        total: number of images in the list. If it is ``of``, exactly ``first`` are in the first split.
        first, of: the size of the first split and of both splits together in the paper.

    Example:
        >>> int(held_out(654, 400, of=654).sum())
        254
    """
    stretches = max(1, min(STRETCHES, total // STRETCHES))
    ends = [np.arange(stretches + 1) * n // stretches for n in (total, round(total * first / of))]
    held = np.ones(total, bool)
    for start, taken in zip(ends[0], np.diff(ends[1]), strict=False):
        held[start : start + taken] = False
    return held


def share_out(rows: Sequence[Row], first: int, of: int) -> tuple[list[Row], list[Row]]:
    """Divide rows into two splits; arguments as in `held_out`."""
    second = held_out(len(rows), first, of)
    pairs = list(zip(rows, second, strict=True))
    return [row for row, is_second in pairs if not is_second], [row for row, is_second in pairs if is_second]


def splits_of(train: list[Row], val: list[Row], test: list[Row]) -> dict[str, list[Row]]:
    """The splits that have images."""
    return {split: rows for split, rows in (("train", train), ("val", val), ("test", test)) if rows}


def numbered_folder(root: Path) -> bool:
    """Whether a folder has this layout."""
    return (root / "train" / "image").is_dir() or (root / "val" / "image").is_dir()


def numbered_rows(root: Path, part: str, folders: Mapping[str, str], image: str = "image/*.npy") -> list[Row]:
    """The images of ``train`` or ``val`` in the order of their numbers, with the targets whose folders exist.

    Args:
        part: "train" or "val".
        folders: by task, its files, such as ``depth/*.npy``, where * stands for the number.
        image: the image files.

    Raises:
        InputError: the folder has no images.
    """
    images = root / part / image
    found = [path.stem for path in images.parent.glob(images.name) if path.stem.isdecimal()]
    if not found or str(int(found[0])) != found[0]:
        if images.parent.is_dir():
            other = f" (but {found[0]}{images.suffix})" if found else ""
            raise InputError(f"{images.parent}: no 0{images.suffix} in it{other}; images are numbered 0, 1, 2, ...")
        return []
    existing = {task: root / part / files for task, files in folders.items() if (root / part / files).parent.is_dir()}
    # A missing image between others keeps its number, so that the splits do not change. Reading it is an error.
    return [
        Row(_numbered(images, n), {task: _numbered(files, n) for task, files in existing.items()})
        for n in range(max(map(int, found)) + 1)
    ]


def _numbered(files: Path, number: int) -> Path:
    return files.with_name(f"{number}{files.suffix}")


def read_npy_image(path: Source) -> np.ndarray:
    """An image stored as floats in [0, 1] or as bytes, (H, W, 3). Raises InputError."""
    image = read_array(path)
    if image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"{path}: an image of shape {image.shape}; give (H, W, 3).")
    return image


def read_npy_labels(path: Source) -> np.ndarray:
    """Labels (H, W), which this layout may store as floats. Raises InputError."""
    labels = read_array(path)
    if labels.dtype.kind != "f":
        return labels
    rounded = np.rint(labels)
    if not (rounded == labels).all():
        raise InputError(f"{path}: labels that are not integers; another file of this name?")
    return rounded.astype(np.int64)
