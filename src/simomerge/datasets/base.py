"""The one interface of all datasets: map-style, samples are dicts of tensors."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from simomerge.core.errors import InputError
from simomerge.datasets.tasks import Task, select_tasks


class DenseDataset(Dataset[dict[str, Any]], ABC):
    """Images with dense targets of one or more tasks.

    A sample is ``{"image": float (3, H, W) RGB in [0, 1], TASK: target, ...}`` with targets as in
    `simomerge.datasets.tasks.KINDS`. A new dataset gives `image`, `targets` and a length.

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
        """See to it that what the samples are read from is there, where that is files. Raises InputError."""
        return

    def fingerprint(self) -> str:
        """What tells this data from other data by the same name; empty where the name says it all."""
        return ""

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._count:
            raise IndexError(f"sample {index} of {self._count}")
        return {"image": self.image(index), **self.targets(index, self.tasks)}

    def select(self, tasks: str | Iterable[str]) -> DenseDataset:
        """The same images with some of the tasks.

        Raises:
            InputError: a task the dataset lacks.
        """
        chosen = copy.copy(self)
        chosen.tasks = select_tasks(self.tasks, tasks)
        return chosen

    def take(self, count: int) -> DenseDataset:
        """``count`` of the images: the first, where the dataset knows nothing better.

        Raises:
            InputError: fewer are there.
        """
        if not 1 <= count <= self._count:
            raise InputError(f"{count} images asked for; the split has {self._count}.")
        chosen = copy.copy(self)
        chosen._count = count
        return chosen

    def skip(self, count: int) -> DenseDataset:
        """All images but those that `take` takes.

        Raises:
            InputError: none is left.
        """
        if not 0 <= count < self._count:
            raise InputError(f"all but {count} images asked for; the split has {self._count}.")
        return _Rest(self, count) if count else self


class _Rest(DenseDataset):
    """A dataset without its first images."""

    def __init__(self, whole: DenseDataset, start: int) -> None:
        super().__init__(whole.tasks, len(whole) - start)
        self.whole = whole
        self.start = start

    def image(self, index: int) -> Tensor:
        return self.whole.image(self.start + index)

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        return self.whole.targets(self.start + index, tasks)

    def check_files(self, deeply: bool = False) -> None:
        self.whole.check_files(deeply)

    def fingerprint(self) -> str:
        return self.whole.fingerprint()


def check_size(size: Any) -> None:
    """Raises InputError unless ``size`` is a height and a width in pixels."""
    pair = isinstance(size, (tuple, list)) and len(size) == 2
    if not pair or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in size):
        raise InputError(f"size {size!r}; give [height, width] in pixels.")


def random_flip(tasks: Mapping[str, Task], sample: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
    """Mirror a sample left to right with probability one half; the x of normals changes its sign."""
    if generator.random() < 0.5:
        return sample
    flipped = {key: value.flip(-1) for key, value in sample.items()}
    for name, task in tasks.items():
        if task.kind == "normals" and name in flipped:
            flipped[name][0] = -flipped[name][0]
    return flipped
