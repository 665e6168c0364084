"""The interface of all datasets: map-style, samples are dicts of tensors."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from simomerge.core.errors import InputError
from simomerge.core.schema import check_whole
from simomerge.datasets.tasks import Task, select_tasks


class DenseDataset(Dataset[dict[str, Any]], ABC):
    """Images with dense targets of one or more tasks.

    A sample is ``{"image": float (3, H, W) RGB in [0, 1], TASK: target, ...}`` with targets as in
    `simomerge.datasets.tasks.KINDS`. A new dataset implements `image` and `targets`, and passes its length on.

    Attributes:
        tasks: the tasks whose targets a sample holds.
    """

    tasks: dict[str, Task]

    def __init__(self, tasks: Mapping[str, Task], count: int) -> None:
        self.tasks = dict(tasks)
        self._count = count

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """Image ``index``, float (3, H, W), RGB in [0, 1]."""

    @abstractmethod
    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        """The named targets of image ``index``, without decoding the image."""

    def check_files(self, deeply: bool = False) -> None:
        """Check that all sample files exist and, if ``deeply``, that none is truncated. Raises InputError."""
        return

    def fingerprint(self) -> str:
        """Changes when the data behind the same name changes; empty if the name always means the same data."""
        return ""

    def group(self, index: int) -> str:
        """The name of the folder or sequence that an image belongs to; empty if the dataset has no groups."""
        return ""

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._count:
            raise IndexError(f"sample {index} of {self._count}")
        return {"image": self.image(index), **self.targets(index, self.tasks)}

    def select(self, tasks: str | Iterable[str]) -> DenseDataset:
        """The same images with some of the tasks. Raises InputError if the dataset does not have one of them."""
        chosen = copy.copy(self)
        chosen.tasks = select_tasks(self.tasks, tasks)
        return chosen

    def take(self, count: int) -> DenseDataset:
        """``count`` of the images: the first ones, or those that the dataset's kind spreads over all of them.

        Raises:
            InputError: there are fewer, or ``count`` is no whole number of 1 or more.
        """
        check_whole("count", count)
        if count > len(self):
            raise InputError(f"{count} images asked for; the split has {len(self)}.")
        return self._subset(self._picked(count))

    def up_to(self, count: int | None) -> DenseDataset:
        """``take(count)``, or all images if there are fewer or by default. Raises InputError for a count below 1."""
        if count is None:
            return self
        check_whole("count", count)
        return self.take(min(count, len(self)))

    def skip(self, count: int) -> DenseDataset:
        """All images except those that ``take(count)`` returns.

        Raises:
            InputError: no image is left, or ``count`` is no whole number of 0 or more.
        """
        check_whole("skip", count, 0)
        if count >= len(self):
            raise InputError(f"all but {count} images asked for; the split has {len(self)}.")
        if not count:
            return self
        picked = set(self._picked(count))
        return self._subset([index for index in range(len(self)) if index not in picked])

    def _picked(self, count: int) -> Sequence[int]:
        """The indices of the images that ``take(count)`` returns, in ascending order."""
        return range(count)

    def _subset(self, indices: Sequence[int]) -> DenseDataset:
        """Some of the images, in this order."""
        return _Subset(self, indices)


class Joined(DenseDataset):
    """Several datasets one after the other, with the tasks that all of them have."""

    def __init__(self, parts: Sequence[DenseDataset]) -> None:
        shared = {name: task for name, task in parts[0].tasks.items() if all(name in part.tasks for part in parts)}
        super().__init__(shared, sum(map(len, parts)))
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def image(self, index: int) -> Tensor:
        part, place = self._place(index)
        return part.image(place)

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        part, place = self._place(index)
        return part.targets(place, tasks)

    def group(self, index: int) -> str:
        part, place = self._place(index)
        return part.group(place)

    def check_files(self, deeply: bool = False) -> None:
        for part in self.parts:
            part.check_files(deeply)

    def fingerprint(self) -> str:
        return " ".join(part.fingerprint() for part in self.parts).strip()

    def _picked(self, count: int) -> Sequence[int]:
        return spread(len(self), count)

    def _place(self, index: int) -> tuple[DenseDataset, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[which], index - int(self._ends[which]) + len(self.parts[which])


class _Subset(DenseDataset):
    """Some images of a dataset."""

    def __init__(self, source: DenseDataset, indices: Sequence[int]) -> None:
        super().__init__(source.tasks, len(indices))
        self.source = source
        self.indices = indices

    def image(self, index: int) -> Tensor:
        return self.source.image(self.indices[index])

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        return self.source.targets(self.indices[index], tasks)

    def group(self, index: int) -> str:
        return self.source.group(self.indices[index])

    def check_files(self, deeply: bool = False) -> None:
        self.source.check_files(deeply)

    def fingerprint(self) -> str:
        return self.source.fingerprint()


def spread(total: int, count: int) -> list[int]:
    """``count`` of the numbers below ``total``, spread evenly; a larger count includes those of a smaller one.

    They are the first ones in the order of the fractions of multiples of the golden ratio.
    """
    order = np.argsort(np.arange(total) * ((5**0.5 - 1) / 2) % 1)
    return sorted(order[:count].tolist())


def check_size(size: Any, place: str = "") -> None:
    """Raises InputError unless ``size`` is a height and a width in pixels. The message starts with ``place``."""
    pair = isinstance(size, (tuple, list)) and len(size) == 2
    if not pair or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in size):
        raise InputError(f"{place}size {size!r}; give [height, width] in pixels.")


def random_flip(tasks: Mapping[str, Task], sample: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
    """Mirror a sample left to right with probability one half; x of normals and of flow changes its sign."""
    if generator.random() < 0.5:
        return sample
    flipped = {key: value.flip(-1) for key, value in sample.items()}
    for name, task in tasks.items():
        if task.behaviour.directed and name in flipped:
            flipped[name][0] = -flipped[name][0]
    return flipped
