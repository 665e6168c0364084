"""Reproducible random choices, one independent stream per scene."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Dice:
    """A stream of random choices that depends only on its key.

    Numbers are drawn in blocks and returned as Python floats: one call to a NumPy generator per number would take
    longer than the rest of the sampling of a scene.

    Args:
        key: Non-negative integers naming the stream, such as ``(seed, split, index)``.

    Example:
        >>> Dice((0, 1, 2)).uniform() == Dice((0, 1, 2)).uniform()
        True
    """

    def __init__(self, key: Sequence[int]) -> None:
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(tuple(key))))
        self._stream = self._numbers(generator)

    @staticmethod
    def _numbers(generator: np.random.Generator) -> Iterator[float]:
        while True:
            yield from generator.random(512).tolist()

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        return low + (high - low) * next(self._stream)

    def below(self, count: int) -> int:
        """An integer in [0, count)."""
        return int(count * next(self._stream))

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return next(self._stream) < probability

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, each equally likely."""
        return options[self.below(len(options))]
