"""Taskonomy: indoor scenes with depth, normals, texture edges and key points; the paper's buildings. docs/data.md.

Source: Zamir et al., "Taskonomy: Disentangling Task Transfer Learning" (CVPR 2018); README.md under data/ of
github.com/StanfordVL/taskonomy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from simomerge.core.errors import InputError
from simomerge.datasets.rows import Manifest, Row, Rows, Source, Stored, read_array, read_picture
from simomerge.datasets.tasks import LOG_DEPTH_RANGE, Task

SIZE = (256, 256)
"""Height and width in the paper."""
BUILDINGS = {
    "train": ("allensville", "coffeen", "collierville", "leonardo", "merom", "pinesdale", "ranchester", "stockman"),
    "val": ("beechwood", "corozal", "klickitat", "shelbyville"),
    "test": ("ihlen", "mcdade", "onaga", "tolstoy"),
}
LIMITS = {"train": 2000, "val": 1000, "test": 1000}
"""Images of a building at most. Source of both: "Single-Input Multi-Output Model Merging" (arXiv 2504.11268)."""
DOMAINS = {
    "autoencoder": "rgb",
    "depth": "depth_zbuffer",
    "normals": "normal",
    "texture": "edge_texture",
    "keypoints": "keypoints2d",
}
TEXTURE_RANGE, KEYPOINTS_RANGE = 11041, 3129
"""What stored values are divided by; what is above becomes 1. Source: the reference code of arXiv 2504.11268."""
NO_DEPTH = 65535
"""The largest value, 128 m in units of 1/512 m: where a ray met no surface."""

_MASKS = "mask_valid"
_NAME = re.compile(r"point_(\d+)_view_(\d+)_domain_rgb\.png")


class Taskonomy(Rows):
    """One split of the paper's subset of Taskonomy.

    Args:
        root: the folder of ``rgb/BUILDING/point_P_view_V_domain_rgb.png`` and, beside ``rgb``, of ``depth_zbuffer``,
            ``normal``, ``edge_texture``, ``keypoints2d`` and ``mask_valid``. A task whose folder is not there is left
            out; without ``mask_valid`` all pixels with a depth count.
        split: "train" (16,000 images of 8 buildings), "val" or "test" (4,000 of 4).
        count: so many images, evenly over the split, or all where fewer are there.
        size: (height, width) to make images and targets.
        buildings: those to take, where not all are wanted; those of other splits do not matter here.

    Raises:
        InputError: another folder, a building or file that is missing or cannot be read, or no such split.

    Example:
        >>> list(Taskonomy("/data/taskonomy", "val").tasks)                                          # doctest: +SKIP
        ['autoencoder', 'depth', 'normals', 'texture', 'keypoints']
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "test",
        count: int | None = None,
        size: tuple[int, int] = SIZE,
        buildings: Iterable[str] | None = None,
    ) -> None:
        if split not in BUILDINGS:
            raise InputError(f"{root}: no split {split!r}; Taskonomy has {', '.join(BUILDINGS)}.")
        wanted = BUILDINGS[split] if buildings is None else tuple(dict.fromkeys(buildings))
        if strange := [name for name in wanted if not any(name in names for names in BUILDINGS.values())]:
            known = ", ".join(name for names in BUILDINGS.values() for name in names)
            raise InputError(f"no building {strange[0]!r} among the paper's: {known}.")
        wanted = tuple(name for name in wanted if name in BUILDINGS[split])
        if not wanted:
            raise InputError(
                f"none of the buildings named is of split {split!r}; it has {', '.join(BUILDINGS[split])}."
            )
        manifest = taskonomy_manifest(root, size, {split: wanted})
        if manifest.lacking:
            raise InputError(f"{manifest.lacking[0]} Download it, or name those you have: buildings=[...].")
        super().__init__(manifest, split, count)


