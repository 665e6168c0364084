"""Taskonomy: indoor scenes with depth, normals, texture edges and key points; the paper's buildings. docs/data.md.

Source: Zamir et al., "Taskonomy: Disentangling Task Transfer Learning" (CVPR 2018); README.md under data/ of
github.com/StanfordVL/taskonomy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from simomerge.core.errors import InputError
from simomerge.datasets.rows import Manifest, Row
from simomerge.datasets.stored import Source, Stored, read_array, read_picture
from simomerge.datasets.tasks import LOG_DEPTH_RANGE, Task

SIZE = (256, 256)
"""Height and width in the paper."""
BUILDINGS = {
    "train": ("allensville", "coffeen", "collierville", "leonardo", "merom", "pinesdale", "ranchester", "stockman"),
    "val": ("beechwood", "corozal", "klickitat", "shelbyville"),
    "test": ("ihlen", "mcdade", "onaga", "tolstoy"),
}
"""Source: "Single-Input Multi-Output Model Merging" (arXiv 2504.11268)."""
LIMITS = {"train": 2000, "val": 1000, "test": 1000}
"""The largest number of images per building. Source: as `BUILDINGS`."""
DOMAINS = {
    "autoencoder": "rgb",
    "depth": "depth_zbuffer",
    "normals": "normal",
    "texture": "edge_texture",
    "keypoints": "keypoints2d",
}
TEXTURE_RANGE, KEYPOINTS_RANGE = 11041, 3129
"""Stored values are divided by these and clipped at 1. Source: the reference code of arXiv 2504.11268."""
NO_DEPTH = 65535
"""The largest value, 128 m in units of 1/512 m, marks rays that met no surface."""

_MASKS = "mask_valid"
_NAME = re.compile(r"point_(\d+)_view_(\d+)_domain_rgb\.png")


def taskonomy(root: str | Path, size: tuple[int, int] = SIZE, buildings: Iterable[str] | None = None) -> Manifest:
    """The paper's subset of Taskonomy.

    The splits are "train" (16,000 images of 8 buildings), "val" and "test" (4,000 images of 4 buildings each).

    Args:
        root: the folder that holds ``rgb/BUILDING/point_P_view_V_domain_rgb.png``, and the same in the folders
            ``depth_zbuffer``, ``normal``, ``edge_texture``, ``keypoints2d`` and ``mask_valid``. A task whose folder is
            missing is left out. Without ``mask_valid`` all pixels with a depth count.
        size: (height, width) to resize images and targets to.
        buildings: take only these buildings; each counts for its own split.

    Raises:
        InputError: the folder does not hold Taskonomy, or a building is not one of the paper's.
    """
    root = Path(root)
    if not (root / "rgb").is_dir():
        raise InputError(
            f"{root}: Taskonomy is not here: no folder rgb, of rgb/BUILDING/point_0_view_0_domain_rgb.png."
        )
    known = [name for names in BUILDINGS.values() for name in names]
    chosen = known if buildings is None else list(dict.fromkeys(buildings))
    if unknown := [name for name in chosen if name not in known]:
        raise InputError(f"no building {unknown[0]!r} among the paper's: {', '.join(known)}.")
    if not any((root / "rgb" / name).is_dir() for name in chosen):
        raise InputError(f"{root / 'rgb'}: none of the paper's buildings is in it, such as {chosen[0]}.")
    masks = (root / _MASKS).is_dir()
    stored = [
        Stored(Task("autoencoder"), array=read_picture),
        Stored(Task("depth", "log_depth"), array=partial(read_log_depth, masks)),
        Stored(Task("normals"), array=partial(read_normals, masks)),
        Stored(Task("texture"), array=partial(read_share, TEXTURE_RANGE)),
        Stored(Task("keypoints"), array=partial(read_share, KEYPOINTS_RANGE)),
    ]
    rows = _Splits(root, chosen)
    return Manifest(root, stored, rows, size, missing=rows.missing)


class _Splits(Mapping[str, Sequence[Row]]):
    """The images by split, looked for when a split is used: there are more than ten thousand."""

    def __init__(self, root: Path, chosen: Sequence[str]) -> None:
        self.root = root
        self.names = {split: [name for name in chosen if name in names] for split, names in BUILDINGS.items()}

    def __getitem__(self, split: str) -> Sequence[Row]:
        return [row for name in self.names[split] for row in _building(self.root, name, split)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def missing(self, split: str) -> str:
        if not self.names[split]:
            return f"none of the chosen buildings is in split {split!r}; it has {', '.join(BUILDINGS[split])}."
        absent = [name for name in self.names[split] if not _building(self.root, name, split)]
        if not absent:
            return ""
        return (
            f"{self.root / 'rgb'}: no images of {', '.join(absent)} of the split {split}. Download them, or name the"
            " buildings that you have: buildings=[...]."
        )


def _building(root: Path, name: str, split: str) -> tuple[Row, ...]:
    """A building's images by point and view; if there are too many, as many as allowed, evenly over the building."""
    folder = root / "rgb" / name
    domains = tuple(domain for domain in (*DOMAINS.values(), _MASKS) if (root / domain).is_dir())
    return _views(root, name, split, domains, folder.stat().st_mtime_ns) if folder.is_dir() else ()


