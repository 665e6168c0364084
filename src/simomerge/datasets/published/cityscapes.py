"""Cityscapes: street scenes with 19 classes, 10 classes of parts and disparity. docs/data.md.

Sources: Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding" (CVPR 2016); de Geus et al.,
"Part-aware Panoptic Segmentation" (CVPR 2021), the parts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.core.errors import InputError
from simomerge.core.images import read_image
from simomerge.datasets.base import check_size
from simomerge.datasets.losses import IGNORE_LABEL
from simomerge.datasets.published.numbered import (
    numbered_folder,
    numbered_rows,
    read_npy_image,
    read_npy_labels,
    share_out,
    splits_of,
)
from simomerge.datasets.rows import Manifest, Row
from simomerge.datasets.stored import Source, Stored, read_array
from simomerge.datasets.tasks import Task

SIZE = (128, 256)
"""Height and width in the paper."""
TRAIN, NOT_TESTED = 2380, 2975
"""The paper trains on 2380 of the 2975 images of the official training set and validates on the other 595. It tests on
the 500 images of the official validation set."""
COLOURS = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}
"""The 19 classes with their colours. Source: helpers/labels.py of github.com/mcordts/cityscapesScripts."""
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The id of each class in ``*_labelIds.png``; other ids up to 33 do not count. Source: as `COLOURS`."""
PARTS = ("background", "torso", "head", "arms", "legs", "windows", "wheels", "lights", "license plate", "chassis")
PARTS_OF = {24: range(1, 5), 25: range(1, 5), 26: range(5, 10), 27: range(5, 10), 28: range(5, 10)}
"""The indices in `PARTS` of the parts 1, 2, ... of a semantic id: person, rider; car, truck, bus. Everything else is
background. Sources: create_dataset.py of github.com/lorenmt/auto-lambda; for the meaning of the parts,
cityscapes_panoptic_parts/README.md of github.com/pmeletis/panoptic_parts."""

CAMERA_WIDTH = 2048
"""Width in pixels of the images for which disparities are stored."""

_MTAN = {"segmentation": "label_19/*.npy", "parts": "part_seg/*.npy", "disparity": "depth/*.npy"}
_AUTO_LAMBDA = {"segmentation": "seg/*.png", "parts": "part_seg/*.tif", "disparity": "depth/*.png"}
_OFFICIAL = {
    "segmentation": ("gtFine", "_gtFine_labelIds.png"),
    "parts": ("gtFinePanopticParts", "_gtFinePanopticParts.tif"),
    "disparity": ("disparity", "_disparity.png"),
}
_IMAGE = "_leftImg8bit.png"


def cityscapes(root: str | Path, size: tuple[int, int] = SIZE) -> Manifest:
    """Cityscapes, as the preprocessed NPY files, Auto-Lambda's pictures or the official tree.

    The splits are "train" (2380 images), "val" (595) and "test" (500). A task whose folder is missing is left out.

    Args:
        root: the folder of ``train/`` and ``val/``, or of ``leftImg8bit/``, ``gtFine/``, ``gtFinePanopticParts/`` and
            ``disparity/``.
        size: (height, width) to resize images and targets to. Disparities of pictures are in pixels of this width.

    Raises:
        InputError: the folder holds none of them.
    """
    check_size(size)
    root = Path(root)
    segmentation = Task("segmentation", classes=tuple(COLOURS), colours=tuple(COLOURS.values()))
    parts, disparity = Task("parts", "segmentation", PARTS), Task("disparity")
    find_rows: Callable[[Path, str], list[Row]]
    read: Callable[[Any], np.ndarray]
    pictures = next(root.glob("*/image/*.png"), None) is not None
    if numbered_folder(root) and not pictures:
        find_rows = partial(numbered_rows, folders=_MTAN)
        ignore, labels = (255.0,), read_npy_labels
        stored = [Stored(segmentation, None, ignore, labels), Stored(parts, None, ignore, labels), Stored(disparity)]
        read = read_npy_image
    elif numbered_folder(root) or (root / "leftImg8bit").is_dir():
        find_rows = partial(numbered_rows, folders=_AUTO_LAMBDA, image="image/*.png") if pictures else _official_rows
        stored = [
            Stored(segmentation, array=read_label_ids),
            Stored(parts, array=read_parts),
            Stored(disparity, array=partial(read_disparity, size[1])),
        ]
        read = read_image
    else:
        raise InputError(f"{root}: Cityscapes is not here: neither train/image nor leftImg8bit is a folder in it.")
    # The labels of the official test set are not public, so the official validation set is the test split.
    train, test = (find_rows(root, part) for part in ("train", "val"))
    rows = splits_of(*share_out(train, TRAIN, NOT_TESTED), test)
    if not rows:
        raise InputError(f"{root}: no image leftImg8bit/train/CITY/*{_IMAGE} in it.")
    return Manifest(root, stored, rows, size, read)


