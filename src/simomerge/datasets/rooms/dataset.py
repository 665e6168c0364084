"""Rooms as a dataset of tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simomerge.datasets.base import DenseDataset, check_size
from simomerge.datasets.rooms import CLASS_COLOURS, CLASS_NAMES, load_rooms
from simomerge.datasets.tasks import Task

TASKS: dict[str, Task] = {
    "segmentation": Task(
        "segmentation",
        classes=tuple(CLASS_NAMES),
        colours=tuple((int(r), int(g), int(b)) for r, g, b in CLASS_COLOURS),
    ),
    "depth": Task("depth"),
    "normals": Task("normals"),
    "edges": Task("edges"),
    "texture": Task("texture"),
    "keypoints": Task("keypoints"),
    "autoencoder": Task("autoencoder"),
}
"""The tasks that rooms have labels for. `edges`, `texture`, `keypoints` and `autoencoder` mirror Taskonomy's."""


class Rooms(DenseDataset):
    """One split of rooms, rendered on first use and then memory-mapped.

    Args:
        split: "train", "val", "test" or "pool" (for pretraining only).
        count: number of images.
        size: (H, W) in pixels.
        seed: seed of the scenes.
        workers: processes that render; one per core by default.

    Raises:
        InputError: the split is unknown, or a number is out of range.

    Example:
        >>> rooms = Rooms("val", 8).select(["depth", "normals"])
        >>> sorted(rooms[0]), tuple(rooms[0]["normals"].shape)
        (['depth', 'image', 'normals'], (3, 64, 80))
    """

    def __init__(
        self, split: str, count: int, size: tuple[int, int] = (64, 80), seed: int = 0, workers: int | None = None
    ) -> None:
        super().__init__(TASKS, count)
        check_size(size)
        self._request = (split, count, *size, seed)
        self.arrays = load_rooms(*self._request, workers=workers)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the arrays: another process maps the same files instead of receiving a copy of them."""
        return {key: value for key, value in self.__dict__.items() if key != "arrays"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.arrays = load_rooms(*self._request)

    def image(self, index: int) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.arrays["image"][index].transpose(2, 0, 1))).float() / 255

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        return {name: self._target(name, index) for name in tasks}

    def _target(self, name: str, index: int) -> Tensor:
        if name == "autoencoder":
            return self.image(index)
        values = self.arrays[name][index]
        if name == "segmentation":
            return torch.from_numpy(values.astype(np.int64))
        if name == "normals":
            normals = torch.from_numpy(values.transpose(2, 0, 1).astype(np.float32))
            return normals / normals.norm(dim=0, keepdim=True).clamp(min=1e-6)
        plane = torch.from_numpy(values.astype(np.float32))[None]
        return plane if name == "depth" else plane / 255
