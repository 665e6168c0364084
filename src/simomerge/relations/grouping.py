"""Which tasks to merge with which: small merges of pairs, what they say of larger groups, and a check by merging those.

The question is that of "Which Tasks Should Be Learned Together" (Standley et al., arXiv 1905.07553), whose answer for
training from scratch also goes from pairs to larger groups. A merge costs seconds, so the groups of the answer are
merged themselves, and the answer changes until it stands on measurements alone.

With labels a group is worth the sum of its tasks' gains. Without, losses of agreement must be made comparable: what it
costs an expert to be disagreed with depends on how right it is, which only labels know. Each task's loss is squared,
since independent errors add in squares, and measured in its own mean over the pairs, so that every task counts alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from simomerge.assembly.alignment import Aligner
from simomerge.assembly.experts import with_merged_encoder
from simomerge.assembly.realign.sums import fold_heads, head_targets
from simomerge.core.errors import InputError
from simomerge.core.progress import progress
from simomerge.merging import Average, TaskArithmetic
from simomerge.models.heads.projections import is_foldable
from simomerge.models.model import SimoModel
from simomerge.relations.judging import Judge
from simomerge.relations.partitions import Group, Partition, best_partitions

Gains = Mapping[str, float]
"""By task, what it has over its expert in percent; see `Judge.gains`."""


@dataclass(frozen=True)
class MergedGroup:
    """Some tasks merged into one encoder, folded, and judged.

    Attributes:
        tasks: of the group.
        gains: of each of them over its expert, in percent.
        scale: of the task vectors; None where heads cannot be folded and the encoders were averaged.
    """

    tasks: Group
    gains: dict[str, float]
    scale: float | None


@dataclass(frozen=True)
class Choice:
    """What to merge under a budget of encoders.

    Attributes:
        budget: encoders at most.
        groups: the tasks of each encoder; a group of one keeps its expert.
        gains: of every task over its expert, in percent.
        gain: their mean: Delta_MTL where labels judged, else the mean agreement less 1, in percent (which is not what
            the groups were chosen by, see `worth`).
        measured: every group of it was merged and judged, none is predicted from pairs.
    """

    budget: int
    groups: Partition
    gains: dict[str, float]
    measured: bool

    @property
    def gain(self) -> float:
        return sum(self.gains.values()) / len(self.gains)


@dataclass(frozen=True)
class Grouping:
    """The merges that were tried, and the best partition for every budget.

    Attributes:
        tasks: in order.
        labelled: judged by labels, else by the experts' own predictions.
        merges: all groups that were merged, pairs first.
        choices: for budgets of 1 to T encoders.
    """

    tasks: list[str]
    labelled: bool
    merges: list[MergedGroup]
    choices: list[Choice] = field(default_factory=list)

    def beside(self, task: str, other: str) -> float:
        """The gain of a task that is merged with one other, in percent."""
        found = next(merge for merge in self.merges if set(merge.tasks) == {task, other})
        return found.gains[task]


def merge_group(base: SimoModel, experts: Mapping[str, SimoModel], images: Any) -> tuple[SimoModel, float | None]:
    """Merge experts as a user would without labels: task arithmetic, the scale by alignment, the cross-tap fold.

    Where a head cannot be folded, the encoders are averaged and the heads left as they are.

    Returns:
        The model and its scale, None for an average.
    """
    if not all(is_foldable(expert.heads[task]) for task, expert in experts.items()):
        return with_merged_encoder(base, experts, Average()), None
    aligner = Aligner(base, experts, images, None)
    method: Any = aligner.best_scale(TaskArithmetic()).method
    model = with_merged_encoder(base, experts, method)
    targets = head_targets(model, experts, aligner.images, "cross-tap")
    return fold_heads(model, targets, "cross-tap").model, float(method.scale)


def group_tasks(
    base: SimoModel,
    experts: Mapping[str, SimoModel],
    images: Any,
    judge: Judge,
    limit: int | None = None,
) -> Grouping:
    """Find for every budget of encoders which tasks to merge.

    Every pair is merged. The gains of larger groups are predicted from their pairs, the best partition is sought, its
    groups are merged too, and so on until the best partitions hold no group that was not merged, or the limit is met.

    Args:
        base: the foundation encoder.
        experts: by task, as `simomerge.assembly.experts.check_experts` gives.
        images: to merge and fold on, without labels, as `simomerge.datasets.pictures.as_images` gives.
        judge: on other images.
        limit: merges beyond the pairs, by default as many as there are pairs and twice as many as tasks.

    Raises:
        InputError: fewer than four images, or a metric of a merge that is not finite.

    Example:
        >>> group_tasks(base, experts, images, judge).choices[1].groups                      # doctest: +SKIP
        (('segmentation', 'normals'), ('depth', 'edges', 'texture'))
    """

    def measure(group: Group) -> MergedGroup:
        model, scale = merge_group(base, {task: experts[task] for task in group}, images)
        gains = judge.gains(judge.scores(model))
        for task, gain in gains.items():
            if not math.isfinite(gain):
                raise InputError(
                    f"merged, {' + '.join(group)} have a {judge.tasks[task].metric} of {task!r} that is not finite:"
                    " look at what the expert predicts, and at the images."
                )
        return MergedGroup(group, gains, scale)

    merges, choices = choose_groups(list(experts), measure, judge.labelled, limit)
    return Grouping(list(experts), judge.labelled, merges, choices)


def choose_groups(
    tasks: Sequence[str],
    measure: Callable[[Group], MergedGroup],
    labelled: bool,
    limit: int | None = None,
) -> tuple[list[MergedGroup], list[Choice]]:
    """The search of `group_tasks`, whatever merges and judges a group; a group is measured once."""
    pairs = list(combinations(tasks, 2))
    most = len(pairs) + (len(pairs) + 2 * len(tasks) if limit is None else limit)
    measured: dict[Group, MergedGroup] = {}

    def take(group: Group) -> None:
        measured[group] = measure(group)
        progress("merges", len(measured), max(len(pairs), len(measured)), "+".join(group))

    for pair in pairs:
        take(pair)
    units = None if labelled else _units(tasks, measured)
    while True:
        found = best_partitions(tasks, lambda group: worth(expected_gains(group, measured), units))
        groups = dict.fromkeys(group for partition in found.values() for group in partition)
        unknown = [group for group in groups if len(group) > 1 and group not in measured]
        if not unknown or len(measured) >= most:
            break
        for group in unknown[: most - len(measured)]:
            take(group)
    return list(measured.values()), [_choice(budget, partition, measured) for budget, partition in found.items()]


def worth(gains: Gains, units: Mapping[str, float] | None) -> float:
    """What a group is worth: the sum of its gains or, with units, of their squares in these, losses negative.

    Example:
        >>> worth({"a": -1.0, "b": -4.0}, None), worth({"a": -1.0, "b": -4.0}, {"a": 1.0, "b": 2.0})
        (-5.0, -5.0)
    """
    if units is None:
        return sum(gains.values())
    ratios = [gain / units[task] for task, gain in gains.items()]
    return sum(ratio * abs(ratio) for ratio in ratios)


def _units(tasks: Sequence[str], measured: Mapping[Group, MergedGroup]) -> dict[str, float]:
    """Each task's mean loss in its pairs; 1 where it loses nothing."""
    found = {}
    for task in tasks:
        losses = [abs(merge.gains[task]) for merge in measured.values() if task in merge.tasks]
        found[task] = (sum(losses) / len(losses) if losses else 0.0) or 1.0
    return found


def expected_gains(group: Group, measured: Mapping[Group, MergedGroup]) -> dict[str, float]:
    """By task what it gains in a group: as measured, 0 where it is alone, else predicted from the pairs in it."""
    if len(group) == 1:
        return {group[0]: 0.0}
    if group in measured:
        return measured[group].gains
    return predict_gains(group, lambda task, other: _of_pair(measured, task, other))


def predict_gains(group: Group, beside: Callable[[str, str], float]) -> dict[str, float]:
    """By task what it gains in a group, from what it gains beside each other member."""
    return {task: sum(beside(task, other) for other in group if other != task) / (len(group) - 1) for task in group}


def _of_pair(measured: Mapping[Group, MergedGroup], task: str, other: str) -> float:
    pair = (task, other) if (task, other) in measured else (other, task)
    return measured[pair].gains[task]


def _choice(budget: int, partition: Partition, measured: Mapping[Group, MergedGroup]) -> Choice:
    gains = {task: value for group in partition for task, value in expected_gains(group, measured).items()}
    return Choice(budget, partition, gains, all(len(group) == 1 or group in measured for group in partition))
