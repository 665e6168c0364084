"""Find a dataset by its name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from simomerge.datasets.base import DenseDataset
from simomerge.datasets.folder import MANIFESTS, Folder
from simomerge.errors import InputError


def load_data(
    spec: str,
    split: str = "test",
    count: int | None = None,
    tasks: str | Iterable[str] = "all",
    **options: Any,
) -> DenseDataset:
    """A dataset: ``"rooms"``, or one of your own by its manifest.

    Args:
        spec: ``rooms``, or the path of a manifest (``*.yaml``, ``*.csv``) or of the folder that holds ``data.yaml`` or
            ``data.csv``; docs/data.md says what is in it.
        split: "train", "val" or "test".
        count: images: for rooms a default per split where it is left out; of a manifest all, or as many as are there.
        tasks: whose targets its samples hold; all by default.
        **options: of the dataset, such as ``size`` and ``seed`` of rooms.

    Raises:
        InputError: an unknown name or split, or a manifest that is not one.

    Example:
        >>> len(load_data("rooms", split="val", count=8))
        8
    """
    if spec != "rooms":
        if not (Path(spec).suffix in MANIFESTS or Path(spec).is_dir()):
            raise InputError(f"unknown dataset {spec!r}; give rooms, or the path of a manifest (docs/data.md).")
        return Folder(spec, split, count, **options).select(tasks)
    from simomerge.datasets.rooms.dataset import Rooms

    return Rooms(split, count or {"train": 1000, "val": 256, "test": 256}.get(split, 256), **options).select(tasks)
