"""Choose a tree of shared blocks for a budget, without labels: greedily, from one encoder for all tasks.

Every tree that is tried is grown, stitched and folded on some of the images, and compared with the experts on the
others. What a task loses depends only on the path from the first block to its head: on the groups of tasks that it
shares blocks with. Losses are therefore kept by path, and most of a new tree is known already.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from simomerge.assembly.judging import Judge
from simomerge.assembly.realign.sums import head_sums, head_targets, with_heads
from simomerge.assembly.sharing.cost import check_kind, time_shares
from simomerge.assembly.sharing.grow import Grower
from simomerge.assembly.sharing.stitches import ExpertTokens, Known, fit_stitches
from simomerge.core import distributed
from simomerge.core.errors import InputError
from simomerge.core.modes import evaluating
from simomerge.core.progress import progress
from simomerge.datasets.groups import held_out
from simomerge.datasets.pictures import as_images, image_batches
from simomerge.merging.tree import Group, Partition, Tree
from simomerge.models.encoders import TreeEncoder
from simomerge.models.heads.projections import is_foldable
from simomerge.models.model import SimoModel

SEARCH_IMAGES = 64
"""Images that a search uses; the chosen tree is then stitched and folded on more."""

POWER = 4
"""Without labels, the power of the disagreements before their mean.

It is unknown without labels which task's disagreement with its expert costs accuracy. With a high power the tasks that
lose most decide, so that no task is given up for another; with a very high one, what the other tasks lose does not
count. The value was chosen on validation rooms: docs/sharing.md has the comparison.
"""

LEAST_LOSS = 0.01
"""The smallest unit of a task's loss: a task that merging hardly changes does not outweigh the others."""

VARIANT = "cross-tap"
"""Variant of the fold, that of the chosen model: which trees are best depends on it."""

SPLITS = 8
"""Number of blocks after which a search considers a split; deeper encoders are searched in larger steps."""

EVERY_PAIR = 4
"""Groups of up to this many tasks are split in two in every way; larger ones one task at a time, or all at once."""

TaskPath = tuple[tuple[Group, int], ...]
"""The groups that a task shares blocks with, with the last block of each."""


@dataclass(frozen=True)
class Tried:
    """A tree that a search tried.

    Attributes:
        tree: The tree.
        cost: In units of one encoder.
        losses: By task, the disagreement with the expert on held-out images, relative to that with one encoder. With
            labels, the loss of the metric against the expert in percent. None for a task that cannot be judged.
        power: What the losses are raised to before their mean; see `POWER`.
    """

    tree: Tree
    cost: float
    losses: dict[str, float | None]
    power: int

    @property
    def loss(self) -> float:
        """What a search minimises. Without labels it is 1 for one encoder and 0 for one encoder per task."""
        judged = [loss**self.power for loss in self.losses.values() if loss is not None]
        return sum(judged) / len(judged)


