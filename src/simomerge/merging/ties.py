"""TIES: trim the small entries, elect a sign, average the entries that agree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from heapq import nlargest
from threading import Lock

import numpy as np

from simomerge.core.registry import parameter
from simomerge.merging.engine.ranks import kth_smallest, magnitudes
from simomerge.merging.engine.stream import BLOCK, TaskVectors, TaskVectorStream, stacked
from simomerge.merging.method import MergeMethod, Provisional, register

_SIGN = np.int32(-(2**31))
"""The sign bit of a float32."""
_LOOK = 16, 1 << 16
"""How many tensors, and how many entries of each, are read to see how many entries cancel."""
_MOST_UNDECIDED = 1 / BLOCK
"""The share of entries that cancel above which most blocks would have to be merged twice."""


@dataclass(frozen=True)
class TiesStatistics:
    """Statistics of the flattened task vectors: per expert the smallest magnitude kept, and the majority sign.

    The majority sign decides where the kept values of an entry cancel exactly. Differences of float32 weights are
    multiples of the weights' last digit, so in an encoder of a hundred million entries a few always do.
    """

    thresholds: dict[str, float]
    majority_is_positive: bool = False

    def keep(self, task_vectors: TaskVectors) -> np.ndarray:
        """Set everything below the thresholds to zero, in place; returns an array (experts, entries)."""
        kept = stacked(list(task_vectors.values()))
        # The thresholds are exact in float32.
        low = np.array([self.thresholds[expert] for expert in task_vectors], np.float32)
        low = low.reshape(-1, *[1] * (kept.ndim - 1))
        return _masked(kept, (kept >= low) | (kept <= -low))


@register("ties", "TIES-Merging (Yadav et al., 2023)", "https://arxiv.org/abs/2306.01708")
@dataclass(frozen=True)
class Ties(MergeMethod):
    """Trim small entries, elect a sign per entry, and average the values that have it (Yadav et al., 2023, section 4).

    Public implementations differ; ``trim`` chooses between the two families.

    - ``"global"`` follows the authors' code and the paper. All float tensors of the encoder form one vector of d
      entries. The threshold of an expert is the magnitude of rank d - int(d * density) from below, and every entry that
      reaches it stays: int(d * density) + 1 entries, and all that equal the threshold. An entry's sign is the sign of
      the sum of its kept values. If the sum is zero, it is the sign of the sum of all elected signs, and negative if
      that is zero too.
    - ``"tensor"`` follows mergekit and peft. In each tensor, exactly int(density * size) entries stay (at least one;
      of equal magnitudes the first), and a sum of zero counts as positive. It needs no first pass.

    Both then average the kept values that have the elected sign and add ``scale`` times the average to the base.

    Example:
        >>> method = Ties(density=0.5, trim="tensor")
        >>> task_vectors = {"a": np.array([4.0, 1.0]), "b": np.array([2.0, -1.0])}
        >>> method.merge_tensor("w", np.zeros(2), task_vectors, None)
        array([3., 0.], dtype=float32)
    """

    needs_statistics = True

    density: float = parameter(0.2, above=0.0, high=1.0, help="fraction of the entries kept; write 0.2 for 20 percent")
    scale: float = parameter(1.0, low=0.0, help="weight of the merged task vector")
    trim: str = parameter("global", choices=("global", "tensor"), help="rank entries in the encoder or a tensor")

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        """With global thresholds, each entry is merged independently of the others."""
        return self.trim == "global"

    def prepare(self, stream: TaskVectorStream) -> TiesStatistics | None:
        """The exact threshold of each expert, without holding a task vector in memory, and the majority sign."""
        if self.trim == "tensor":
            return None
        trimmed = self._trimmed(stream)
        if len(trimmed.thresholds) < 2:  # Nothing can cancel.
            return trimmed
        return replace(trimmed, majority_is_positive=sum(_balances(stream, trimmed)) > 0)

    def provisional(self, stream: TaskVectorStream) -> Provisional | None:
        """Count the majority sign while merging. Only the few entries that cancel exactly have to wait for it.

        None if many entries cancel, as they do in weights of half precision: counting first is then faster.
        """
        if self.trim == "tensor" or len(stream.experts) < 2:
            return None
        trimmed = self._trimmed(stream)
        return None if _cancelling(stream, trimmed) > _MOST_UNDECIDED else _Election(self, trimmed)

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: TaskVectors, statistics: TiesStatistics | None
    ) -> np.ndarray:
        if statistics is None:
            merged = disjoint_mean(np.stack([_keep_largest(tau, self.density) for tau in task_vectors.values()]))
        else:
            merged = disjoint_mean(statistics.keep(task_vectors), statistics.majority_is_positive)
        return self._added(base, merged)

    def _added(self, base: np.ndarray, merged: np.ndarray) -> np.ndarray:
        """The base plus ``scale`` times the merged task vector, which is overwritten."""
        merged *= np.float32(self.scale)
        merged += base
        return merged

    def _trimmed(self, stream: TaskVectorStream) -> TiesStatistics:
        """The thresholds alone."""
        total = sum(stream.sizes.values())
        rank = total - int(total * self.density)
        if rank <= 0 or not stream.experts:
            return TiesStatistics(dict.fromkeys(stream.experts, 0.0))
        found = kth_smallest(stream, magnitudes, {expert: [rank] for expert in stream.experts})
        return TiesStatistics({expert: threshold for expert, (threshold,) in found.items()})


class _Election(Provisional):
    """TIES with known thresholds, which counts the signs of the sums while it merges."""

    def __init__(self, method: Ties, trimmed: TiesStatistics) -> None:
        self._method, self._trimmed, self._balance, self._lock = method, trimmed, 0, Lock()

    def merge(self, base: np.ndarray, task_vectors: TaskVectors) -> tuple[np.ndarray, slice | None]:
        kept = self._trimmed.keep(task_vectors)
        total = _sum(kept)
        balance = _balance(total)
        with self._lock:
            self._balance += balance
        mean = _mean_of_elected(kept, total, zero_is_positive=False)
        # The majority decides where values cancel, and whether a base of -0.0 keeps its sign.
        waits = (total == 0) & ((mean != 0) | (_bits(base) == _SIGN))
        merged = self._method._added(base, mean)
        if not waits.any():
            return merged, None
        undecided = np.flatnonzero(waits)
        merged[undecided] = base[undecided]
        return merged, slice(int(undecided[0]), int(undecided[-1]) + 1)

    def statistics(self) -> TiesStatistics:
        return replace(self._trimmed, majority_is_positive=self._balance > 0)


def _balances(stream: TaskVectorStream, trimmed: TiesStatistics) -> Iterator[int]:
    """The balance of each tensor."""

    def balance(name: str) -> int:
        return sum(_balance(_sum(trimmed.keep(task_vectors))) for _, _, task_vectors in stream.read_blocks(name))

    return (found for _, found in stream.map(balance))


def _balance(total: np.ndarray) -> int:
    """The number of entries with a positive sum minus the number of those with a negative sum."""
    return int(np.count_nonzero(total > 0)) - int(np.count_nonzero(total < 0))


def _cancelling(stream: TaskVectorStream, trimmed: TiesStatistics) -> float:
    """An estimate of the share of entries whose kept values cancel, from the first entries of the largest tensors."""
    cancelled = seen = 0
    for name in nlargest(_LOOK[0], stream.names, stream.sizes.__getitem__):
        kept = trimmed.keep(stream.read(name, slice(0, _LOOK[1]))[1])
        cancelled += int(np.count_nonzero((_sum(kept) == 0) & (kept != 0).any(0)))
        seen += kept.shape[1]
    return cancelled / max(seen, 1)


def _keep_largest(tau: np.ndarray, density: float) -> np.ndarray:
    """Exactly int(density * size) entries, at least one. Of equal magnitudes, the first are kept."""
    magnitudes = np.abs(tau).reshape(-1)
    count = max(int(density * magnitudes.size), 1)
    if count >= magnitudes.size:
        return tau
    # One partition for the threshold takes half the time of `rank_mask`, which needs two.
    threshold = np.partition(magnitudes, magnitudes.size - count)[magnitudes.size - count]
    mask = magnitudes > threshold
    tied = np.flatnonzero(magnitudes == threshold)
    mask[tied[: count - int(np.count_nonzero(mask))]] = True
    return tau * mask.reshape(tau.shape)


def disjoint_mean(kept: np.ndarray, zero_is_positive: bool = True) -> np.ndarray:
    """Per entry, the mean of the values that have the sign of the sum. Zeros do not count; 0 if there is none.

    Args:
        kept: (experts, ...), float32. It is overwritten, because new arrays are the main cost of a loop over blocks.
        zero_is_positive: The elected sign of an entry whose values sum to zero.

    Example:
        >>> disjoint_mean(np.array([[1.0, 1.0], [3.0, -2.0]], np.float32))
        array([ 2., -2.], dtype=float32)
    """
    kept = np.asarray(kept, np.float32)
    return _mean_of_elected(kept, _sum(kept), zero_is_positive)


def _mean_of_elected(kept: np.ndarray, total: np.ndarray, zero_is_positive: bool) -> np.ndarray:
    # Signs are bits, which can be compared and flipped without a cast. A sum that cancels is +0.0, because x - x rounds
    # to it. The bit pattern that precedes +0.0 is negative.
    sign = _bits(total) & _SIGN if zero_is_positive else (_bits(total) - 1) & _SIGN
    np.bitwise_xor(_bits(kept), sign, out=_bits(kept))  # Values with the elected sign are now positive.
    # Negative floats are negative integers. numpy takes the maximum with an array five times as fast as with a number.
    np.maximum(_bits(kept), np.zeros(total.shape, np.int32), out=_bits(kept))
    mean = _sum(kept)
    count = (kept > 0).view(np.uint8).sum(0, dtype=np.uint8 if len(kept) < 256 else np.uint16)
    mean /= np.maximum(count, np.ones_like(count), out=count).astype(np.float32)
    np.bitwise_xor(_bits(mean), sign, out=_bits(mean))
    return mean


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.int32)


def _sum(rows: np.ndarray) -> np.ndarray:
    # Row by row. numpy's own sum is no faster, and it adds eight or more rows of a single entry in another order than
    # longer rows, so that the last digit would depend on where a block ends.
    total = rows[0].copy()
    for row in rows[1:]:
        total += row
    return total


def _masked(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Set the values outside the mask to 0, in place."""
    # A product takes a sixth of the time of np.where, and on one axis half the time of two.
    if values.flags.c_contiguous:
        np.multiply(values.reshape(-1), mask.reshape(-1), out=values.reshape(-1))
        return values
    return np.multiply(values, mask, out=values)