def taskonomy_manifest(
    root: str | Path, size: tuple[int, int] = SIZE, buildings: dict[str, tuple[str, ...]] = BUILDINGS
) -> Manifest:
    """The paper's buildings of all splits that are there, as `Taskonomy` says."""
    root = Path(root)
    if not (root / "rgb").is_dir():
        raise InputError(
            f"{root}: Taskonomy is not here: no folder rgb, of rgb/BUILDING/point_0_view_0_domain_rgb.png."
        )
    rows: list[Row] = []
    lacking = []
    for split, names in buildings.items():
        for name in names:
            found = _building(root, name, split)
            rows += found
            if not found:
                lacking.append(f"{root / 'rgb' / name}: no images of this building of the split {split}.")
    if not rows:
        raise InputError(f"{root / 'rgb'}: none of the paper's buildings is in it, such as {lacking[0]}")
    masks = (root / _MASKS).is_dir()
    stored = [
        Stored(Task("autoencoder"), array=read_picture),
        Stored(Task("depth", "log_depth"), array=partial(read_log_depth, masks)),
        Stored(Task("normals"), array=partial(read_normals, masks)),
        Stored(Task("texture"), array=partial(read_share, TEXTURE_RANGE)),
        Stored(Task("keypoints"), array=partial(read_share, KEYPOINTS_RANGE)),
    ]
    return Manifest(root, {of.task.name: of for of in stored}, tuple(rows), size, lacking=tuple(lacking))


def _building(root: Path, name: str, split: str) -> tuple[Row, ...]:
    """A building's images by point and view; of too many as many as allowed, evenly over the building."""
    folder = root / "rgb" / name
    there = tuple(domain for domain in (*DOMAINS.values(), _MASKS) if (root / domain).is_dir())
    return _views(root, name, split, there, folder.stat().st_mtime_ns) if folder.is_dir() else ()


@lru_cache(maxsize=64)
def _views(root: Path, name: str, split: str, there: tuple[str, ...], _changed: int) -> tuple[Row, ...]:
    """The rows of `_building`, kept while no file comes or goes: a run opens its data many times."""
    found = [_NAME.fullmatch(file.name) for file in os.scandir(root / "rgb" / name)]
    views = sorted((int(m[1]), int(m[2])) for m in found if m)
    if len(views) > LIMITS[split]:
        views = [views[i * len(views) // LIMITS[split]] for i in range(LIMITS[split])]
    rows = []
    for point, view in views:
        start = f"{name}/point_{point}_view_{view}_domain_"
        # Paths from whole texts: of a hundred thousand, joined ones take seconds.
        targets: dict[str, Source] = {
            task: Path(f"{root}/{d}/{start}{d}.png") for task, d in DOMAINS.items() if d in there
        }
        masks = (Path(f"{root}/{_MASKS}/{start}{DOMAINS['depth']}.png"),) if _MASKS in there else ()
        rows.append(Row(Path(f"{root}/rgb/{start}rgb.png"), split, targets, masks))
    return tuple(rows)


def read_log_depth(masks: bool, path: Path) -> np.ndarray:
    """log(1 + d) / log(2^16) of the stored depth d in 1/512 m, float32 (H, W) in [0, 1]; NaN where there is none."""
    stored = _plane(path)
    valid = (stored > 0) & (stored < NO_DEPTH) & _valid(masks, path, stored.shape)
    return np.where(valid, np.log1p(stored.astype(np.float32)) / np.float32(LOG_DEPTH_RANGE), np.float32(np.nan))


def read_normals(masks: bool, path: Path) -> np.ndarray:
    """Normals -1 to 1, float32 (H, W, 3), of 8 bits centred at 127.5; NaN where there is no surface."""
    stored = read_array(path)
    if stored.ndim != 3 or stored.dtype != np.uint8:
        raise InputError(f"{path}: {stored.dtype} of shape {stored.shape}; normals are RGB pictures of 8 bits.")
    valid = _valid(masks, path, stored.shape[:2])
    return np.where(valid[..., None], stored[..., :3] / np.float32(127.5) - 1, np.float32(np.nan))


def read_share(largest: int, path: Path) -> np.ndarray:
    """Stored values as a share of ``largest``, float32 (H, W) in [0, 1].

    The paper's code goes on to [-1, 1], where errors are twice as large.
    """
    return np.minimum(_plane(path).astype(np.float32) / np.float32(largest), 1)


def _plane(path: Path) -> np.ndarray:
    stored = read_array(path)
    if stored.ndim != 2 or stored.dtype != np.uint16:
        raise InputError(f"{path}: {stored.dtype} of shape {stored.shape}; give a grey picture of 16 bits.")
    return stored


def _valid(masks: bool, path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Where the mesh was seen: the mask that goes with a target."""
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
