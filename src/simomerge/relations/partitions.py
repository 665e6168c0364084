"""Which partition of the tasks into groups is best, given what each group is worth. Plain combinatorics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

Group = tuple[str, ...]
Partition = tuple[Group, ...]

EXACT = 12
"""Up to so many tasks every partition is considered (3^T steps); beyond, groups are joined greedily."""


def best_partitions(tasks: Sequence[str], worth: Callable[[Group], float]) -> dict[int, Partition]:
    """For every budget of 1 to T groups the partition of the tasks into at most so many of the greatest total worth.

    Args:
        tasks: T names.
        worth: of a group, whose members come in the order of ``tasks``; asked once per group.

    Returns:
        By budget, groups in the order of their first tasks. A greater budget is never worth less; where it is worth
        no more, its partition is that of the smaller one.

    Example:
        >>> alike = {("a", "b"): -1.0, ("a", "c"): -5.0, ("b", "c"): -5.0, ("a", "b", "c"): -9.0}
        >>> best_partitions("abc", lambda group: alike.get(group, 0.0))[2]
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
    """By budget, exactly so many groups: over all subsets, the group of the first task and the best of the rest."""
    count = len(tasks)
    groups = {
        mask: tuple(task for place, task in enumerate(tasks) if mask >> place & 1) for mask in range(1, 1 << count)
    }
    value = {mask: worth(group) for mask, group in groups.items()}
    best: dict[int, tuple[float, Partition]] = {mask: (value[mask], (group,)) for mask, group in groups.items()}
    whole = (1 << count) - 1
    found = {1: best[whole]}
    for budget in range(2, count + 1):
        better: dict[int, tuple[float, Partition]] = {}
        for mask in groups:
            first = mask & -mask
            rest = mask ^ first
            part = rest
            while part:  # every subset of the rest that is left to the other groups
                if part in best:
                    own = mask ^ part
                    total = value[own] + best[part][0]
                    if mask not in better or total > better[mask][0]:
                        better[mask] = (total, (groups[own], *best[part][1]))
                part = (part - 1) & rest
        best = better
        found[budget] = best[whole]
    return found


def _greedy(tasks: list[str], worth: Callable[[Group], float]) -> dict[int, tuple[float, Partition]]:
    """By budget: from one group per task, again and again the join that costs least."""
    known: dict[Group, float] = {}

    def value(group: Group) -> float:
        if group not in known:
            known[group] = worth(group)
        return known[group]

    place = {task: index for index, task in enumerate(tasks)}
    groups: list[Group] = [(task,) for task in tasks]
    found = {}
    while True:
        groups.sort(key=lambda group: place[group[0]])
        found[len(groups)] = (sum(map(value, groups)), tuple(groups))
        if len(groups) == 1:
            return found

        def joined(pair: tuple[Group, Group]) -> Group:
            return tuple(sorted(pair[0] + pair[1], key=place.__getitem__))

        def change(pair: tuple[Group, Group]) -> float:
            return value(joined(pair)) - value(pair[0]) - value(pair[1])

        pair = max(combinations(groups, 2), key=change)
        groups = [group for group in groups if group not in pair] + [joined(pair)]
