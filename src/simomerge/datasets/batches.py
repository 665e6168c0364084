"""Batches that depend only on (seed, step): a run that was killed continues with the next batch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from simomerge.core import distributed
from simomerge.core.schema import check_whole

Sample = dict[str, Any]
Transform = Callable[[Sample, np.random.Generator], Sample]


BATCH_PIXELS = 1 << 21
"""The largest number of pixels in a batch where no gradient is needed, unless it is a single image."""


def images_within(batch_size: int, image: torch.Tensor, max_pixels: int = BATCH_PIXELS) -> int:
    """How many images (3, H, W) of one size a batch has: at most ``batch_size``, of at most ``max_pixels`` together.

    A single image may have more pixels. Raises InputError for a ``batch_size`` below 1.

    Example:
        >>> images_within(64, torch.zeros(3, 64, 80)), images_within(64, torch.zeros(3, 1024, 2048))
        (64, 1)
    """
    check_whole("batch_size", batch_size)
    pixels = image.shape[-2] * image.shape[-1]
    return min(batch_size, max(1, max_pixels // pixels))


class _Seeded(Dataset[Sample]):
    """A dataset indexed by (index, seed), so that augmentation is reproducible."""

    def __init__(self, dataset: Any, transform: Transform | None) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, tuple[int, ...]]) -> Sample:
        index, seed = key
        sample = self.dataset[index]
        return self.transform(sample, np.random.default_rng(seed)) if self.transform else sample


class _Steps:
    """Batch sampler: a batch of (index, seed) for each step from ``start``, in a new order every epoch."""

    def __init__(self, count: int, batch_size: int, start: int, steps: int, seed: int) -> None:
        self.count = count
        self.batch_size = min(batch_size, count)
        self.start = start
        self.steps = steps
        self.seed = seed

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
        per_epoch = self.count // self.batch_size
        epoch, order = -1, np.arange(self.count)
        for step in range(self.start, self.steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            first = (step % per_epoch) * self.batch_size
            batch = order[first : first + self.batch_size].tolist()
            yield [(i, (self.seed, step, i)) for i in distributed.share(batch)]


def training_batches(
    dataset: Any,
    batch_size: int,
    steps: int,
    seed: int,
    start: int = 0,
    transform: Transform | None = None,
    loader_workers: int = 0,
) -> DataLoader[Sample]:
    """``steps - start`` shuffled batches; the batch of a step does not depend on ``start``.

    Under torchrun each process gets its share of every batch.

    Args:
        dataset: map-style; samples are dicts of tensors or of lists of tensors.
        batch_size: samples per batch, at most the dataset's size. A last short batch of an epoch is left out.
        steps: the number of steps of the full run.
        seed: seed of the order and of the augmentation.
        start: the first step.
        transform: augmentation ``(sample, generator) -> sample``.
        loader_workers: processes that read and augment; with 0, this process does.
    """
    return DataLoader(
        _Seeded(dataset, transform),
        batch_sampler=_Steps(len(dataset), batch_size, start, steps, seed),
        num_workers=loader_workers,
        collate_fn=default_collate,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=_context(loader_workers),
    )


def ordered_batches(dataset: Any, batch_size: int, loader_workers: int = 0, shared: bool = False) -> DataLoader[Sample]:
    """Every sample once, in order; the last batch may be short.

    Args:
        shared: under torchrun, only this process's share of the batches.
    """
    places = list(range(len(dataset)))
    batches = [places[first : first + batch_size] for first in range(0, len(places), batch_size)]
    return DataLoader(
        dataset,
        batch_sampler=distributed.share(batches) if shared else batches,
        num_workers=loader_workers,
        collate_fn=default_collate,
        multiprocessing_context=_context(loader_workers),
    )


def ordered_batches_of_all(dataset: Any, batch_size: int) -> Iterator[tuple[Sample, bool]]:
    """This process's share of the batches, equally many in all processes, and whether each counts.

    A process that has a batch less than others gets the first sample again, which does not count.
    """
    for batch in ordered_batches(dataset, batch_size, shared=True):
        yield batch, True
    left = -(-len(dataset) // batch_size) % distributed.processes()
    if left and distributed.rank() >= left:
        yield default_collate([dataset[0]]), False


def _context(loader_workers: int) -> str | None:
    """How a loader starts its processes. In a worker of loky the default is loky's own, which cannot start them."""
    if not loader_workers:
        return None
    return "fork" if sys.platform == "linux" else "spawn"
