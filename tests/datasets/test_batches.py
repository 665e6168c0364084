"""Batches depend on nothing but the seed and the step."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simomerge.datasets.batches import ordered_batches, training_batches


class Numbers:
    """Samples that say which they are."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": torch.tensor(index), "lists": [torch.full((2,), index), torch.zeros(1)]}


def noisy(sample: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
    return {**sample, "noise": torch.tensor(generator.random())}


def indices(loader: Any) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader]


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 12),
    batch_size=st.integers(1, 15),
    steps=st.integers(0, 20),
    start=st.integers(0, 20),
    seed=st.integers(0, 2**31),
)
def test_a_run_that_starts_at_a_step_sees_the_tail_of_the_full_run(
    count: int, batch_size: int, steps: int, start: int, seed: int
) -> None:
    start = min(start, steps)
    full = list(training_batches(Numbers(count), batch_size, steps, seed, transform=noisy))
    tail = list(training_batches(Numbers(count), batch_size, steps, seed, start=start, transform=noisy))
    assert len(full) == steps and len(tail) == steps - start
    for expected, got in zip(full[start:], tail, strict=True):
        assert torch.equal(expected["index"], got["index"]) and torch.equal(expected["noise"], got["noise"])


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 12), batch_size=st.integers(1, 12), epochs=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_epoch_is_a_permutation_without_its_short_batch(
    count: int, batch_size: int, epochs: int, seed: int
) -> None:
    size = min(batch_size, count)
    per_epoch = count // size
    batches = indices(training_batches(Numbers(count), batch_size, epochs * per_epoch, seed))
    assert all(len(batch) == size for batch in batches)
    for epoch in range(epochs):
        found = list(chain(*batches[epoch * per_epoch : (epoch + 1) * per_epoch]))
        assert len(set(found)) == len(found) == per_epoch * size and set(found) <= set(range(count))


def test_epochs_and_seeds_differ_in_their_order() -> None:
    first, second = indices(training_batches(Numbers(64), 64, 2, seed=0))
    (other,) = indices(training_batches(Numbers(64), 64, 1, seed=1))
    assert sorted(first) == sorted(second) == sorted(other) == list(range(64))
    assert first != second and first != other and first != list(range(64))


def test_augmentation_differs_between_epochs_and_samples_but_not_between_runs() -> None:
    runs = [list(training_batches(Numbers(8), 8, 2, seed=3, transform=noisy)) for _ in range(2)]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one["noise"], other["noise"])
    noise = torch.cat([batch["noise"] for batch in runs[0]])
    assert len(noise.unique()) == 16


def test_lists_of_tensors_are_batched_one_by_one() -> None:
    (batch,) = training_batches(Numbers(4), 4, 1, seed=0)
    assert [tuple(part.shape) for part in batch["lists"]] == [(4, 2), (4, 1)]
    assert torch.equal(batch["lists"][0][:, 0], batch["index"])


def test_ordered_batches_give_every_sample_once_in_order_and_a_short_last_batch() -> None:
    assert indices(ordered_batches(Numbers(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