@lru_cache(maxsize=64)
def _views(root: Path, name: str, split: str, domains: tuple[str, ...], _changed: int) -> tuple[Row, ...]:
    """The rows of `_building`, cached until files are added or removed: a run opens its data many times."""
    found = [_NAME.fullmatch(file.name) for file in os.scandir(root / "rgb" / name)]
    views = sorted((int(m[1]), int(m[2])) for m in found if m)
    if len(views) > LIMITS[split]:
        views = [views[i * len(views) // LIMITS[split]] for i in range(LIMITS[split])]
    rows = []
    for point, view in views:
        start = f"{name}/point_{point}_view_{view}_domain_"
        # Joining a hundred thousand paths with / takes seconds, making them from strings does not.
        targets: dict[str, Source] = {
            task: Path(f"{root}/{d}/{start}{d}.png") for task, d in DOMAINS.items() if d in domains
        }
        masks = (Path(f"{root}/{_MASKS}/{start}{DOMAINS['depth']}.png"),) if _MASKS in domains else ()
        rows.append(Row(Path(f"{root}/rgb/{start}rgb.png"), targets, masks))
    return tuple(rows)


def read_log_depth(masks: bool, path: Path) -> np.ndarray:
    """log(1 + d) / log(2^16) for stored depths d in 1/512 m, float32 (H, W) in [0, 1]; NaN where there is no depth."""
    stored = _plane(path)
    valid = (stored > 0) & (stored < NO_DEPTH) & _valid(masks, path, stored.shape)
    return np.where(valid, np.log1p(stored.astype(np.float32)) / np.float32(LOG_DEPTH_RANGE), np.float32(np.nan))


def read_normals(masks: bool, path: Path) -> np.ndarray:
    """Normals -1 to 1, float32 (H, W, 3), from 8 bits centred at 127.5; NaN where there is no surface."""
    stored = read_array(path)
    if stored.ndim != 3 or stored.dtype != np.uint8:
        raise InputError(f"{path}: {stored.dtype} of shape {stored.shape}; normals are RGB pictures of 8 bits.")
    valid = _valid(masks, path, stored.shape[:2])
    return np.where(valid[..., None], stored[..., :3] / np.float32(127.5) - 1, np.float32(np.nan))


def read_share(largest: int, path: Path) -> np.ndarray:
    """Stored values as a share of ``largest``, float32 (H, W) in [0, 1].

    The paper's code rescales them to [-1, 1], which doubles all errors.
    """
    return np.minimum(_plane(path).astype(np.float32) / np.float32(largest), 1)


def _plane(path: Path) -> np.ndarray:
    stored = read_array(path)
    if stored.ndim != 2 or stored.dtype != np.uint16:
        raise InputError(f"{path}: {stored.dtype} of shape {stored.shape}; give a grey picture of 16 bits.")
    return stored


def _valid(masks: bool, path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Where the mesh of the building has a surface: the mask of a target."""
    if not masks:
        return np.ones(shape, bool)
    domain = path.parents[1].name
    name = path.name.replace(f"_domain_{domain}.png", f"_domain_{DOMAINS['depth']}.png")
    mask = path.parents[2] / _MASKS / path.parent.name / name
    values = read_array(mask)
    values = values if values.ndim == 2 else values[..., 0]
    if values.shape != shape:
        raise InputError(f"{mask}: of shape {values.shape}, its target of {shape}.")
    return values > 0
