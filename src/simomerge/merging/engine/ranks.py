"""Exact order statistics over a whole encoder without sorting it or holding it in memory.

A sample brackets the wanted value. One pass over the encoder then counts the values below the bracket and collects
those inside it, a fraction of a percent, and the wanted value is selected among them. If the bracket missed, it is
widened and the pass is repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np

from simomerge.merging.engine.stream import TaskVectors, TaskVectorStream

Values: TypeAlias = Callable[[TaskVectors], Mapping[str, np.ndarray]]
"""Flat task vectors of some entries (which it may overwrite) -> per expert the values to rank, entry by entry."""

_SAMPLE = 250_000
_MARGIN = 8.0  # In standard deviations of a sampled quantile.


class _Found(NamedTuple):
    """What one block contributes to a bracket: counts, and the values strictly inside."""

    below: int
    at_low: int
    at_high: int
    inside: np.ndarray


@dataclass
class _Bracket:
    """An interval that should contain the value of one rank, and what a pass found in it."""

    rank: int
    low: float = -np.inf
    high: float = np.inf
    found: list[_Found] = field(default_factory=list)

    def look(self, values: np.ndarray) -> _Found:
        low, high = np.float32(self.low), np.float32(self.high)
        below = values < low
        candidates = values[np.flatnonzero((values <= high) ^ below)]
        # In a quantised or sparse task vector, very many entries may equal an end of the bracket. They are counted, not
        # collected.
        at_low, at_high = candidates == low, candidates == high
        counts = [int(np.count_nonzero(mask)) for mask in (below, at_low, at_high)]
        return _Found(counts[0], counts[1], counts[2], candidates[~(at_low | at_high)])

    @property
    def below(self) -> int:
        return sum(found.below for found in self.found)

    def value(self) -> float | None:
        """The value of the rank, or None if it lies outside the bracket."""
        place = self.rank - self.below
        inside = np.concatenate([found.inside for found in self.found]) if self.found else np.empty(0, np.float32)
        if place <= 0:
            return None
        if place <= (at_low := sum(found.at_low for found in self.found)):
            return self.low
        place -= at_low
        if place <= len(inside):
            return float(np.partition(inside, place - 1)[place - 1])
        at_high = sum(found.at_high for found in self.found)
        return self.high if place - len(inside) <= at_high and self.low != self.high else None

    def widened(self) -> _Bracket:
        """A bracket for the next pass, open on the side of the rank."""
        if self.rank <= self.below:
            return _Bracket(self.rank, -np.inf, self.low)
        return _Bracket(self.rank, self.high, np.inf)


def kth_smallest(
    stream: TaskVectorStream, values: Values, ranks: Mapping[str, Sequence[int]]
) -> dict[str, list[float]]:
    """The exact values of given ranks among all entries of the encoder, per expert.

    Args:
        stream: Read once for the sample and once in full (very rarely twice or three times).
        values: Computes what is ranked from flat task vectors of some entries. It must treat each entry independently.
        ranks: Expert -> ranks, from 1 (the smallest) to the number of entries.

    Returns:
        Expert -> the float32 values of its ranks, in their order.

    Example:
        >>> stream = TaskVectorStream({"w": np.zeros(4)}, {"a": {"w": np.array([4.0, -1.0, 3.0, 2.0])}})
        >>> kth_smallest(stream, magnitudes, {"a": [1, 4]})
        {'a': [1.0, 4.0]}
    """
    brackets = _from_sample(stream, values, ranks)
    found: dict[tuple[str, int], float] = {}
    while brackets:
        _pass(stream, values, brackets)
        for key, bracket in list(brackets.items()):
            value = bracket.value()
            if value is None:
                brackets[key] = bracket.widened()
            else:
                found[key] = value
                del brackets[key]
    return {expert: [found[expert, rank] for rank in wanted] for expert, wanted in ranks.items()}


def magnitudes(task_vectors: TaskVectors) -> dict[str, np.ndarray]:
    """The absolute values of task vectors, for `kth_smallest`. They overwrite the task vectors."""
    return {expert: np.abs(tau, out=tau) for expert, tau in task_vectors.items()}


def _from_sample(
    stream: TaskVectorStream, values: Values, ranks: Mapping[str, Sequence[int]]
) -> dict[tuple[str, int], _Bracket]:
    total = sum(stream.sizes.values())
    part = sample_of(total)
    samples = [sample for _, sample in stream.map(lambda name: values(stream.read(name, part)[1]))]
    brackets = {}
    for expert, wanted in ranks.items():
        drawn = np.sort(np.concatenate([sample[expert] for sample in samples]))
        for rank in wanted:
            if not 1 <= rank <= total:
                raise ValueError(f"rank {rank} of {total} entries")
            share = rank / total
            margin = int(_MARGIN * np.sqrt(len(drawn) * share * (1 - share))) + 8
            centre = int(share * len(drawn))
            low = drawn[centre - margin] if centre >= margin else -np.inf
            high = drawn[centre + margin] if centre + margin < len(drawn) else np.inf
            brackets[expert, rank] = _Bracket(rank, float(low), float(high))
    return brackets


def sample_of(total: int) -> slice:
    """The part of every tensor that gives a sample of about 250,000 entries in total.

    The step has no factor 2 or 3, because a divisor of a row's length would select the same columns of all rows.

    Example:
        >>> sample_of(10_000_000)
        slice(0, None, 41)
    """
    step = max(total // _SAMPLE, 1)
    while step > 1 and (step % 2 == 0 or step % 3 == 0):
        step += 1
    return slice(0, None, step)


def _pass(stream: TaskVectorStream, values: Values, brackets: Mapping[tuple[str, int], _Bracket]) -> None:
    def look(name: str) -> list[dict[tuple[str, int], _Found]]:
        found = []
        for _, _, task_vectors in stream.read_blocks(name):
            ranked = values(task_vectors)
            found.append({key: bracket.look(ranked[key[0]]) for key, bracket in brackets.items()})
        return found

    for _, blocks in stream.map(look):
        for block in blocks:
            for key, found in block.items():
                brackets[key].found.append(found)
    stream.checked = True


def sampled_distances(stream: TaskVectorStream, entries: int = 4096) -> dict[str, float]:
    """An estimate of ``||expert - base|| / ||base||`` per expert, which reads only a few pages of the files.

    Args:
        entries: Number of entries to read of a tensor, in four pieces: at its beginning and after each quarter, so that
            a fused qkv contributes some of each.

    Example:
        >>> sampled_distances(TaskVectorStream({"w": np.full(4, 2.0)}, {"a": {"w": np.full(4, 3.0)}}))
        {'a': 0.5}
    """
    total = np.zeros(len(stream.experts) + 1)
    for name, size in stream.sizes.items():
        starts = {size * quarter // 4 for quarter in range(4)} if size > entries else {0}
        pieces = [stream.read(name, slice(start, start + entries // len(starts))) for start in sorted(starts)]
        weight = size / max(sum(base.size for base, _ in pieces), 1)
        for base, task_vectors in pieces:
            total += [weight * float(np.dot(x, x)) for x in (base, *task_vectors.values())]
    relative = np.sqrt(total[1:] / max(total[0], 1e-30))
    return {expert: float(value) for expert, value in zip(stream.experts, relative, strict=True)}


def rank_mask(values: np.ndarray, low: int, high: int) -> np.ndarray:
    """Which entries have a rank from ``low`` to ``high - 1``. The smallest has rank 0; equal values go by position.

    Args:
        values: 1-D, without NaN.
        low, high: ``0 <= low < high <= len(values)``.

    Returns:
        bool, with ``high - low`` of the entries true.

    Example:
        >>> rank_mask(np.array([3.0, 1.0, 1.0, 2.0]), 1, 3)
        array([False, False,  True,  True])
    """
    ordered = np.partition(values, (low, high - 1))
    smallest, largest = ordered[low], ordered[high - 1]
    mask = (values >= smallest) & (values <= largest)
    # Some of the values that equal an end may have ranks outside: the first ones at the lower end, the last ones at the
    # upper end.
    too_low = low - int(np.count_nonzero(values < smallest))
    too_high = len(values) - high - int(np.count_nonzero(values > largest))
    mask[np.flatnonzero(values == smallest)[:too_low]] = False
    if too_high:
        mask[np.flatnonzero(values == largest)[-too_high:]] = False
    return mask
