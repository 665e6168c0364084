"""The layout of MTAN and Auto-Lambda, of NYUv2 and Cityscapes: a folder per modality, a file per image.

    {train,val}/{image,MODALITY,...}/{0,1,2,...}.npy        or, in Auto-Lambda's Cityscapes, .png and .tif

Source: github.com/lorenmt/mtan and github.com/lorenmt/auto-lambda, which publish the datasets in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from simomerge.core.errors import InputError
from simomerge.datasets.rows import Row, Source, read_array

STRETCHES = 20


def held_out(total: int, first: int, of: int) -> np.ndarray:
    """Which images of an ordered list are the second of two splits: bool (total,).

    The list is cut into twenty stretches of equal length, and of each the first part, ``first`` of ``of``, is one split
    and the rest the other. Neighbours in the list show one scene, so few scenes are in both splits, and both splits
    have scenes from everywhere in the list. No random numbers: the same anywhere, for ever.

    Args:
        total: images in the list. Where it is ``of``, exactly ``first`` are in the first split.
        first, of: the sizes of the paper.

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


def numbered_folder(root: Path) -> bool:
    """Whether a folder has this layout."""
    return (root / "train" / "image").is_dir() or (root / "val" / "image").is_dir()


def numbered_rows(root: Path, part: str, folders: Mapping[str, str], image: str = "image/*.npy") -> list[Row]:
    """The images of ``train`` or ``val`` in the order of their numbers, with the targets whose folders are there.

    Args:
        folders: task -> its files, such as ``depth/*.npy``, where * stands for the number. The split of the rows is
            ``part``.
        image: the images' files.

    Raises:
        InputError: a folder without images.
    """
    images = root / part / image
    found = [path.stem for path in images.parent.glob(images.name) if path.stem.isdecimal()]
    if not found or str(int(found[0])) != found[0]:
        if images.parent.is_dir():
            seen = f" (but {found[0]}{images.suffix})" if found else ""
            raise InputError(f"{images.parent}: no 0{images.suffix} in it{seen}; images are numbered 0, 1, 2, ...")
        return []
    there = {task: root / part / files for task, files in folders.items() if (root / part / files).parent.is_dir()}
    # One that is missing in between is an image all the same: reading it says so, and the splits stay as they are.
    return [
        Row(_numbered(images, n), part, {task: _numbered(files, n) for task, files in there.items()})
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
    if labels.dtype.kind == "f":
        whole = np.rint(labels)
        if not (whole == labels).all():
            raise InputError(f"{path}: labels that are no whole numbers; another file of this name?")
        return whole.astype(np.int64)
    return labels
