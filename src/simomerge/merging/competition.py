"""Methods in which task vectors compete: an expert's weight in an entry comes from scores of all experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, TypeAlias

import numpy as np

from simomerge.core.registry import parameter
from simomerge.merging.engine.ranks import kth_smallest, magnitudes, rank_mask
from simomerge.merging.engine.stream import TaskVectors, TaskVectorStream
from simomerge.merging.method import MergeMethod, PerExpert, of_expert, register

_CLIPPED = 1e-4  # PCB: the fraction of the magnitudes that is clipped at either end.

Bounds: TypeAlias = Mapping[str, Sequence[float]]
"""Expert -> a lower and an upper bound, exact in float32."""


@register("sce", "FuseChat (Wan et al., 2024)", "https://arxiv.org/abs/2408.07990")
@dataclass(frozen=True)
class Sce(MergeMethod):
    """Select the entries that vary most, erase minority signs, average by energy (FuseChat, Wan et al., 2024).

    "Select, calculate, erase", for each tensor as in mergekit. Select: of the n entries in which the experts differ,
    the int(density * n) of greatest variance over the experts (at least one, where mergekit may select none; of equal
    variances the first). The other entries stay the base's. Calculate: the coefficient of an expert is the sum of
    squares of its selected entries, divided by that of all experts. Erase: drop the values whose sign is not that of
    the sum (positive if the sum is zero). The rest is averaged with the coefficients.

    With one expert, or with identical ones, no entry varies, so a density below 1 gives the base. The authors' code
    uses the selection for the coefficients only and merges all entries. mergekit's present code makes all coefficients
    equal if the mean squares add up to less than 1e-6. This is so for small task vectors, so its result depends on
    their scale; ours does not.

    Example:
        >>> task_vectors = {"a": np.array([3.0, 1.0, 0.0]), "b": np.array([1.0, -2.0, 0.0])}
        >>> Sce().merge_tensor("w", np.zeros(3), task_vectors, None).round(2)
        array([ 2.33, -2.  ,  0.  ])
    """

    density: float = parameter(1.0, above=0.0, high=1.0, help="fraction of the varying entries kept; 0.1 for 10 %")
    scale: float = parameter(1.0, low=0.0, help="weight of the merged task vector")

    def merge_tensor(self, name: str, base: np.ndarray, task_vectors: TaskVectors, statistics: Any) -> np.ndarray:
        taus = [tau.reshape(-1) for tau in task_vectors.values()]
        if self.density < 1:
            selected = most_varied(taus, self.density)
            taus = [np.where(selected, tau, np.float32(0)) for tau in taus]
        merged = _mean_of_majority(taus, energy_shares(taus)) * np.float32(self.scale)
        return base + merged.reshape(base.shape)


@dataclass(frozen=True)
class PcbStatistics:
    """Bounds over the flattened task vector of each expert: for its magnitudes and for its scores."""

    magnitudes: Bounds
    scores: Bounds


@register("pcb", "Parameter Competition Balancing (Du et al., 2024)", "https://arxiv.org/abs/2410.02396")
@dataclass(frozen=True)
class Pcb(MergeMethod):
    """Weight each entry by its importance in its expert and its agreement with the others (Du et al., 2024).

    This follows the authors' ``pcb-merging.py``. All float tensors of the encoder form one vector of d entries; there
    are T experts. For each expert:

    - The magnitudes a_t = |tau_t| are clipped to their values of rank int(0.0001 d) and int(0.9999 d - 1), from 0.
    - The score is exp(T * n(a_t)^2) * tanh(tau_t * sum_j tau_j), with n(x) = (x - min x) / (max x - min x).
    - Scores below that of rank int((1 - density) d) are raised to it. The weights are n() of the result, so the entries
      up to that rank get weight 0.

    The merged task vector is sum_t w_t scale_t sign(tau_t) a_t / max(sum_t w_t, 1e-12). The paper's formulas differ:
    they have a softmax of the products instead of exp and tanh, and a sum over pairs of experts. The authors' script
    for vision clips 0.01 at either end and uses normalised task vectors in the sum inside tanh. A method of that name
    formerly in mergekit follows the formulas, tensor by tensor. If all magnitudes or all scores are equal, the authors'
    code divides by zero; here n() is 0.

    Example:
        >>> base = {"w": np.zeros(4, np.float32)}
        >>> experts = {"a": {"w": np.array([0.8, 0.6, -0.2, 0.1])}, "b": {"w": np.array([0.4, 0.9, 0.3, -0.1])}}
        >>> method, stream = Pcb(density=0.75), TaskVectorStream(base, experts)
        >>> method.merge_tensor("w", base["w"], stream.read("w")[1], method.prepare(stream)).round(2)
        array([0.53, 0.5 , 0.  , 0.  ], dtype=float32)
    """

    elementwise = True
    needs_statistics = True

    density: float = parameter(0.1, above=0.0, high=1.0, help="fraction of the entries that get a weight")
    scale: PerExpert = parameter(1.0, low=0.0, per_expert=True, help="weight of the task vectors, one or per expert")

    def prepare(self, stream: TaskVectorStream) -> PcbStatistics:
        """Exact order statistics in two passes: the magnitudes, then the scores, which depend on them."""
        size = sum(stream.sizes.values())
        if not size:
            return PcbStatistics({}, {})
        clip = [int(size * _CLIPPED) + 1, int(size * (1 - _CLIPPED) - 1) + 1]
        bounds = kth_smallest(stream, magnitudes, dict.fromkeys(stream.experts, clip))
        cut = [min(int(size * (1 - self.density)) + 1, size), size]
        scores = kth_smallest(stream, partial(pcb_scores, magnitudes=bounds), dict.fromkeys(stream.experts, cut))
        return PcbStatistics(bounds, scores)

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: TaskVectors, statistics: PcbStatistics
    ) -> np.ndarray:
        bounds = statistics.magnitudes
        merged, total = np.zeros_like(base), np.zeros_like(base)
        for expert, score in pcb_scores(task_vectors, bounds).items():
            scale = np.float32(of_expert(self.scale, expert))
            tau, weight = task_vectors[expert], _normalised(score, statistics.scores[expert])
            total += weight
            merged += weight * np.sign(tau) * _clipped(np.abs(tau), bounds[expert]) * scale
        return base + merged / np.maximum(total, np.float32(1e-12))


def most_varied(taus: Sequence[np.ndarray], density: float) -> np.ndarray:
    """The entries that vary most over the experts: int(density * n) of the n that vary at all, but at least one.

    Args:
        taus: One array per expert, 1-D and of equal length.
        density: The fraction to select.

    Returns:
        bool, with the shape of each array.

    Example:
        >>> most_varied([np.array([0.0, 1.0, 5.0, 2.0]), np.array([0.0, 3.0, 2.0, 2.5])], 0.4)
        array([False, False,  True, False])
    """
    # In float64, the mean of equal float32 values is exactly that value, and their variance exactly zero.
    mean = reduce(np.add, (tau.astype(np.float64) for tau in taus)) / len(taus)
    spread = reduce(np.add, (np.square(tau - mean) for tau in taus))
    varying = int(np.count_nonzero(spread))
    if not varying:
        return np.zeros(spread.shape, bool)
    return rank_mask(-spread, 0, max(int(density * varying), 1))


def energy_shares(taus: Sequence[np.ndarray]) -> list[float]:
    """Each expert's sum of squares as a fraction of the total; equal shares if all are zero.

    Example:
        >>> energy_shares([np.array([3.0, 0.0]), np.array([0.0, 1.0])])
        [0.9, 0.1]
    """
    energies = [float(np.square(tau, dtype=np.float64).sum()) for tau in taus]
    total = sum(energies)
    return [energy / total if total else 1 / len(taus) for energy in energies]


def pcb_scores(task_vectors: TaskVectors, magnitudes: Bounds) -> dict[str, np.ndarray]:
    """PCB's scores, up to a factor: exp(T * importance in the expert) * tanh(agreement with the sum of all).

    Args:
        task_vectors: Expert -> float32, all of one shape.
        magnitudes: Expert -> the bounds to which its magnitudes are clipped.

    Returns:
        Expert -> scores of that shape, negative where the expert has another sign than the sum.
    """
    total = reduce(np.add, task_vectors.values())
    scores = {}
    for expert, tau in task_vectors.items():
        importance = np.square(_normalised(np.abs(tau), magnitudes[expert]))
        # Subtract 1 so that exp cannot overflow. This scales all scores of an expert and changes no weight.
        scores[expert] = np.exp((importance - np.float32(1)) * np.float32(len(task_vectors))) * np.tanh(tau * total)
    return scores


def _normalised(values: np.ndarray, bounds: Sequence[float]) -> np.ndarray:
    """0 at or below the lower bound, 1 at or above the upper one; all 0 if the bounds are equal."""
    low, high = bounds
    return (_clipped(values, bounds) - np.float32(low)) / np.float32(high - low if high > low else 1)


def _clipped(values: np.ndarray, bounds: Sequence[float]) -> np.ndarray:
    return np.clip(values, np.float32(bounds[0]), np.float32(bounds[1]))


def _mean_of_majority(taus: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Per entry, the weighted mean of the values with the sign of the sum, or 0 if there is none. All 1-D."""
    positive = reduce(np.add, taus) >= 0
    merged = np.zeros_like(taus[0])
    total = np.zeros_like(taus[0])
    for tau, weight in zip(taus, weights, strict=True):
        share = np.where(positive, tau > 0, tau < 0) * np.float32(weight)
        total += share
        share *= tau
        merged += share
    return merged / np.where(total == 0, np.float32(1), total)
