"""Find a dataset by its name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from simomerge.datasets.base import DenseDataset
from simomerge.errors import InputError


def load_data(
    spec: str,
    split: str = "test",
    count: int | None = None,
    tasks: str | Iterable[str] = "all",
    **options: Any,
) -> DenseDataset:
    """A dataset by name: ``"rooms"``.

    Args:
        spec: ``NAME`` or ``NAME:ROOT``.
        split: "train", "val" or "test".
        count: images; a default per split where it is left out.
        tasks: whose targets its samples hold; all by default.
        **options: of the dataset, such as ``size`` and ``seed`` of rooms.

    Raises:
        InputError: an unknown name or split.

    Example:
        >>> len(load_data("rooms", split="val", count=8))
        8
    """
    name = spec.partition(":")[0]
    if name != "rooms":
        raise InputError(f"unknown dataset {name!r}; there is: rooms.")
    from simomerge.datasets.rooms.dataset import Rooms

    return Rooms(split, count or {"train": 1000, "val": 256, "test": 256}.get(split, 256), **options).select(tasks)