class TreeSearch:
    """Tries trees on the same experts and images.

    Args:
        grower: Grows the trees.
        images: Images without labels, as `simomerge.datasets.pictures.as_images` takes them.
        data: A dataset with labels that judges the trees, other than the images. By default a quarter of the images
            does, by the experts' predictions.
        cost_of: What trees cost: "parameters", or "time", which is measured on the first image.

    Attributes:
        tried: All trees so far, in order; the first is one encoder.

    Raises:
        InputError: There are fewer than eight images, or a head cannot be folded.
    """

    def __init__(self, grower: Grower, images: Any, data: Any = None, cost_of: str = "parameters") -> None:
        check_kind(cost_of)
        self.grower, self.experts = grower, grower.experts
        self.images = as_images(images, SEARCH_IMAGES).readable()
        judged = held_out(self.images)
        if len(judged) < 2:
            raise InputError(
                f"{len(self.images)} images: a choice without labels judges on a quarter; give at least 8."
            )
        if rigid := [task for task, expert in self.experts.items() if not is_foldable(expert.heads[task])]:
            raise InputError(f"a budget needs heads that can be folded, and {rigid[0]!r} cannot: give a tree instead.")
        self._labelled = data is not None
        source = data if self._labelled else self.images._subset(judged)
        self._judge = Judge(self.experts, source, self._labelled, lenient=True)
        self._targets = {
            task: list(head_targets(expert, {task: expert}, self.images, VARIANT))
            for task, expert in self.experts.items()
        }
        self._stitches: Known = {}
        self._kept_tokens = ExpertTokens()
        self._losses: dict[TaskPath, dict[str, float]] = {}
        one = Tree.of({grower.blocks: [list(self.experts)]}, list(self.experts), grower.blocks)
        self.shares = self._shares(cost_of, one)
        start = self._measured(grower.grow(one), list(self._judge.tasks))
        self._units = {task: 1.0 if self._labelled else max(value, LEAST_LOSS) for task, value in start.items()}
        self.tried: list[Tried] = []
        self.try_out(one)

    def _shares(self, cost_of: str, one: Tree) -> list[float]:
        """Share of each block in what one encoder costs."""
        first = next(iter(self.experts.values()))
        if cost_of == "time":
            _, image = next(image_batches(self.images, 1))
            image = first.fit(image.to(next(first.parameters()).device))
            with evaluating(first):
                return distributed.from_first(time_shares(first.encoder, image))  # all processes search the same trees
        return TreeEncoder(one, first.encoder).shares()

    def try_out(self, tree: Tree) -> Tried:
        """Grow, stitch, fold and compare with the experts; only for tasks whose path is new."""
        paths = {task: path_of(tree, task) for task in tree.tasks}
        known: dict[str, float | None] = {task: 0.0 for task, path in paths.items() if len(path[0][0]) == 1}  # experts
        known |= {task: None for task in paths if task not in self._judge.tasks}
        known |= {task: self._losses[path][task] for task, path in paths.items() if task in self._losses.get(path, {})}
        if missing := [task for task in tree.tasks if task not in known]:
            model = self.grower.grow(tree)
            if isinstance(model.encoder, TreeEncoder):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # the final stitches will say it again
                    fit_stitches(
                        model, self.experts, self.images, self._stitches, hold_out=True, kept=self._kept_tokens
                    )
            for task, value in self._measured(model, missing).items():
                known[task] = self._losses.setdefault(paths[task], {})[task] = value / self._units[task]
        losses = {task: known[task] for task in tree.tasks}
        tried = Tried(tree, tree.cost(self.shares), losses, 1 if self._labelled else POWER)
        if all(tried.tree != other.tree for other in self.tried):
            self.tried.append(tried)
        return tried

    def _measured(self, model: SimoModel, tasks: Sequence[str]) -> dict[str, float]:
        """The loss against the expert, by task, after the fold."""
        batches = zip(*(self._targets[task] for task in tasks), strict=True)
        joined = [replace(b[0], targets=[target for each in b for target in each.targets]) for b in batches]
        some = model.select(list(tasks))
        sums = head_sums(some, joined, VARIANT)
        folded = with_heads(some, sums.heads({t: fit.ridge for t, fit in sums.choose().items()}, hold_out=True))
        gains = self._judge.gains(self._judge.scores(folded))
        if self._labelled:
            return {task: -gain for task, gain in gains.items()}
        return {task: max(-gain / 100, 0.0) for task, gain in gains.items()}

    def best(self, budget: float) -> Tried:
        """The best tree that costs at most as much, by greedy search.

        Each step takes the change that gains most per cost; see `changes`.
        """
        current = self.tried[0]
        while True:
            affordable = [
                tree for tree in changes(current.tree, list(self.experts)) if tree.cost(self.shares) <= budget + 1e-6
            ]
            trials = []
            for done, tree in enumerate(affordable, start=1):
                trials.append(self.try_out(tree))
                shown = f"cost {trials[-1].cost:.2f}, loss {trials[-1].loss:.3f}: {tree}"
                progress(f"trees from cost {current.cost:.2f}", done, len(affordable), shown)
            gains = [(current.loss - each.loss) / max(each.cost - current.cost, 1e-9) for each in trials]
            if not gains or max(gains) <= 0:
                break
            current = trials[gains.index(max(gains))]
        return self.best_tried(budget)

    def best_tried(self, budget: float) -> Tried:
        """The best tree of those that were tried and cost at most as much."""
        within = [each for each in self.tried if each.cost <= budget + 1e-6]
        return min(within, key=lambda each: (each.loss, each.cost))


def choose_tree(grower: Grower, images: Any, budget: float, data: Any = None, cost_of: str = "parameters") -> Tried:
    """The best tree for a budget in units of one encoder; see `TreeSearch`."""
    return TreeSearch(grower, images, data, cost_of).best(budget)


def path_of(tree: Tree, task: str) -> TaskPath:
    """The groups that a task shares blocks with, from the first block to the last, with the last block of each."""
    return tuple((tree.nodes[place].tasks, tree.nodes[place].last) for place in tree.path(tree.leaf_of(task)))


def changes(tree: Tree, order: Sequence[str]) -> Iterator[Tree]:
    """The trees that cost more than this one by one change: a group splits earlier than it does, if it does.

    It splits as it does later, or in one of the ways of `partitions`, and then as before. So a task may leave its group
    before the others do.

    Args:
        order: The tasks, in the order that all trees give them, so that equal trees compare as equal.
    """
    places = sorted({round(place * (tree.blocks - 1) / (SPLITS - 1)) for place in range(SPLITS)})
    found = dict[Tree, None]()
    for node in tree.nodes:
        later = [tuple(tree.nodes[child].tasks for child in node.children)] if node.children else []
        for block in places:
            if node.first - 1 <= block < node.last:
                found |= dict.fromkeys(
                    _with_split(tree, node.tasks, parts, block, order) for parts in (*later, *partitions(node.tasks))
                )
    yield from found


def partitions(group: Group) -> Iterator[Partition]:
    """The ways in which a group may split: in two, and into single tasks."""
    if len(group) < 2:
        return
    sizes = range(1, len(group) // 2 + 1) if len(group) <= EVERY_PAIR else (1,)
    for size in sizes:
        for part in combinations(group, size):
            rest = tuple(task for task in group if task not in part)
            if len(part) < len(rest) or part < rest:
                yield tuple(sorted((part, rest), key=lambda each: group.index(each[0])))
    if len(group) > 2:
        yield tuple((task,) for task in group)


def _with_split(tree: Tree, group: Group, parts: Partition, block: int, order: Sequence[str]) -> Tree:
    """The tree in which tasks of a group that are in different parts are apart in every block after this one."""

    def apart(other: Group) -> list[Group]:
        pieces = (tuple(task for task in other if task in part) for part in parts)
        return [piece for piece in pieces if piece]

    levels: Mapping[int, Any] = {
        number: [
            piece
            for other in groups
            for piece in (apart(other) if number > block and set(other) <= set(group) else [other])
        ]
        for number, groups in enumerate(tree.partitions, start=1)
    }
    return Tree.of(levels, order, tree.blocks)
