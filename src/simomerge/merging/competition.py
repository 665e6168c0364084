"""Methods in which task vectors compete: each expert's weight in an entry comes from scores of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, ClassVar, TypeAlias

import numpy as np

from simomerge.core.registry import parameter
from simomerge.merging.engine.ranks import kth_smallest
from simomerge.merging.engine.stream import TaskVectorStream
from simomerge.merging.method import MergeMethod, of_expert, register
from simomerge.merging.sparse import rank_mask

_CLIPPED = 1e-4  # PCB: of the magnitudes, the fraction that is clipped at either end

Bounds: TypeAlias = Mapping[str, Sequence[float]]
"""Expert -> a lower and an upper bound, exact in float32."""


@register
@dataclass(frozen=True)
class Sce(MergeMethod):
    """Select, calculate, erase (Wan et al., 2024: FuseChat), tensor by tensor as in mergekit.

    Select the entries of greatest variance over the experts: int(density * n) of the n entries in which they differ
    (at least one, where mergekit may take none; of equal variances the first); the others stay the base's. The
    coefficient of an expert is the sum of squares of its selected entries, divided by that of all experts. Erase
    entries whose sign is not that of the sum (plus where it is zero). The rest is averaged by the coefficients.

    With one expert, or with equal ones, no entry varies: a density below 1 then gives the base. The authors' code
    uses the selection for the coefficients only and merges all entries. mergekit's present code has all coefficients
    equal where the mean squares add up to less than 1e-6, which those of small task vectors do, and so depends on
    their scale; ours does not.

    Example:
        >>> task_vectors = {"a": np.array([3.0, 1.0, 0.0]), "b": np.array([1.0, -2.0, 0.0])}
        >>> Sce().merge_tensor("w", np.zeros(3), task_vectors, None).round(2)
        array([ 2.33, -2.  ,  0.  ])
    """

    name: ClassVar[str] = "sce"
    paper: ClassVar[str] = "FuseChat (Wan et al., 2024)"
    link: ClassVar[str] = "https://arxiv.org/abs/2408.07990"

    density: float = parameter(1.0, above=0.0, high=1.0, help="fraction of the varying entries kept; 0.1 for 10 %")
    scale: float = parameter(1.0, low=0.0, help="weight of the merged task vector")

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: Mapping[str, np.ndarray], statistics: Any
    ) -> np.ndarray:
        taus = [tau.reshape(-1) for tau in task_vectors.values()]
        if self.density < 1:
            selected = most_varied(taus, self.density)
            taus = [np.where(selected, tau, np.float32(0)) for tau in taus]
        merged = _mean_of_majority(taus, energy_shares(taus)) * np.float32(self.scale)
        return base + merged.reshape(base.shape)


@dataclass(frozen=True)
class PcbStatistics:
    """Of the whole flattened task vectors, per expert: where magnitudes are clipped, and scores cut off and largest."""

    magnitudes: Bounds
    scores: Bounds


@register
@dataclass(frozen=True)
class Pcb(MergeMethod):
    """Weigh every entry by how much it matters in its expert and agrees with the others (Du et al., 2024).

    This is the authors' ``pcb-merging.py``. The flattened vector is all float tensors of the encoder, d entries, T
    experts. Per expert:

    - magnitudes a_t = |tau_t| are clipped to their values of rank int(0.0001 d) and int(0.9999 d - 1), from 0;
    - the score is exp(T * n(a_t)^2) * tanh(tau_t * sum_j tau_j), with n(x) = (x - min x) / (max x - min x);
    - scores below that of rank int((1 - density) d) are raised to it, and the weight is their n(): the entries below
      it, and the one at it, get weight 0.

    The merged task vector is sum_t w_t scale_t sign(tau_t) a_t / max(sum_t w_t, 1e-12). The paper's formulas differ:
    a softmax of the products in place of exp and tanh, with a sum over pairs of experts. The authors' script for
    vision clips 0.01 at either end and has normalised task vectors in tanh's sum; a method of that name once in
    mergekit follows the formulas tensor by tensor. With all magnitudes or all scores equal, where the authors' code
    divides by zero, n() is 0 here.

    Example:
        >>> base = {"w": np.zeros(4, np.float32)}
        >>> experts = {"a": {"w": np.array([0.8, 0.6, -0.2, 0.1])}, "b": {"w": np.array([0.4, 0.9, 0.3, -0.1])}}
        >>> method, stream = Pcb(density=0.75), TaskVectorStream(base, experts)
        >>> method.merge_tensor("w", base["w"], stream.read("w")[1], method.prepare(stream)).round(2)
        array([0.53, 0.5 , 0.  , 0.  ], dtype=float32)
    """

    name: ClassVar[str] = "pcb"
    paper: ClassVar[str] = "Parameter Competition Balancing (Du et al., 2024)"
    link: ClassVar[str] = "https://arxiv.org/abs/2410.02396"
    elementwise: ClassVar[bool] = True
    needs_statistics: ClassVar[bool] = True

    density: float = parameter(0.1, above=0.0, high=1.0, help="fraction of the entries that get a weight")
    scale: float | Sequence[float] | Mapping[str, float] = parameter(
        1.0, low=0.0, per_expert=True, help="weight of the task vectors: one number, or one per expert"
    )

    def prepare(self, stream: TaskVectorStream) -> PcbStatistics:
        """Two passes for exact order statistics: of the magnitudes, and of the scores, which need the first."""
        size = sum(stream.sizes.values())
        if not size:
            return PcbStatistics({}, {})
        clip = [int(size * _CLIPPED) + 1, int(size * (1 - _CLIPPED) - 1) + 1]
        magnitudes = kth_smallest(stream, _magnitudes, dict.fromkeys(stream.experts, clip))
        cut = [min(int(size * (1 - self.density)) + 1, size), size]
        scores = kth_smallest(stream, partial(pcb_scores, magnitudes=magnitudes), dict.fromkeys(stream.experts, cut))
        return PcbStatistics(magnitudes, scores)

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: Mapping[str, np.ndarray], statistics: PcbStatistics
    ) -> np.ndarray:
        bounds = statistics.magnitudes
        merged, total = np.zeros_like(base), np.zeros_like(base)
        for expert, score in pcb_scores(task_vectors, bounds).items():
            scale = of_expert(self.scale, expert)  # type: ignore[arg-type]
            tau, weight = task_vectors[expert], _normalised(score, statistics.scores[expert])
            total += weight
            merged += weight * np.sign(tau) * _clipped(np.abs(tau), bounds[expert]) * np.float32(scale)
        return base + merged / np.maximum(total, np.float32(1e-12))


def most_varied(taus: Sequence[np.ndarray], density: float) -> np.ndarray:
    """Which entries vary most over the experts: int(density * n) of the n that vary at all, but at least one of them.

    Args:
        taus: one array per expert, 1-D and of one length.

    Returns:
        bool, the shape of each.

    Example:
        >>> most_varied([np.array([0.0, 1.0, 5.0, 2.0]), np.array([0.0, 3.0, 2.0, 2.5])], 0.4)
        array([False, False,  True, False])
    """
    # In float64, in which the mean of equal float32 values is that value and their variance exactly zero.
    mean = reduce(np.add, (tau.astype(np.float64) for tau in taus)) / len(taus)
    spread = reduce(np.add, (np.square(tau - mean) for tau in taus))
    varying = int(np.count_nonzero(spread))
    if not varying:
        return np.zeros(spread.shape, bool)
    return rank_mask(-spread, 0, max(int(density * varying), 1))


def energy_shares(taus: Sequence[np.ndarray]) -> list[float]:
    """The sum of squares of each expert's entries as a fraction of all; equal shares if all are zero.

    Example:
        >>> energy_shares([np.array([3.0, 0.0]), np.array([0.0, 1.0])])
        [0.9, 0.1]
    """
    energies = [float(np.square(tau, dtype=np.float64).sum()) for tau in taus]
    total = sum(energies)
    return [energy / total if total else 1 / len(taus) for energy in energies]


def pcb_scores(task_vectors: Mapping[str, np.ndarray], magnitudes: Bounds) -> dict[str, np.ndarray]:
    """PCB's scores, up to a factor: exp(T * importance in the expert) * tanh(agreement with the sum of all).

    Args:
        task_vectors: expert -> float32, all of one shape.
        magnitudes: expert -> the bounds to which its magnitudes are clipped.

    Returns:
        expert -> scores of that shape; negative where the expert has not the sign of the sum.
    """
    total = reduce(np.add, task_vectors.values())
    scores = {}
    for expert, tau in task_vectors.items():
        importance = np.square(_normalised(np.abs(tau), magnitudes[expert]))
        # Less one, which scales all scores of an expert and so changes no weight: exp cannot overflow.
        scores[expert] = np.exp((importance - np.float32(1)) * np.float32(len(task_vectors))) * np.tanh(tau * total)
    return scores


def _normalised(values: np.ndarray, bounds: Sequence[float]) -> np.ndarray:
    """0 at or below the lower bound, 1 at or above the upper one; all 0 where they are the same."""
    low, high = bounds
    return (_clipped(values, bounds) - np.float32(low)) / np.float32(high - low if high > low else 1)


def _clipped(values: np.ndarray, bounds: Sequence[float]) -> np.ndarray:
    return np.clip(values, np.float32(bounds[0]), np.float32(bounds[1]))


def _magnitudes(task_vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {expert: np.abs(tau) for expert, tau in task_vectors.items()}


def _mean_of_majority(taus: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Per entry the weighted mean of the values that have the sign of the sum, 0 where there is none. All 1-D."""
    positive = reduce(np.add, taus) >= 0
    merged = np.zeros_like(taus[0])
    total = np.zeros_like(taus[0])
    for tau, weight in zip(taus, weights, strict=True):
        share = np.where(positive, tau > 0, tau < 0) * np.float32(weight)
        total += share
        share *= tau
        merged += share
    return merged / np.where(total == 0, np.float32(1), total)
