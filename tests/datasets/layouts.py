"""Small datasets written in the true formats, and what goes wrong with them, for the tests of every layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simomerge.core.errors import InputError
from simomerge.datasets.check import check, contact_sheet
from simomerge.datasets.load import find_manifest, load_data


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


def bad_file_is_named(spec: str, split: str, task: str, path: Path) -> None:
    """A file of the first image that is broken, then gone, is named when it is read and by the check.

    But an image that is gone from a tree is none of its images, and only who has counted them knows.
    """
    data = load_data(spec, split=split)
    path.write_bytes(path.read_bytes()[:60])
    for message in (f"{path.name}: cannot be read", f"{path.name}: no such"):
        with pytest.raises(InputError, match=message):
            data.targets(0, [task]) if task != "image" else data.image(0)
        counted = task != "image" or path.suffix == ".npy" or path.is_file()
        problems = "\n".join(check(find_manifest(spec)).problems)
        assert (path.name in problems) == counted, problems
        path.unlink(missing_ok=True)


def nothing_to_mend(spec: str, but: str = "no pixel of") -> None:
    """The check reads everything, and finds fault with nothing but the classes that a small fixture lacks."""
    manifest = find_manifest(spec)
    found = check(manifest)
    assert [problem for problem in found.problems if but not in problem] == []
    assert sum(found.images.values()) == len(manifest.rows)
    assert contact_sheet(manifest, images=2, height=20).height == 2 * 24
