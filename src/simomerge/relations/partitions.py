"""The best partition of the tasks into groups, given the worth of each group. Plain combinatorics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations

Group = tuple[str, ...]
Partition = tuple[Group, ...]

EXACT = 12
"""Up to this number of tasks all partitions are considered (3^T steps); more tasks are joined greedily."""


def best_partitions(tasks: Sequence[str], worth: Callable[[Group], float]) -> dict[int, Partition]:
    """For every budget of 1 to T groups, the partition into at most that many groups with the highest total worth.

    Args:
        tasks: T names.
        worth: the worth of a group, whose members are in the order of ``tasks``; called once per group.

    Returns:
        Partitions by budget, with groups in the order of their first tasks. A larger budget is never worth less. If it
        is not worth more, it has the partition of the smaller budget.

    Example:
        >>> pairs = {("a", "b"): -1.0, ("a", "c"): -5.0, ("b", "c"): -5.0, ("a", "b", "c"): -9.0}
        >>> best_partitions("abc", lambda group: pairs.get(group, 0.0))[2]
        (('a', 'b'), ('c',))
    """
    tasks = list(tasks)
    found = _exact(tasks, worth) if len(tasks) <= EXACT else _greedy(tasks, worth)
    best: dict[int, Partition] = {}
    highest = float("-inf")
    for budget in range(1, len(tasks) + 1):
        total, partition = found[budget]
        if total > highest + 1e-9:
            highest, best[budget] = total, partition
        else:
            best[budget] = best[budget - 1]
    return best


def _exact(tasks: list[str], worth: Callable[[Group], float]) -> dict[int, tuple[float, Partition]]:
    """The best partition into exactly as many groups as the budget.

    Sets of tasks are bit masks. The best partition of a set is the group of its first task and the best of the rest.
    """
    count = len(tasks)
    groups = {
        mask: tuple(task for place, task in enumerate(tasks) if mask >> place & 1) for mask in range(1, 1 << count)
    }
    value = {mask: worth(group) for mask, group in groups.items()}
    best: dict[int, tuple[float, Partition]] = {mask: (value[mask], (group,)) for mask, group in groups.items()}
    everything = (1 << count) - 1
    found = {1: best[everything]}
    for budget in range(2, count + 1):
        better: dict[int, tuple[float, Partition]] = {}
        for mask in groups:
            rest = others = mask & (mask - 1)  # without the first task
            while others:  # every subset of the rest can be left to the other groups
                if others in best:
                    own = mask ^ others
                    total = value[own] + best[others][0]
                    if mask not in better or total > better[mask][0]:
                        better[mask] = (total, (groups[own], *best[others][1]))
                others = (others - 1) & rest
        best = better
        found[budget] = best[everything]
    return found


def _greedy(tasks: list[str], worth: Callable[[Group], float]) -> dict[int, tuple[float, Partition]]:
    """Start from one group per task, and repeatedly join the two groups whose union costs least."""
    value = cache(worth)
    place = {task: index for index, task in enumerate(tasks)}

    def joined(pair: tuple[Group, Group]) -> Group:
        return tuple(sorted(pair[0] + pair[1], key=place.__getitem__))

    def change(pair: tuple[Group, Group]) -> float:
        return value(joined(pair)) - value(pair[0]) - value(pair[1])

    groups: list[Group] = [(task,) for task in tasks]
    found = {}
    while True:
        groups.sort(key=lambda group: place[group[0]])
        found[len(groups)] = (sum(map(value, groups)), tuple(groups))
        if len(groups) == 1:
            return found
        pair = max(combinations(groups, 2), key=change)
        groups = [group for group in groups if group not in pair] + [joined(pair)]
