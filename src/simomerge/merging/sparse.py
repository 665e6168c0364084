"""Sparse task vectors: drop entries at random or by magnitude, then add the rest or elect signs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from simomerge.core.errors import InputError
from simomerge.core.registry import parameter
from simomerge.merging.engine.ranks import rank_mask
from simomerge.merging.engine.stream import TaskVectors
from simomerge.merging.method import MergeMethod, PerExpert, of_expert, register
from simomerge.merging.ties import disjoint_mean

_DARE = "DARE: Language models are super Mario (Yu et al., 2023)", "https://arxiv.org/abs/2311.03099"
_ROUNDING = 1e-9  # 0.95 + 0.1 / 2 need not be exactly 1.


@register("dare-linear", *_DARE)
@dataclass(frozen=True)
class DareLinear(MergeMethod):
    """Drop entries at random, rescale the rest, and add: theta_0 + sum_t scale_t * dare(tau_t) (Yu et al., 2023).

    Each entry is dropped with probability 1 - density. The remaining entries are divided by the density, so that the
    expected task vector is that of the expert. Which entries are dropped depends only on the seed, the expert's name
    and the tensor's name. mergekit's ``dare_linear`` instead rescales to the L1 norm that the tensor had before, and
    draws differently in every run.

    Example:
        >>> task_vectors = {"a": np.ones(8, np.float32)}
        >>> DareLinear(density=0.5, scale=1.0).merge_tensor("w", np.zeros(8, np.float32), task_vectors, None)
        array([2., 2., 0., 2., 2., 0., 0., 2.], dtype=float32)
    """

    density: float = parameter(0.5, above=0.0, high=1.0, help="probability that an entry is kept; 0.5 for 50 percent")
    scale: PerExpert = parameter(0.4, low=0.0, per_expert=True, help="weight of the task vectors, one or per expert")
    seed: int = parameter(0, help="seed of the random drops")

    def merge_tensor(self, name: str, base: np.ndarray, task_vectors: TaskVectors, statistics: Any) -> np.ndarray:
        merged = base.copy()
        for expert, tau in task_vectors.items():
            kept = dare(tau, self.density, random_source(self.seed, expert, name))
            merged += kept * np.float32(of_expert(self.scale, expert))
        return merged


@register("dare-ties", *_DARE)
@dataclass(frozen=True)
class DareTies(MergeMethod):
    """Drop entries at random, rescale the rest, elect signs, and average (DARE before TIES; Yu et al., 2023).

    Entries are dropped as in ``dare-linear``, and there is no trimming. An entry's sign is the sign of the sum of the
    remaining values, and positive if the sum is zero, as in mergekit (the TIES code takes the majority sign of all
    entries). The mean is over the remaining values with that sign. mergekit's ``dare_ties`` rescales to the L1 norm,
    and adds the values instead of averaging them unless it is set to normalise.

    Example:
        >>> task_vectors = {"a": np.array([4.0, 1.0]), "b": np.array([2.0, -1.0])}
        >>> DareTies(density=1.0).merge_tensor("w", np.zeros(2), task_vectors, None)
        array([3., 1.])
    """

    density: float = parameter(0.5, above=0.0, high=1.0, help="probability that an entry is kept; 0.5 for 50 percent")
    scale: float = parameter(1.0, low=0.0, help="weight of the merged task vector")
    seed: int = parameter(0, help="seed of the random drops")

    def merge_tensor(self, name: str, base: np.ndarray, task_vectors: TaskVectors, statistics: Any) -> np.ndarray:
        kept = [dare(tau, self.density, random_source(self.seed, e, name)) for e, tau in task_vectors.items()]
        return base + disjoint_mean(np.stack(kept)) * np.float32(self.scale)


@register("della", "DELLA-Merging (Deep et al., 2024)", "https://arxiv.org/abs/2406.11617")
@dataclass(frozen=True)
class Della(MergeMethod):
    """Drop small entries with a higher probability, rescale the rest, elect signs, and average (Deep et al., 2024).

    MAGPRUNE: in each row (the last axis; a 1-D tensor is one row) the n magnitudes are ranked, from r = 0 for the
    smallest; equal ones go by position. An entry is kept with probability density - epsilon / 2 + epsilon * r / (n - 1)
    (in a row of one entry: density) and divided by that probability. Then, as in ``dare-ties``, the sign of the sum is
    elected (positive if the sum is zero), and the remaining values with that sign are averaged.

    In the authors' code and mergekit the probability covers density ± epsilon, so their epsilon is half of this one.
    mergekit also rescales to the L1 norm instead of dividing by the probabilities, and ranks tensors of more than two
    axes along the second axis.

    Raises:
        InputError: Probabilities outside (0, 1].

    Example:
        >>> task_vectors = {"a": np.array([4.0, 1.0]), "b": np.array([2.0, -1.0])}
        >>> Della(density=1.0, epsilon=0.0).merge_tensor("w", np.zeros(2), task_vectors, None)
        array([3., 1.])
    """

    density: float = parameter(0.5, above=0.0, high=1.0, help="mean probability that an entry is kept")
    epsilon: float = parameter(0.2, low=0.0, high=1.0, help="how much likelier a row's largest entry is kept")
    scale: float = parameter(1.0, low=0.0, help="weight of the merged task vector")
    seed: int = parameter(0, help="seed of the random drops")

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.density - self.epsilon / 2, self.density + self.epsilon / 2
        if low <= _ROUNDING or high > 1 + _ROUNDING:
            raise InputError(
                f"della: density {self.density:g} with epsilon {self.epsilon:g} gives probabilities from {low:g} to "
                f"{high:g}; they must be above 0 and at most 1: choose a smaller epsilon."
            )

    def merge_tensor(self, name: str, base: np.ndarray, task_vectors: TaskVectors, statistics: Any) -> np.ndarray:
        sources = (random_source(self.seed, expert, name) for expert in task_vectors)
        taus = zip(task_vectors.values(), sources, strict=True)
        kept = [magprune(tau, self.density, self.epsilon, source) for tau, source in taus]
        return base + disjoint_mean(np.stack(kept)) * np.float32(self.scale)


@register("breadcrumbs", "Model Breadcrumbs (Davari & Belilovsky, 2023)", "https://arxiv.org/abs/2312.06795")
@dataclass(frozen=True)
class Breadcrumbs(MergeMethod):
    """Drop the largest and the smallest entries of each tensor, then add the rest (Davari & Belilovsky, 2023).

    As in mergekit, int(density * n) of the n entries of a tensor stay. The int(gamma * n) entries of greatest magnitude
    are dropped first, then the smallest. If the density leaves room for fewer than int(gamma * n) drops, fewer of the
    greatest are dropped; density 1 is task arithmetic. Equal magnitudes are ranked by position. Unlike in mergekit, at
    least one entry stays, and a tensor so small that int(gamma * n) is 0 loses no outlier (mergekit drops all of it).
    A public version of the authors' code ranks within each row (the last axis) instead of within the tensor.

    Example:
        >>> task_vectors = {"a": np.array([1.0, -9.0, 3.0, 2.0])}
        >>> Breadcrumbs(density=0.5, gamma=0.25, scale=1.0).merge_tensor("w", np.zeros(4), task_vectors, None)
        array([0., 0., 3., 2.])
    """

    density: float = parameter(0.9, above=0.0, high=1.0, help="fraction of the entries kept; write 0.9 for 90 percent")
    gamma: float = parameter(0.01, low=0.0, high=1.0, help="fraction of the entries dropped as the largest")
    scale: PerExpert = parameter(0.4, low=0.0, per_expert=True, help="weight of the task vectors, one or per expert")

    def merge_tensor(self, name: str, base: np.ndarray, task_vectors: TaskVectors, statistics: Any) -> np.ndarray:
        merged = base.copy()
        for expert, tau in task_vectors.items():
            merged += keep_middle(tau, self.density, self.gamma) * np.float32(of_expert(self.scale, expert))
        return merged


def random_source(seed: int, expert: str, name: str) -> np.random.Generator:
    """Random numbers that depend only on these three values, so that neither order nor threads change a result.

    Example:
        >>> random_source(0, "depth", "w").integers(100, size=3)
        array([23, 74, 79])
    """
    digest = hashlib.sha256(json.dumps([int(seed), expert, name]).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def dare(tau: np.ndarray, density: float, source: np.random.Generator) -> np.ndarray:
    """Keep each entry with probability ``density`` and divide it by the density; set the others to 0. Any shape."""
    kept = source.random(tau.shape, dtype=np.float32) < np.float32(density)
    return np.where(kept, tau / np.float32(density), np.float32(0))


def magprune(tau: np.ndarray, density: float, epsilon: float, source: np.random.Generator) -> np.ndarray:
    """Keep each entry with a probability that depends on its rank, and divide it by that; set the others to 0."""
    rates = keep_probabilities(tau, density, epsilon)
    kept = source.random(tau.shape, dtype=np.float32) < rates
    return np.where(kept, tau / rates, np.float32(0))


def keep_probabilities(tau: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """MAGPRUNE's probability of each entry, float32, linear in the rank of its magnitude in its row.

    Example:
        >>> keep_probabilities(np.array([[1.0, -3.0, 2.0]]), 0.5, 0.5)
        array([[0.25, 0.75, 0.5 ]], dtype=float32)
    """
    length = tau.shape[-1] if tau.ndim else 1
    if length < 2:
        return np.full(tau.shape, density, np.float32)
    by_rank = np.linspace(density - epsilon / 2, min(density + epsilon / 2, 1.0), length, dtype=np.float32)
    # Non-negative floats have the order of their bits. With the position in the lower bits, all keys differ, so sorting
    # them is stable, and several times as fast as argsort(kind="stable").
    keys = np.abs(tau, dtype=np.float32).view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(length, dtype=np.uint64)
    keys.sort(axis=-1)
    order = (keys & np.uint64(0xFFFFFFFF)).astype(np.intp)
    rates = np.empty(tau.shape, np.float32)
    np.put_along_axis(rates, order, np.broadcast_to(by_rank, tau.shape), axis=-1)
    return rates


def keep_middle(tau: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """int(density * size) entries, at least one, without the int(gamma * size) largest and without the smallest.

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
