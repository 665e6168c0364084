"""What a loss is measured in, so that losses of agreement of different tasks can be compared. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

ENOUGH = 0.5
"""A loss up to this, in percent, does not matter: one encoder that loses no more is enough, and no unit is smaller."""


def unit_of(gains: Iterable[float]) -> float:
    """The unit of a task's losses: its mean loss over its pairs, but at least `ENOUGH`.

    Without this bound, a task that loses almost nothing anywhere would have losses of many units.

    Example:
        >>> unit_of([-2.0, -4.0]), unit_of([-0.01, 0.0]), unit_of([])
        (3.0, 0.5, 0.5)
    """
    sizes = [abs(gain) for gain in gains]
    return max(sum(sizes) / len(sizes), ENOUGH) if sizes else ENOUGH


def avoided_share(one: Mapping[str, float], tree: Mapping[str, float]) -> float:
    """The share of the loss of one encoder that a tree avoids, with every task's loss relative to its own.

    Losses up to `ENOUGH` count as this much in both, so that the other tasks decide. A task that loses more in the tree
    counts as at most one loss.

    Args:
        one, tree: gain of each task in percent; one encoder loses more than `ENOUGH` of at least one task.

    Example:
        >>> round(avoided_share({"a": -6.0, "b": -0.01}, {"a": -0.6, "b": -0.3}), 2)
        0.98
    """
    lost, left = ({task: max(-gain, ENOUGH) for task, gain in gains.items()} for gains in (one, tree))
    avoided = sum(max(1 - left[task] / loss, -1.0) for task, loss in lost.items())
    return avoided / sum(1 - ENOUGH / loss for loss in lost.values())
