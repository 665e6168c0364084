"""Sparse task vectors: drop entries at random or by magnitude, then add what is left or elect signs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from simomerge.core.errors import InputError
from simomerge.core.registry import parameter
from simomerge.merging.method import MergeMethod, of_expert, register
from simomerge.merging.ties import disjoint_mean

_ROUNDING = 1e-9  # 0.95 + 0.1 / 2 need not be exactly 1


@register
@dataclass(frozen=True)
class DareLinear(MergeMethod):
    """Drop at random, rescale and add: theta_0 + sum_t scale_t * dare(tau_t) (Yu et al., 2023).

    Each entry is dropped with probability 1 - density and the survivors are divided by the density, so that the
    expected task vector is the expert's. What is dropped depends on the seed, the expert's name and the tensor's
    name only. mergekit's ``dare_linear`` instead rescales what survives to the L1 norm that the tensor had, and
    draws anew in every run.

    Example:
        >>> task_vectors = {"a": np.ones(8, np.float32)}
        >>> DareLinear(density=0.5, scale=1.0).merge_tensor("w", np.zeros(8, np.float32), task_vectors, None)
        array([2., 2., 0., 2., 2., 0., 0., 2.], dtype=float32)
    """

    name: ClassVar[str] = "dare-linear"
    paper: ClassVar[str] = "DARE: Language models are super Mario (Yu et al., 2023)"
    link: ClassVar[str] = "https://arxiv.org/abs/2311.03099"

    density: float = parameter(0.5, above=0.0, high=1.0, help="probability that an entry is kept; 0.5 for 50 percent")
    scale: float | Sequence[float] | Mapping[str, float] = parameter(
        0.4, low=0.0, per_expert=True, help="weight of the task vectors: one number, or one per expert"
    )
    seed: int = parameter(0, help="of the random drops")

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: Mapping[str, np.ndarray], statistics: Any
    ) -> np.ndarray:
        merged = base.copy()
        for expert, tau in task_vectors.items():
            scale = of_expert(self.scale, expert)  # type: ignore[arg-type]
            merged += dare(tau, self.density, random_source(self.seed, expert, name)) * np.float32(scale)
        return merged


@register
@dataclass(frozen=True)
class DareTies(MergeMethod):
    """Drop at random, rescale, elect signs and average (Yu et al., 2023: DARE before TIES).

    Drops as ``dare-linear``. There is no trimming. An entry's sign is the sign of the sum of what survives, plus
    where that is zero, as in mergekit (the TIES code takes the majority sign of all entries); the mean is over the
    survivors of that sign. mergekit's ``dare_ties`` rescales to the L1 norm, and adds up rather than averages
    unless told to normalise.

    Example:
        >>> task_vectors = {"a": np.array([4.0, 1.0]), "b": np.array([2.0, -1.0])}
        >>> DareTies(density=1.0).merge_tensor("w", np.zeros(2), task_vectors, None)
        array([3., 1.])
    """

    name: ClassVar[str] = "dare-ties"
    paper: ClassVar[str] = "DARE: Language models are super Mario (Yu et al., 2023)"
    link: ClassVar[str] = "https://arxiv.org/abs/2311.03099"

    density: float = parameter(0.5, above=0.0, high=1.0, help="probability that an entry is kept; 0.5 for 50 percent")
    scale: float = parameter(1.0, low=0.0, help="weight of the merged task vector")
    seed: int = parameter(0, help="of the random drops")

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: Mapping[str, np.ndarray], statistics: Any
    ) -> np.ndarray:
        kept = [dare(tau, self.density, random_source(self.seed, e, name)) for e, tau in task_vectors.items()]
        return base + _elected_mean(kept) * np.float32(self.scale)


@register
@dataclass(frozen=True)
class Della(MergeMethod):
    """Drop small entries more often than large ones, rescale, elect signs and average (Deep et al., 2024).

    MAGPRUNE: in each row (the last axis; a 1-D tensor is one row) the magnitudes are ranked, r = 0 for the smallest
    of n, equal ones by position. An entry is kept with probability density - epsilon / 2 + epsilon * r / (n - 1)
    (a row of one: density) and divided by that probability. Then, as in ``dare-ties``, the sign of the sum is
    elected (plus where it is zero) and the survivors that have it are averaged.

    The authors' code and mergekit let the probability run over density ± epsilon, so their epsilon is half of this
    one. mergekit also rescales to the L1 norm rather than by the probabilities, and ranks tensors of more than two
    axes along the second one.

    Raises:
        InputError: probabilities outside (0, 1].

    Example:
        >>> task_vectors = {"a": np.array([4.0, 1.0]), "b": np.array([2.0, -1.0])}
        >>> Della(density=1.0, epsilon=0.0).merge_tensor("w", np.zeros(2), task_vectors, None)
        array([3., 1.])
    """

    name: ClassVar[str] = "della"
    paper: ClassVar[str] = "DELLA-Merging (Deep et al., 2024)"
    link: ClassVar[str] = "https://arxiv.org/abs/2406.11617"

    density: float = parameter(0.5, above=0.0, high=1.0, help="mean probability that an entry is kept")
    epsilon: float = parameter(0.2, low=0.0, high=1.0, help="how much likelier a row's largest entry is kept")
    scale: float = parameter(1.0, low=0.0, help="weight of the merged task vector")
    seed: int = parameter(0, help="of the random drops")

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.density - self.epsilon / 2, self.density + self.epsilon / 2
        if low <= _ROUNDING or high > 1 + _ROUNDING:
            raise InputError(
                f"della: density {self.density:g} with epsilon {self.epsilon:g} gives probabilities from {low:g} to "
                f"{high:g}; they must be above 0 and at most 1: choose a smaller epsilon."
            )

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: Mapping[str, np.ndarray], statistics: Any
    ) -> np.ndarray:
        kept = [
            magprune(tau, self.density, self.epsilon, random_source(self.seed, expert, name))
            for expert, tau in task_vectors.items()
        ]
        return base + _elected_mean(kept) * np.float32(self.scale)


@register
@dataclass(frozen=True)
class Breadcrumbs(MergeMethod):
    """Drop the largest and the smallest entries of each tensor, then add (Davari & Belilovsky, 2023).

    As in mergekit, of a tensor of n entries int(density * n) stay: the int(gamma * n) of greatest magnitude go, and
    of the others the smallest. Where fewer than int(gamma * n) may go (a density near 1), fewer of the greatest go,
    and at density 1 this is task arithmetic. Equal magnitudes are ranked by position. Unlike mergekit, at least one
    entry stays, and a tensor so small that int(gamma * n) is 0 loses no outlier (mergekit drops all of it). A public
    version of the authors' code ranks within each row (the last axis) rather than within the tensor.

    Example:
        >>> task_vectors = {"a": np.array([1.0, -9.0, 3.0, 2.0])}
        >>> Breadcrumbs(density=0.5, gamma=0.25, scale=1.0).merge_tensor("w", np.zeros(4), task_vectors, None)
        array([0., 0., 3., 2.])
    """

    name: ClassVar[str] = "breadcrumbs"
    paper: ClassVar[str] = "Model Breadcrumbs (Davari & Belilovsky, 2023)"
    link: ClassVar[str] = "https://arxiv.org/abs/2312.06795"

    density: float = parameter(0.9, above=0.0, high=1.0, help="fraction of the entries kept; write 0.9 for 90 percent")
    gamma: float = parameter(0.01, low=0.0, high=1.0, help="fraction of the entries dropped as the largest")
    scale: float | Sequence[float] | Mapping[str, float] = parameter(
        0.4, low=0.0, per_expert=True, help="weight of the task vectors: one number, or one per expert"
    )

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: Mapping[str, np.ndarray], statistics: Any
    ) -> np.ndarray:
        merged = base.copy()
        for expert, tau in task_vectors.items():
            scale = of_expert(self.scale, expert)  # type: ignore[arg-type]
            merged += keep_middle(tau, self.density, self.gamma) * np.float32(scale)
        return merged


def random_source(seed: int, expert: str, name: str) -> np.random.Generator:
    """Random numbers that depend on these three alone, so that neither order nor threads change a result.

    Example:
        >>> random_source(0, "depth", "w").integers(100, size=3)
        array([23, 74, 79])
    """
    digest = hashlib.sha256(json.dumps([int(seed), expert, name]).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def dare(tau: np.ndarray, density: float, source: np.random.Generator) -> np.ndarray:
    """Each entry kept with probability ``density`` and divided by it; the others 0. Any shape."""
    kept = source.random(tau.shape, dtype=np.float32) < np.float32(density)
    return np.where(kept, tau / np.float32(density), np.float32(0))


def magprune(tau: np.ndarray, density: float, epsilon: float, source: np.random.Generator) -> np.ndarray:
    """Each entry kept with the probability that its rank in its row has, and divided by it; the others 0."""
    rates = keep_probabilities(tau, density, epsilon)
    kept = source.random(tau.shape, dtype=np.float32) < rates
    return np.where(kept, tau / rates, np.float32(0))


def keep_probabilities(tau: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """MAGPRUNE's probability of each entry, float32: linear in the rank of its magnitude in its row.

    Example:
        >>> keep_probabilities(np.array([[1.0, -3.0, 2.0]]), 0.5, 0.5)
        array([[0.25, 0.75, 0.5 ]], dtype=float32)
    """
    length = tau.shape[-1] if tau.ndim else 1
    if length < 2:
        return np.full(tau.shape, density, np.float32)
    by_rank = np.linspace(density - epsilon / 2, min(density + epsilon / 2, 1.0), length, dtype=np.float32)
    # Floats that are not negative are in the order of their bits. With the position below them all keys differ:
    # sorting is then stable, and several times as fast as argsort(kind="stable").
    keys = np.abs(tau, dtype=np.float32).view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(length, dtype=np.uint64)
    keys.sort(axis=-1)
    order = (keys & np.uint64(0xFFFFFFFF)).astype(np.intp)
    rates = np.empty(tau.shape, np.float32)
    np.put_along_axis(rates, order, np.broadcast_to(by_rank, tau.shape), axis=-1)
    return rates


def keep_middle(tau: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """int(density * size) entries, at least one: without the int(gamma * size) largest and without the smallest.

    Example:
        >>> keep_middle(np.array([1.0, -9.0, 3.0, 2.0]), density=0.75, gamma=0.5)
        array([1., 0., 3., 2.])
    """
    count = max(int(density * tau.size), 1)
    if count >= tau.size:
        return tau
    largest = min(int(gamma * tau.size), tau.size - count)
    high = tau.size - largest
    mask = rank_mask(np.abs(tau).reshape(-1), high - count, high)
    return np.where(mask.reshape(tau.shape), tau, np.float32(0))


def rank_mask(values: np.ndarray, low: int, high: int) -> np.ndarray:
    """Which entries have a rank from ``low`` to ``high - 1``: 0 for the smallest, equal values by position.

    Args:
        values: 1-D, no NaN. low, high: ``0 <= low < high <= len(values)``.

    Returns:
        bool, ``high - low`` of them true.

    Example:
        >>> rank_mask(np.array([3.0, 1.0, 1.0, 2.0]), 1, 3)
        array([False, False,  True,  True])
    """
    ordered = np.partition(values, (low, high - 1))
    smallest, largest = ordered[low], ordered[high - 1]
    mask = (values >= smallest) & (values <= largest)
    # Of the values equal to an end some may lie outside: the first ones at the lower end, the last at the upper.
    too_low = low - int(np.count_nonzero(values < smallest))
    too_high = len(values) - high - int(np.count_nonzero(values > largest))
    mask[np.flatnonzero(values == smallest)[:too_low]] = False
    if too_high:
        mask[np.flatnonzero(values == largest)[-too_high:]] = False
    return mask


def _elected_mean(kept: Sequence[np.ndarray]) -> np.ndarray:
    # Flat: in-place arithmetic needs arrays, and numpy makes a number of an array without axes.
    return disjoint_mean(np.stack(kept))
