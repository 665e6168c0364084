"""TIES: trim the small entries, elect a sign, average the entries that agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simomerge.merging.method import MergeMethod, parameter, register
from simomerge.merging.stream import TaskVectorStream


@dataclass(frozen=True)
class TiesStatistics:
    """Of the whole flattened task vectors: the smallest magnitude kept, per expert, and the majority sign."""

    thresholds: dict[str, float]
    majority_is_positive: bool


@register
@dataclass(frozen=True)
class Ties(MergeMethod):
    """Trim, elect sign and merge (Yadav et al., 2023, section 4).

    Public implementations differ; ``trim`` chooses between the two families.

    - ``"global"`` follows the authors' code, as the paper does. The flattened vector is all float tensors of
      the encoder, d entries. Per expert the threshold is the magnitude of rank d - int(d * density) from
      below, and every entry that reaches it stays: int(d * density) + 1 entries, and all that tie with the
      threshold. An entry's sign is the sign of the sum of its kept values; a zero sum takes the sign of the
      sum of all elected signs (negative, should that be zero too).
    - ``"tensor"`` follows mergekit and peft. In each tensor exactly int(density * size) entries stay (at
      least one; of equal magnitudes the first), and a zero sum counts as positive. It needs no first pass.

    Both then average the kept entries that have the elected sign and add ``scale`` times that to the base.

    Example:
        >>> method = Ties(density=0.5, trim="tensor")
        >>> task_vectors = {"a": np.array([4.0, 1.0]), "b": np.array([2.0, -1.0])}
        >>> method.merge_tensor("w", np.zeros(2), task_vectors, None)
        array([3., 0.])
    """

    name: ClassVar[str] = "ties"
    paper: ClassVar[str] = "TIES-Merging (Yadav et al., 2023)"
    link: ClassVar[str] = "https://arxiv.org/abs/2306.01708"
    needs_statistics: ClassVar[bool] = True

    density: float = parameter(0.2, above=0.0, high=1.0, help="fraction of the entries kept; write 0.2 for 20 percent")
    scale: float = parameter(1.0, low=0.0, help="weight of the merged task vector")
    trim: str = parameter("global", choices=("global", "tensor"), help="rank entries in the encoder or a tensor")

    def prepare(self, stream: TaskVectorStream) -> TiesStatistics | None:
        """The threshold of each expert (one expert in memory at a time), then the majority sign."""
        if self.trim == "tensor":
            return None
        thresholds = {expert: self._global_threshold(expert, stream) for expert in stream.experts}
        balance = 0
        for name in stream.names:
            kept = [_keep_from(tau, thresholds[expert]) for expert, tau in stream.read(name)[1].items()]
            total = _sum(kept)
            balance += int(np.count_nonzero(total > 0)) - int(np.count_nonzero(total < 0))
        return TiesStatistics(thresholds, majority_is_positive=balance > 0)

    def merge_tensor(
        self,
        name: str,
        base: np.ndarray,
        task_vectors: Mapping[str, np.ndarray],
        statistics: TiesStatistics | None,
    ) -> np.ndarray:
        if statistics is None:
            kept = [_keep_largest(tau, self.density) for tau in task_vectors.values()]
        else:
            kept = [_keep_from(tau, statistics.thresholds[expert]) for expert, tau in task_vectors.items()]
        merged = _disjoint_mean(kept, zero_is_positive=statistics is None or statistics.majority_is_positive)
        merged *= self.scale
        merged += base
        return merged

    def _global_threshold(self, expert: str, stream: TaskVectorStream) -> float:
        magnitudes = np.empty(sum(stream.sizes.values()), np.float32)
        start = 0
        for name in stream.names:
            end = start + stream.sizes[name]
            np.abs(stream.task_vector(expert, name).reshape(-1), out=magnitudes[start:end])
            start = end
        rank = len(magnitudes) - int(len(magnitudes) * self.density)
        if rank <= 0:
            return 0.0
        magnitudes.partition(rank - 1)
        return float(magnitudes[rank - 1])


def _keep_from(tau: np.ndarray, threshold: float) -> np.ndarray:
    # The comparison is in float32, in which the threshold is exact.
    return np.where(np.abs(tau) >= np.float32(threshold), tau, np.float32(0))


def _keep_largest(tau: np.ndarray, density: float) -> np.ndarray:
    """Exactly int(density * size) entries, at least one; of equal magnitudes the first."""
    magnitudes = np.abs(tau).reshape(-1)
    count = max(int(density * magnitudes.size), 1)
    if count >= magnitudes.size:
        return tau
    threshold = np.partition(magnitudes, magnitudes.size - count)[magnitudes.size - count]
    mask = magnitudes > threshold
    tied = np.flatnonzero(magnitudes == threshold)
    mask[tied[: count - int(np.count_nonzero(mask))]] = True
    return np.where(mask.reshape(tau.shape), tau, np.float32(0))


def _disjoint_mean(kept: list[np.ndarray], zero_is_positive: bool) -> np.ndarray:
    """Mean of the entries that have the elected sign; 0 where there is none."""
    total = _sum(kept)
    positive = total >= 0 if zero_is_positive else total > 0
    # From here on only one sign counts per entry: turn it to plus, and back at the end.
    direction = np.where(positive, np.float32(1), np.float32(-1))
    agreeing = np.zeros_like(total)
    count = np.zeros_like(total)
    for tau in kept:
        turned = tau * direction
        agreeing += np.maximum(turned, 0)
        count += turned > 0
    agreeing /= np.maximum(count, 1)
    agreeing *= direction
    return agreeing


def _sum(arrays: Iterable[np.ndarray]) -> np.ndarray:
    first, *others = arrays
    total = first.copy()
    for array in others:
        total += array
    return total
