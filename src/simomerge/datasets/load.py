"""Find a dataset by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from simomerge.core.errors import InputError
from simomerge.core.schema import nearest
from simomerge.datasets.base import DenseDataset
from simomerge.datasets.manifest import MANIFESTS, Folder, read_manifest
from simomerge.datasets.published.cityscapes import Cityscapes, cityscapes_manifest
from simomerge.datasets.published.nyuv2 import NYUv2, nyuv2_manifest
from simomerge.datasets.published.taskonomy import Taskonomy, taskonomy_manifest
from simomerge.datasets.rows import Manifest, Rows

NAMED: dict[str, tuple[Callable[..., Rows], Callable[..., Manifest]]] = {
    "nyuv2": (NYUv2, nyuv2_manifest),
    "cityscapes": (Cityscapes, cityscapes_manifest),
    "taskonomy": (Taskonomy, taskonomy_manifest),
}
"""Datasets given as NAME:ROOT: one split of one, and all of it."""


def load_data(
    spec: str | Path,
    split: str = "test",
    count: int | None = None,
    tasks: str | Iterable[str] = "all",
    skip: int = 0,
    **options: Any,
) -> DenseDataset:
    """A dataset: ``"rooms"``, a published one by its name and folder, or one of your own by its manifest.

    Args:
        spec: ``rooms``; ``nyuv2:FOLDER``, ``cityscapes:FOLDER`` or ``taskonomy:FOLDER``; or the path of a manifest
            (``*.yaml``, ``*.csv``) or of the folder that holds ``data.yaml`` or ``data.csv``. docs/data.md says what
            is in them.
        split: "train", "val" or "test".
        count: images: for rooms a default per split where it is left out; else all, or as many as are there, evenly
            over the split.
        tasks: whose targets its samples hold; all by default.
        skip: leave out the images that ``count=skip`` would give; ``count`` counts others.
        **options: of the dataset, such as ``size``, and ``seed`` of rooms.

    Raises:
        InputError: an unknown name or split, a folder without the dataset, or a manifest that is not one.

    Example:
        >>> len(load_data("rooms", split="val", count=8))
        8
    """
    if spec == "rooms":
        from simomerge.datasets.rooms.dataset import Rooms

        count = count or {"train": 1000, "val": 256, "test": 256}.get(split, 256)
        return Rooms(split, skip + count, **options).skip(skip).select(tasks)
    name, root = _name_and_root(spec)
    opened = partial(NAMED[name][0] if name else Folder, root)
    if not skip:
        return opened(split, count, **options).select(tasks)
    rest = opened(split, None, **options).skip(skip)
    return rest.take(min(count or len(rest), len(rest))).select(tasks)


def find_manifest(spec: str | Path) -> Manifest:
    """All splits of a dataset on disk, by its manifest or as NAME:ROOT. Raises InputError."""
    if spec == "rooms":
        raise InputError("rooms are rendered, there are no files to look at; give a dataset on disk (docs/data.md).")
    name, root = _name_and_root(spec)
    return NAMED[name][1](root) if name else read_manifest(root)


def _name_and_root(spec: str | Path) -> tuple[str, str]:
    """The two parts of NAME:ROOT; the name is empty where the spec is the path of a manifest."""
    spec = str(spec)
    name, _, root = spec.partition(":")
    if name in NAMED:
        if not root:
            raise InputError(f"{name!r} needs its folder: {name}:FOLDER (docs/data.md).")
        return name, str(Path(root).expanduser())
    path = Path(spec).expanduser()
    if path.suffix in MANIFESTS or path.is_dir():
        return "", str(path)
    near = nearest(name, ["rooms", *NAMED])
    hint = f"; did you mean {near!r}?" if near else ";"
    known = ", ".join(f"{name}:FOLDER" for name in NAMED)
    raise InputError(f"unknown dataset {spec!r}{hint} give rooms, {known}, or the path of a manifest (docs/data.md).")
