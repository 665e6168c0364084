"""NYU Depth V2: indoor scenes with 13 classes, depth in metres and surface normals. docs/data.md.

Sources: Silberman et al., "Indoor Segmentation and Support Inference from RGBD Images" (ECCV 2012), the dataset, its
split and its toolbox; Gupta et al. (CVPR 2013), its 40 classes; Couprie et al. (2013), the 13 classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.core.errors import InputError
from simomerge.datasets.published.geometry import Camera, normals_from_depth
from simomerge.datasets.published.hdf5 import Frame, open_hdf5, read_matlab
from simomerge.datasets.published.numbered import (
    held_out,
    numbered_folder,
    numbered_rows,
    read_npy_image,
    read_npy_labels,
)
from simomerge.datasets.rows import Manifest, Row, Rows, Stored, read_array
from simomerge.datasets.tasks import IGNORE_LABEL, Task

SIZE = (280, 378)
"""Height and width in the paper: the multiples of DINOv2's patch next below the stored 288 x 384."""
VAL, HELD_OUT = 400, 654
"""Of the 654 images that the official split keeps for testing, the paper validates on 400 and tests on 254."""
CLASSES = (
    "bed",
    "books",
    "ceiling",
    "chair",
    "floor",
    "furniture",
    "objects",
    "picture",
    "sofa",
    "table",
    "tv",
    "wall",
    "window",
)
FROM_40 = (
    *(12, 5, 6, 1, 4, 9, 10, 12, 13, 6, 8, 6, 13, 10, 6, 13, 6, 7, 7, 5),
    *(7, 3, 2, 6, 11, 7, 7, 7, 7, 7, 7, 6, 7, 7, 7, 7, 7, 7, 6, 7),
)
"""The class, counted from 1, of each of the 40. Source: class13Mapping.mat of github.com/ankurhanda/nyuv2-meta-data."""
CAMERA = Camera(fx=518.85790117450188, fy=519.46961112127485, cx=325.58244941119034 - 1, cy=253.73616633400465 - 1)
"""Of the colour images 640 x 480, onto which depth is projected. Source: camera_params.m of the dataset's toolbox,
whose pixels are counted from 1."""

LABELED = "nyu_depth_v2_labeled.mat"
SPLITS = "splits.mat"
MAPPING = "classMapping40.mat"

_FOLDERS = {"segmentation": "label/*.npy", "depth": "depth/*.npy", "normals": "normal/*.npy"}


class NYUv2(Rows):
    """One split of NYUv2, of the preprocessed NPY files or of the labelled MATLAB file.

    Args:
        root: the folder of ``train/`` and ``val/``, or of ``nyu_depth_v2_labeled.mat`` with ``splits.mat`` and
            ``classMapping40.mat`` beside it.
        split: "train" (795 images), "val" (400) or "test" (254).
        count: so many images, evenly over the split, or all where fewer are there.
        size: (height, width) to make images and targets.

    Raises:
        InputError: another folder, a file that is missing or cannot be read, or no such split.

    Example:
        >>> NYUv2("/data/nyuv2", "train")[0]["normals"].shape                                        # doctest: +SKIP
        torch.Size([3, 280, 378])
    """

    def __init__(
        self, root: str | Path, split: str = "test", count: int | None = None, size: tuple[int, int] = SIZE
    ) -> None:
        super().__init__(nyuv2_manifest(root, size), split, count)


def nyuv2_manifest(root: str | Path, size: tuple[int, int] = SIZE) -> Manifest:
    """All of the dataset in either layout, as `NYUv2` says."""
    root = Path(root)
    labelled = root if root.suffix == ".mat" else root / LABELED
    if numbered_folder(root):
        return _npy(root, size)
    if labelled.is_file():
        return _labelled(labelled, size)
    if root.suffix == ".mat":
        raise InputError(f"{root}: no such file; give {LABELED}, or the folder that it is in.")
    raise InputError(f"{root}: NYUv2 is not here: neither the folder train/image nor the file {LABELED} is in it.")


def _manifest(
    path: Path, size: tuple[int, int], rows: list[Row], stored: list[Stored], image: Callable[[Any], np.ndarray]
) -> Manifest:
    """With the held-out images, in rows of the split "val", shared out to validation and test."""
    last = [row for row in rows if row.split == "val"]
    tested = held_out(len(last), VAL, of=HELD_OUT)
    shared = [replace(row, split="test") if test else row for row, test in zip(last, tested, strict=True)]
    ordered = (*(row for row in rows if row.split == "train"), *shared)
    return Manifest(path, {of.task.name: of for of in stored}, ordered, size, image)


def _segmentation() -> Task:
    return Task("segmentation", classes=CLASSES)


def _npy(root: Path, size: tuple[int, int]) -> Manifest:
    rows = [row for part in ("train", "val") for row in numbered_rows(root, part, _FOLDERS)]
    stored = [Stored(_segmentation(), array=read_npy_labels), Stored(Task("depth")), Stored(Task("normals"))]
    return _manifest(root, size, rows, stored, read_npy_image)


def _labelled(path: Path, size: tuple[int, int]) -> Manifest:
    arrays = open_hdf5(path)
    for key in ("images", "depths", "labels"):
        if key not in arrays:
            raise InputError(f"{path}: no array {key!r} in it; give the labelled dataset, {LABELED}.")
    count = len(arrays["images"])
    train, held = read_matlab(path.with_name(SPLITS), "trainNdxs", "testNdxs")
    if min(train.min(initial=1), held.min(initial=1)) < 1 or max(train.max(initial=1), held.max(initial=1)) > count:
        raise InputError(f"{path.with_name(SPLITS)}: its images are not from 1 to the {count} of {path.name}.")
    rows = [_row(path, int(n) - 1, part) for part, chosen in (("train", train), ("val", held)) for n in chosen]
    table = _table(path.with_name(MAPPING))
    stored = [
        Stored(_segmentation(), array=partial(_read_labels, table)),
        Stored(Task("depth")),
        Stored(Task("normals"), array=_read_normals),
    ]
    return _manifest(path, size, rows, stored, read_array)


def _row(path: Path, index: int, split: str) -> Row:
    image = Frame(path, "images", index)
    # The file has no normals: they are computed from depth when they are asked for.
    targets = {"segmentation": image.of("labels"), "depth": image.of("depths"), "normals": image.of("depths")}
    return Row(image, split, targets, (path.with_name(MAPPING),))


def _table(path: Path) -> np.ndarray:
    """Class of each of the dataset's labels, the first of which is 0 for none."""
    (of_40,) = read_matlab(path, "mapClass")
    if of_40.min(initial=1) < 1 or of_40.max(initial=1) > len(FROM_40):
        raise InputError(f"{path}: classes from {of_40.min()} to {of_40.max()}, not 1 to {len(FROM_40)}.")
    return np.concatenate([[IGNORE_LABEL], np.array(FROM_40)[of_40 - 1] - 1])


def _read_labels(table: np.ndarray, frame: Frame) -> np.ndarray:
    labels = frame.read()
    if int(labels.max(initial=0)) >= len(table):
        raise InputError(f"{frame}: label {labels.max()}; {MAPPING} beside it has {len(table) - 1}.")
    return table[labels]


def _read_normals(frame: Frame) -> np.ndarray:
    return normals_from_depth(frame.read(), CAMERA)
