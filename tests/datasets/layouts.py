"""Helpers to write small datasets in their true formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from simomerge.datasets.check import check
from simomerge.datasets.load import find_manifest
from simomerge.datasets.sheet import contact_sheet


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)
    return path


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def unit(normals: np.ndarray) -> np.ndarray:
    """Vectors (H, W, 3) of length one."""
    return (normals / np.linalg.norm(normals, axis=-1, keepdims=True)).astype(np.float32)


def nothing_to_fix(spec: str, but: str = "no pixel of") -> None:
    """The check reads everything, and reports nothing but classes that do not occur in a small fixture."""
    manifest = find_manifest(spec)
    found = check(manifest)
    assert [problem for problem in found.problems if but not in problem] == []
    assert sum(found.images.values()) == sum(map(len, manifest.rows.values()))
    assert contact_sheet(manifest, images=2, height=20).height >= 2 * 40
