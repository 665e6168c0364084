"""What a tree of shared blocks gains for its cost, from one encoder for all tasks to one per task.

A search (`simomerge.assembly.sharing.search`) chooses the tree for each cost. With labels it goes by Delta_MTL on the
judge's images, which the curve then shows. Without labels it goes by a part of the images that it merges on, and the
judge's images show the agreement of the trees with the experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simomerge.assembly.alignment import Aligner
from simomerge.assembly.judging import Judge
from simomerge.assembly.sharing.grow import Grower, share_blocks
from simomerge.assembly.sharing.search import TreeSearch
from simomerge.assembly.sharing.stitches import Known
from simomerge.core.progress import progress
from simomerge.merging import MergeMethod, TaskArithmetic
from simomerge.models.model import SimoModel
from simomerge.relations.grouping import finite_gains

STEP = 0.25
"""Distance of the budgets, in units of one encoder."""


@dataclass(frozen=True)
class SharedBlocks:
    """The best tree that was found for a budget.

    Attributes:
        budget: Cost that was allowed, in units of one encoder.
        cost: Cost of the tree.
        tree: The tree as text.
        shared: By task, the number of blocks that it shares with another task.
        gains: Gain of every task over its expert, in percent; see `Judge.gains`.
    """

    budget: float
    cost: float
    tree: str
    shared: dict[str, int]
    gains: dict[str, float]

    @property
    def gain(self) -> float:
        """Mean of the gains: Delta_MTL with labels, the mean agreement minus 1 in percent without labels."""
        return sum(self.gains.values()) / len(self.gains)


def sharing_curve(base: SimoModel, experts: Mapping[str, SimoModel], images: Any, judge: Judge) -> list[SharedBlocks]:
    """The best tree for every budget from one encoder to one per task, each different tree once.

    Args:
        base: the foundation encoder.
        experts: experts by task, as `simomerge.assembly.experts.check_experts` returns them.
        images: images to merge, stitch and fold on, as `simomerge.datasets.pictures.as_images` takes them.
        judge: the judge, with other images; if they have labels, these choose the trees, too.

    Raises:
        InputError: as `TreeSearch`, or a tree whose metric is not finite.
    """

    def method(group: Sequence[str]) -> MergeMethod:
        return Aligner(base, {task: experts[task] for task in group}, images, 64).best_scale(TaskArithmetic()).method

    grower, known, found = Grower(base, experts, method), Known(), list[SharedBlocks]()
    budgets = [1 + STEP * number for number in range(round((len(experts) - 1) / STEP) + 1)]
    search = TreeSearch(grower, images, judge.source if judge.labelled else None)
    for done, budget in enumerate(budgets, start=1):
        progress("budgets", done, len(budgets), f"{budget:g} encoders: {search.best(budget).tree}")
    for budget in budgets:
        best = search.best_tried(budget)  # a search for more encoders may have found a better tree
        if found and found[-1].tree == str(best.tree):
            continue
        model = share_blocks(grower, best.tree, images, known)
        gains = finite_gains(judge, model)
        shared = {task: sum((task,) not in groups for groups in best.tree.partitions) for task in experts}
        found.append(SharedBlocks(budget, best.cost, str(best.tree), shared, gains))
    return found
