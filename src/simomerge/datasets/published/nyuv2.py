"""NYU Depth V2: indoor scenes with 13 classes, depth in metres and surface normals. docs/data.md.

Sources: Silberman et al., "Indoor Segmentation and Support Inference from RGBD Images" (ECCV 2012), the dataset, its
split and its toolbox; Gupta et al. (CVPR 2013), its 40 classes; Couprie et al. (2013), the 13 classes.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from simomerge.core.errors import InputError
from simomerge.datasets.losses import IGNORE_LABEL
from simomerge.datasets.published.geometry import Camera, normals_from_depth
from simomerge.datasets.published.hdf5 import Frame, count_images
from simomerge.datasets.published.matlab import read_matlab
from simomerge.datasets.published.numbered import (
    numbered_folder,
    numbered_rows,
    read_npy_image,
    read_npy_labels,
    share_out,
    splits_of,
)
from simomerge.datasets.rows import Manifest, Row
from simomerge.datasets.stored import Stored, read_array
from simomerge.datasets.tasks import Task

SIZE = (280, 378)
"""Height and width in the paper: the largest multiples of DINOv2's patch within the stored 288 x 384."""
VAL, HELD_OUT = 400, 654
"""The paper validates on 400 of the 654 images of the official test split, and tests on the other 254."""
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
"""The class, counted from 1, of each of Gupta's 40 classes. Source: class13Mapping.mat of
github.com/ankurhanda/nyuv2-meta-data."""
CAMERA = Camera(fx=518.85790117450188, fy=519.46961112127485, cx=325.58244941119034 - 1, cy=253.73616633400465 - 1)
"""The camera of the colour images, 640 x 480, onto which depth is projected. Source: camera_params.m of the dataset's
toolbox, which counts pixels from 1."""

LABELED = "nyu_depth_v2_labeled.mat"
SPLITS = "splits.mat"
MAPPING = "classMapping40.mat"

_FOLDERS = {"segmentation": "label/*.npy", "depth": "depth/*.npy", "normals": "normal/*.npy"}
_SEGMENTATION = Task("segmentation", classes=CLASSES)


def nyuv2(root: str | Path, size: tuple[int, int] = SIZE) -> Manifest:
    """NYUv2, as the preprocessed NPY files or the labelled MATLAB file.

    The splits are "train" (795 images), "val" (400) and "test" (254).

    Args:
        root: the folder of ``train/`` and ``val/``, or of ``nyu_depth_v2_labeled.mat``, ``splits.mat`` and
            ``classMapping40.mat``.
        size: (height, width) to resize images and targets to.

    Raises:
        InputError: the folder holds neither, or a file that describes the dataset is missing or cannot be read.
    """
    root = Path(root)
    labelled = root if root.suffix == ".mat" else root / LABELED
    if numbered_folder(root):
        train, held = (numbered_rows(root, part, _FOLDERS) for part in ("train", "val"))
        path, image = root, read_npy_image
        stored = [Stored(_SEGMENTATION, array=read_npy_labels), Stored(Task("depth")), Stored(Task("normals"))]
    elif labelled.is_file():
        train, held = _labelled_rows(labelled)
        path, image = labelled, read_array
        stored = [
            Stored(_SEGMENTATION, array=partial(_read_labels, _table(labelled.with_name(MAPPING)))),
            Stored(Task("depth")),
            Stored(Task("normals"), array=_read_normals),
        ]
    elif root.suffix == ".mat":
        raise InputError(f"{root}: no such file; give {LABELED}, or the folder that it is in.")
    else:
        raise InputError(f"{root}: NYUv2 is not here: neither the folder train/image nor the file {LABELED} is in it.")
    return Manifest(path, stored, splits_of(train, *share_out(held, VAL, HELD_OUT)), size, image)


def _labelled_rows(path: Path) -> tuple[list[Row], list[Row]]:
    """The images of the official training and test split."""
    count = min(count_images(path, key, LABELED) for key in ("images", "depths", "labels"))
    train, held = read_matlab(path.with_name(SPLITS), "trainNdxs", "testNdxs")
    if min(train.min(initial=1), held.min(initial=1)) < 1 or max(train.max(initial=1), held.max(initial=1)) > count:
        raise InputError(f"{path.with_name(SPLITS)}: its images are not from 1 to the {count} of {path.name}.")
    return [_row(path, int(n) - 1) for n in train], [_row(path, int(n) - 1) for n in held]


def _row(path: Path, index: int) -> Row:
    image = Frame(path, "images", index)
    # The file has no normals: they are computed from depth when they are read.
    targets = {"segmentation": image.of("labels"), "depth": image.of("depths"), "normals": image.of("depths")}
    return Row(image, targets, (path.with_name(MAPPING),))


def _table(path: Path) -> np.ndarray:
    """The class of each of the dataset's labels, which are counted from 1; label 0 means unlabelled."""
    (classes,) = read_matlab(path, "mapClass")
    if classes.min(initial=1) < 1 or classes.max(initial=1) > len(FROM_40):
        raise InputError(f"{path}: classes from {classes.min()} to {classes.max()}, not 1 to {len(FROM_40)}.")
    return np.concatenate([[IGNORE_LABEL], np.array(FROM_40)[classes - 1] - 1])


def _read_labels(table: np.ndarray, frame: Frame) -> np.ndarray:
    labels = frame.read()
    if int(labels.max(initial=0)) >= len(table):
        raise InputError(f"{frame}: label {labels.max()}; {MAPPING} in the same folder has {len(table) - 1}.")
    return table[labels]


def _read_normals(frame: Frame) -> np.ndarray:
    return normals_from_depth(frame.read(), CAMERA)