def _official_rows(root: Path, part: str) -> list[Row]:
    rows = []
    existing = {t: (root / folder / part, end) for t, (folder, end) in _OFFICIAL.items() if (root / folder).is_dir()}
    for image in sorted((root / "leftImg8bit" / part).glob(f"*/*{_IMAGE}")):
        if image.name.startswith("."):  # such as the copies of names that macOS makes
            continue
        city, stem = image.parent.name, image.name.removesuffix(_IMAGE)
        targets: dict[str, Source] = {task: folder / city / f"{stem}{end}" for task, (folder, end) in existing.items()}
        rows.append(Row(image, targets))
    return rows


_CLASS_OF = np.full(34, IGNORE_LABEL, np.int8)
_CLASS_OF[list(LABEL_IDS)] = range(len(LABEL_IDS))


def read_label_ids(path: Path) -> np.ndarray:
    """Classes 0 to 18 or -1, int8 (H, W), of ``*_labelIds.png``. Raises InputError."""
    ids = read_array(path)
    if ids.ndim != 2 or ids.dtype.kind != "u" or int(ids.max(initial=0)) >= len(_CLASS_OF):
        raise InputError(f"{path}: not label ids from 0 to {len(_CLASS_OF) - 1}; give *_gtFine_labelIds.png.")
    return _CLASS_OF[ids]


def read_disparity(width: int, path: Path) -> np.ndarray:
    """Disparities in pixels of an image ``width`` pixels wide, float32 (H, W); 0 where none was measured.

    A stored 16-bit value p > 0 is a disparity of (p - 1) / 256 pixels in the camera's images, which are `CAMERA_WIDTH`
    wide; also in Auto-Lambda's smaller files. Disparities are proportional to the width of the image. A measured
    disparity of 0, infinitely far away, also becomes 0.

    Source: README.md of github.com/mcordts/cityscapesScripts; the scale as in create_dataset.py of
    github.com/lorenmt/auto-lambda.
    """
    stored = read_array(path)
    if stored.ndim != 2 or stored.dtype != np.uint16:
        raise InputError(f"{path}: {stored.dtype} of shape {stored.shape}; disparities are pictures of 16 bits.")
    pixels = (stored.astype(np.float32) - 1) / 256
    return np.where(stored > 0, pixels * np.float32(width / CAMERA_WIDTH), np.float32(0))


# Indexed by semantic id and part. Part 0 is unlabelled, and part 5 of humans in a few files is an artefact: both are
# background.
_PART = np.zeros((len(_CLASS_OF), 100), np.uint8)
for _sid, _own in PARTS_OF.items():
    _PART[_sid, 1 : len(_own) + 1] = _own


def read_parts(path: Path) -> np.ndarray:
    """Classes of `PARTS`, uint8 (H, W), of a file of Cityscapes Panoptic Parts. Raises InputError."""
    uids = read_array(path)
    if uids.ndim != 2 or uids.dtype.kind not in "ui":
        raise InputError(f"{path}: {uids.dtype} of shape {uids.shape}; give *_gtFinePanopticParts.tif.")
    table = _part_of_uid()
    in_range = int(uids.min(initial=0)) >= 0 and int(uids.max(initial=0)) < len(table)
    classes = table[uids] if in_range else np.full(1, _NO_UID)
    if (classes == _NO_UID).any():
        top = len(_CLASS_OF) - 1
        raise InputError(f"{path}: labels up to {uids.max()} are not all sid_iid_pid with a sid from 0 to {top}.")
    return classes


_NO_UID = 255


@cache
def _part_of_uid() -> np.ndarray:
    """The class in `PARTS` of every label of Panoptic Parts; `_NO_UID` for numbers that are not labels."""
    top = len(_CLASS_OF)
    sids, _, pids = decode_uids(np.arange(top * 100_000))
    table = np.where(pids >= 0, _PART[sids.clip(max=top - 1), pids], np.uint8(0))
    table[top:1000] = table[top * 1000 : 100_000] = _NO_UID
    return table.astype(np.uint8)


def decode_uids(uids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Semantic, instance and part id of the labels of Panoptic Parts; -1 where a label has none.

    A label has 1 or 2 digits of the semantic id, then possibly 3 of the instance, then possibly 2 of the part.

    Source: docs/source/label_format.md of github.com/pmeletis/panoptic_parts.

    Example:
        >>> [ids.tolist() for ids in decode_uids(np.array([23, 26002, 2401002]))]
        [[23, 26, 24], [-1, 2, 10], [-1, -1, 2]]
    """
    uids = uids.astype(np.int64)
    full = np.where(uids <= 99, uids * 100_000, np.where(uids <= 99_999, uids * 100, uids))
    sids, iids, pids = full // 100_000, full // 100 % 1000, full % 100
    return sids, np.where(uids <= 99, -1, iids), np.where(uids <= 99_999, -1, pids)
