"""Exact order statistics over a whole encoder without sorting or holding it.

A sample brackets the wanted value; one streaming pass then counts what lies below the bracket and collects what
lies inside it, a fraction of a percent. What was collected is searched. A bracket that missed is widened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from simomerge.merging.engine.stream import TaskVectorStream

Values: TypeAlias = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
"""Flat task vectors of some entries (which it may overwrite) -> per expert the values to rank, entry by entry."""

_SAMPLE = 1_000_000
_MARGIN = 8.0  # standard deviations of a sampled quantile


@dataclass
class _Bracket:
    """Where the value of one rank is looked for, and what one pass found of it there."""

    rank: int
    low: float = -np.inf
    high: float = np.inf
    below: int = 0
    at_low: int = 0
    at_high: int = 0
    inside: list[np.ndarray] = field(default_factory=list)

    def look(self, values: np.ndarray) -> tuple[int, int, int, np.ndarray]:
        low, high = np.float32(self.low), np.float32(self.high)
        below = values < low
        candidates = values[np.flatnonzero((values <= high) ^ below)]
        # Of a quantised or a sparse task vector very many entries may equal an end of the bracket: these are
        # counted, not collected.
        at_low, at_high = candidates == low, candidates == high
        return (
            int(np.count_nonzero(below)),
            int(np.count_nonzero(at_low)),
            int(np.count_nonzero(at_high)),
            candidates[~(at_low | at_high)],
        )

    def add(self, found: tuple[int, int, int, np.ndarray]) -> None:
        self.below += found[0]
        self.at_low += found[1]
        self.at_high += found[2]
        self.inside.append(found[3])

    def value(self) -> float | None:
        """The value of the rank, or None where the bracket missed it."""
        place = self.rank - self.below
        inside = np.concatenate(self.inside) if self.inside else np.empty(0, np.float32)
        if place <= 0:
            return None
        if place <= self.at_low:
            return self.low
        place -= self.at_low
        if place <= len(inside):
            return float(np.partition(inside, place - 1)[place - 1])
        return self.high if place - len(inside) <= self.at_high and self.low != self.high else None

    def widened(self) -> _Bracket:
        """A bracket for the next pass: open on the side on which the rank lies."""
        if self.rank <= self.below:
            return _Bracket(self.rank, -np.inf, self.low)
        return _Bracket(self.rank, self.high, np.inf)


def kth_smallest(
    stream: TaskVectorStream, values: Values, ranks: Mapping[str, Sequence[int]]
) -> dict[str, list[float]]:
    """The values of given ranks among all entries of the encoder, per expert and exactly.

    Args:
        stream: read once for the sample, and once (very rarely twice or three times) in full.
        values: computes what is ranked from flat task vectors of some entries; it must treat them one by one.
        ranks: expert -> ranks from 1 (the smallest) to the number of entries.

    Returns:
        expert -> the float32 values of its ranks, in their order.

    Example:
        >>> stream = TaskVectorStream({"w": np.zeros(4)}, {"a": {"w": np.array([4.0, -1.0, 3.0, 2.0])}})
        >>> kth_smallest(stream, lambda taus: {"a": np.abs(taus["a"])}, {"a": [1, 4]})
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


def _from_sample(
    stream: TaskVectorStream, values: Values, ranks: Mapping[str, Sequence[int]]
) -> dict[tuple[str, int], _Bracket]:
    total = sum(stream.sizes.values())
    part = sample_of(total)

    def sample(name: str) -> Mapping[str, np.ndarray]:
        return values(stream.read(name, part)[1])

    parts = [part for _, part in stream.map(sample)]
    brackets = {}
    for expert, wanted in ranks.items():
        drawn = np.sort(np.concatenate([part[expert] for part in parts]))
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
    """The part of every tensor that makes a sample of about a million of all entries.

    Never a divisor of a row apart, which would pick the same columns of all rows.

    Example:
        >>> sample_of(10_000_000)
        slice(0, None, 11)
    """
    step = max(total // _SAMPLE, 1)
    while step > 1 and (step % 2 == 0 or step % 3 == 0):
        step += 1
    return slice(0, None, step)


def sampled_distances(stream: TaskVectorStream, entries: int = 4096) -> dict[str, float]:
    """``||expert - base|| / ||base||`` per expert, about, from a few pieces of every tensor: few pages of the files.

    Args:
        entries: of a tensor, in four pieces: at its beginning and after each quarter (of a fused qkv, some of each).

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


def _pass(stream: TaskVectorStream, values: Values, brackets: Mapping[tuple[str, int], _Bracket]) -> None:
    def look(name: str) -> list[dict[tuple[str, int], tuple[int, int, int, np.ndarray]]]:
        found = []
        workspace = stream.workspace(name)
        for part in stream.blocks(name):
            ranked = values(stream.read(name, part, workspace)[1])
            found.append({key: bracket.look(ranked[key[0]]) for key, bracket in brackets.items()})
        return found

    for _, parts in stream.map(look):
        for part in parts:
            for key, found in part.items():
                brackets[key].add(found)
    stream.checked = True
