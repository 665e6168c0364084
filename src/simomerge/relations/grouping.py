"""Which tasks to merge: merge all pairs, predict larger groups from them, then merge the best groups to check.

The question is that of "Which Tasks Should Be Learned Together" (Standley et al., arXiv 1905.07553), which also goes
from pairs to larger groups, for training from scratch. A merge takes only seconds, so the groups of the answer are
merged too, and the answer changes until it rests on measurements alone.

With labels the worth of a group is the sum of its tasks' gains. Without labels the tasks' losses of agreement must be
made comparable: the true cost of a disagreement depends on how often the expert is right, which only labels show. Each
task's loss is divided by its mean loss over the pairs (see `simomerge.relations.units`), so that every task counts
equally, and then squared, since independent errors add in squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from simomerge.assembly.alignment import Aligner
from simomerge.assembly.experts import with_merged_encoder
from simomerge.assembly.judging import Judge
from simomerge.assembly.realign.sums import fold_heads, head_targets
from simomerge.core.errors import InputError
from simomerge.core.progress import progress
from simomerge.merging import Average, TaskArithmetic
from simomerge.models.heads.projections import is_foldable
from simomerge.models.model import SimoModel
from simomerge.relations.partitions import Group, Partition, best_partitions
from simomerge.relations.units import unit_of


@dataclass(frozen=True)
class MergedGroup:
    """Tasks that were merged into one encoder, folded, and judged.

    Attributes:
        tasks: the tasks of the group.
        gains: gain of each task over its expert, in percent; see `Judge.gains`.
        scale: scale of the task vectors; None if heads cannot be folded and the encoders were averaged.
    """

    tasks: Group
    gains: dict[str, float]
    scale: float | None


@dataclass(frozen=True)
class Choice:
    """What to merge under a budget of encoders.

    Attributes:
        budget: maximum number of encoders.
        groups: the tasks of each encoder; a group of one keeps its expert.
        gains: gain of every task over its expert, in percent.
        measured: every group was merged and judged, none is predicted from pairs.
    """

    budget: int
    groups: Partition
    gains: dict[str, float]
    measured: bool

    @property
    def gain(self) -> float:
        """Mean of the gains: Delta_MTL with labels, the mean agreement minus 1 in percent without labels.

        Without labels the groups were not chosen by this mean, see `worth`.
        """
        return sum(self.gains.values()) / len(self.gains)


@dataclass(frozen=True)
class Grouping:
    """The merges that were tried, and the best partition for every budget.

    Attributes:
        tasks: the tasks in order.
        labelled: judged by labels, otherwise by the experts' own predictions.
        merges: all groups that were merged, pairs first.
        choices: one per budget, of 1 to T encoders.
    """

    tasks: list[str]
    labelled: bool
    merges: list[MergedGroup]
    choices: list[Choice]


def merge_group(base: SimoModel, experts: Mapping[str, SimoModel], images: Any) -> tuple[SimoModel, float | None]:
    """Merge experts as a user without labels would: task arithmetic, the scale by agreement, the cross-tap fold.

    If a head cannot be folded, the encoders are averaged and the heads stay unchanged.

    Returns:
        The model and the scale of its task vectors, None for an average.
    """
    if not all(is_foldable(expert.heads[task]) for task, expert in experts.items()):
        return with_merged_encoder(base, experts, Average()), None
    aligner = Aligner(base, experts, images, None)
    method: Any = aligner.best_scale(TaskArithmetic()).method
    model = with_merged_encoder(base, experts, method)
    targets = head_targets(model, experts, aligner.images, "cross-tap")
    return fold_heads(model, targets, "cross-tap").model, float(method.scale)


def finite_gains(judge: Judge, model: SimoModel) -> dict[str, float]:
    """The gain of each task of a merged model, as `Judge.gains`.

    Raises:
        InputError: a gain is not finite.
    """
    gains = judge.gains(judge.scores(model))
    for task, gain in gains.items():
        if not math.isfinite(gain):
            raise InputError(
                f"merged, {' + '.join(model.tasks)} have a {judge.tasks[task].metric} of {task!r} that is not finite:"
                " check the expert's predictions and the images."
            )
    return gains


def group_tasks(base: SimoModel, experts: Mapping[str, SimoModel], images: Any, judge: Judge) -> Grouping:
    """Find which tasks to merge, for every budget of encoders.

    All pairs are merged. The gains of larger groups are predicted from their pairs, and the best partitions are
    searched. Their groups are merged too, and the search repeats until the best partitions contain only merged groups,
    or until as many groups are merged as there are pairs and twice the number of tasks.

    Args:
        base: the foundation encoder.
        experts: experts by task, as `simomerge.assembly.experts.check_experts` returns them.
        images: images to merge and fold on, as `simomerge.datasets.pictures.as_images` returns them.
        judge: the judge, with other images.

    Raises:
        InputError: fewer than four images, or a merge whose metric is not finite.

    Example:
        >>> group_tasks(base, experts, images, judge).choices[1].groups                      # doctest: +SKIP
        (('segmentation', 'normals'), ('depth', 'edges', 'texture'))
    """

    def measure(group: Group) -> MergedGroup:
        model, scale = merge_group(base, {task: experts[task] for task in group}, images)
        return MergedGroup(group, finite_gains(judge, model), scale)

    merges, choices = choose_groups(list(experts), measure, judge.labelled)
    return Grouping(list(experts), judge.labelled, merges, choices)


def choose_groups(
    tasks: Sequence[str], measure: Callable[[Group], MergedGroup], labelled: bool, limit: int | None = None
) -> tuple[list[MergedGroup], list[Choice]]:
    """The search of `group_tasks` with any way to measure a group; each group is measured once.

    Args:
        limit: Merges in addition to the pairs; by default the number of pairs plus twice the number of tasks.
    """
    pairs = list(combinations(tasks, 2))
    most = len(pairs) + (len(pairs) + 2 * len(tasks) if limit is None else limit)
    measured: dict[Group, MergedGroup] = {}

    def merge(groups: Sequence[Group]) -> None:
        for group in groups:
            measured[group] = measure(group)
            progress("merges", len(measured), max(len(pairs), len(measured)), "+".join(group))

    merge(pairs)
    units = None if labelled else {task: unit_of(_gains_of(task, measured.values())) for task in tasks}
    while True:
        found = best_partitions(tasks, lambda group: worth(_expected_gains(group, measured), units))
        groups = dict.fromkeys(group for partition in found.values() for group in partition)
        unknown = [group for group in groups if len(group) > 1 and group not in measured]
        if not unknown or len(measured) >= most:
            break
        merge(unknown[: most - len(measured)])
    choices = []
    for budget, partition in found.items():
        gains = {task: gain for group in partition for task, gain in _expected_gains(group, measured).items()}
        certain = all(len(group) == 1 or group in measured for group in partition)
        choices.append(Choice(budget, partition, gains, certain))
    return list(measured.values()), choices


def worth(gains: Mapping[str, float], units: Mapping[str, float] | None) -> float:
    """The worth of a group: the sum of its gains or, with units, of the squared gains in these units, losses negative.

    Example:
        >>> worth({"a": -1.0, "b": -4.0}, None), worth({"a": -1.0, "b": -4.0}, {"a": 1.0, "b": 2.0})
        (-5.0, -5.0)
    """
    if units is None:
        return sum(gains.values())
    ratios = [gain / units[task] for task, gain in gains.items()]
    return sum(ratio * abs(ratio) for ratio in ratios)


def _gains_of(task: str, merges: Iterable[MergedGroup]) -> list[float]:
    return [merge.gains[task] for merge in merges if task in merge.tasks]


def _expected_gains(group: Group, measured: Mapping[Group, MergedGroup]) -> dict[str, float]:
    """Gain of each task of a group: 0 if it is alone, as measured, or predicted from the group's pairs."""
    if len(group) == 1:
        return {group[0]: 0.0}
    if group in measured:
        return measured[group].gains

    def pair_gain(task: str, other: str) -> float:
        pair = (task, other) if (task, other) in measured else (other, task)
        return measured[pair].gains[task]

    return predict_gains(group, pair_gain)


def predict_gains(group: Group, pair_gain: Callable[[str, str], float]) -> dict[str, float]:
    """Gain of each task of a group: the mean of ``pair_gain(task, other)`` over the other members."""
    return {task: sum(pair_gain(task, other) for other in group if other != task) / (len(group) - 1) for task in group}
