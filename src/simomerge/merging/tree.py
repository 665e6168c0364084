"""Trees of shared blocks: for every block of an encoder a partition of the tasks, never coarser than that before it.

One encoder for all tasks, one encoder per task and whole encoders for groups of tasks are special cases. A tree is
written level by level: the last block of the level, a colon, and the groups, such as
``4: depth+normals+edges | 6: edges, depth+normals | depth, normals, edges``. ``all`` stands for one group of all tasks
and ``each`` for one group per task; the last level may leave its number out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from simomerge.checkpoints.description import MOST_TASKS
from simomerge.core.errors import InputError
from simomerge.core.registry import suggestion
from simomerge.core.text import shown

Group = tuple[str, ...]
Partition = tuple[Group, ...]
Levels = tuple[tuple[int | None, Partition], ...]
"""The last block of each level, counted from 1, and the groups of tasks there; None is the last block of the encoder"""

MOST_BLOCKS = 10_000
"""Deeper trees are refused: the number may come from a file."""

EXAMPLE = "'6: all | each', or '4: all | 6: edges, depth+normals | each'"


class TreeError(InputError):
    """A tree of shared blocks is wrong. Who knows where it was given adds that to the message."""


@dataclass(frozen=True)
class Node:
    """Consecutive blocks that a group of tasks shares.

    Attributes:
        tasks: The group.
        first, last: The blocks, counted from 1.
        parent: Position of the node that it follows, in `Tree.nodes`; None at the first block.
        children: Positions of the nodes that follow it.
    """

    tasks: Group
    first: int
    last: int
    parent: int | None = None
    children: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """A name that no other node of the tree has, for files and tensors."""
        return f"{self.first}-{self.tasks[0]}"


@dataclass(frozen=True)
class Tree:
    """Which tasks share which blocks of an encoder.

    Attributes:
        partitions: The groups at each block. Tasks are in the order of the first block's groups, and groups in the
            order of their first tasks.

    Raises:
        TreeError: There is no block, or a level does not refine the one before it.

    Example:
        >>> tree = Tree.of("2: all | 3: edges, depth+normals | each", ["depth", "normals", "edges"], blocks=4)
        >>> tree.cost(), str(tree)
        (1.75, '2: depth+normals+edges | 3: depth+normals, edges | 4: depth, normals, edges')
        >>> print(tree.drawing())
        blocks 1-2: depth + normals + edges
        |-- block 3: depth + normals
        |   |-- block 4: depth
        |   `-- block 4: normals
        `-- blocks 3-4: edges
    """

    partitions: tuple[Partition, ...]

    def __post_init__(self) -> None:
        if not self.partitions:
            raise TreeError("a tree of shared blocks needs an encoder with at least one block.")
        for block, (before, after) in enumerate(zip(self.partitions, self.partitions[1:], strict=False), start=2):
            if after != before:
                check_refines(before, after, block)

    @classmethod
    def of(cls, given: Any, tasks: Sequence[str], blocks: int, unit: str = "block") -> Tree:
        """The tree that a user describes.

        Args:
            given: The number of blocks that all tasks share, or the levels as `read_levels` takes them.
            tasks: All tasks in order.
            blocks: Number of blocks of the encoder.
            unit: What messages call a block: "block" or "stage".

        Raises:
            TreeError: As `read_levels`, or the tree does not fit the number of blocks.
        """
        if isinstance(given, Tree):
            given = dict(given.levels())
        levels = read_levels(given, tasks)
        *splits, last = [end for end, _ in levels]
        deepest = max((end or 0 for end in splits), default=0)
        if deepest > blocks:
            raise TreeError(
                f"the tree splits after {unit} {deepest}, but the encoder has {blocks} {unit}s: give at most {blocks}."
            )
        if last is not None and last > blocks:
            raise TreeError(
                f"the tree ends at {unit} {last}, but the encoder has {blocks} {unit}s: the last level may leave its"
                " number out, or be called 'end'."
            )
        if last is not None and last < blocks:
            raise TreeError(
                f"the tree ends at {unit} {last}, but the encoder has {blocks} {unit}s: add a last level with the"
                f" groups of the {unit}s after it, such as '| each'."
            )
        partitions: list[Partition] = []
        for last, groups in levels:
            partitions += [groups] * ((blocks if last is None else last) - len(partitions))
        return cls(tuple(partitions))

    @classmethod
    def read(cls, text: str) -> Tree:
        """Parse the text that `str(tree)` gives. Raises TreeError for any other text."""
        last = str(text).rpartition("|")[2].partition(":")[0].strip()
        if not last.isdecimal() or len(last) > 6 or int(last) > MOST_BLOCKS:
            raise TreeError(f"{text!r} is no tree of shared blocks, such as '4: a+b | 6: a, b'.")
        groups = text.partition("|")[0].partition(":")[2]
        tasks = [task.strip() for group in groups.split(",") for task in group.split("+")]
        if wrong := [task for task in tasks if not task.isidentifier()]:  # some become names of files
            raise TreeError(f"the tree names {wrong[0]!r}, which cannot be the name of a task.")
        if len(tasks) > MOST_TASKS:
            raise TreeError(f"the tree has {len(tasks):,} tasks, and a model has at most {MOST_TASKS:,}.")
        return cls.of(text, tasks, int(last))

    @property
    def blocks(self) -> int:
        return len(self.partitions)

    @property
    def tasks(self) -> list[str]:
        """The tasks in order."""
        return [task for group in self.partitions[0] for task in group]

    @property
    def is_trivial(self) -> bool:
        """Whether all tasks share all blocks."""
        return len(self.partitions[-1]) == 1

    @property
    def splits(self) -> int:
        """The first block that not all tasks share, counted from 1; one more than there are if they share all."""
        return next((n for n, groups in enumerate(self.partitions, start=1) if len(groups) > 1), self.blocks + 1)

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes in order of their first blocks. A parent comes before its children."""
        found: list[Node] = []
        open_nodes: dict[Group, int] = {}
        for block, groups in enumerate(self.partitions, start=1):
            if block > 1 and groups == self.partitions[block - 2]:
                continue
            ending = {group: place for group, place in open_nodes.items() if group not in groups}
            for place in ending.values():
                found[place] = replace(found[place], last=block - 1)
            for group in groups:
                if group not in open_nodes:
                    parent = next((place for other, place in ending.items() if set(group) <= set(other)), None)
                    open_nodes[group] = len(found)
                    if parent is not None:
                        found[parent] = replace(found[parent], children=(*found[parent].children, len(found)))
                    found.append(Node(group, block, self.blocks, parent))
            open_nodes = {group: place for group, place in open_nodes.items() if group in groups}
        return tuple(found)

    @property
    def leaves(self) -> list[int]:
        """Positions of the nodes that reach the last block, in the order of their tasks."""
        ends = [place for place, node in enumerate(self.nodes) if not node.children]
        return sorted(ends, key=lambda place: self.partitions[-1].index(self.nodes[place].tasks))

    def leaves_of(self, tasks: Iterable[str]) -> list[int]:
        """Positions of the leaves that the heads of some tasks read."""
        asked = set(tasks)
        return [leaf for leaf in self.leaves if asked & set(self.nodes[leaf].tasks)]

    def path(self, node: int) -> list[int]:
        """Positions of the nodes from the first block to a node, which is included."""
        parent = self.nodes[node].parent
        return [*([] if parent is None else self.path(parent)), node]

    def leaf_of(self, task: str) -> int:
        """Position of the leaf that a task's head reads."""
        return self.leaves_of([task])[0]

    def group_of(self, task: str) -> Group:
        """The tasks that share the first block with a task."""
        return next(group for group in self.partitions[0] if task in group)

    def cost(self, shares: Sequence[float] | None = None) -> float:
        """The number of groups, summed over the blocks, in units of one encoder.

        Args:
            shares: Share of each block in the cost of one encoder; equal by default.
        """
        weights = shares or [1 / self.blocks] * self.blocks
        return sum(share * len(groups) for share, groups in zip(weights, self.partitions, strict=True))

    def without(self, tasks: Collection[str]) -> Tree:
        """The tree of the other tasks.

        Example:
            >>> str(Tree.of("2: all | 3: a, b+c | each", ["a", "b", "c"], blocks=4).without(["a"]))
            '3: b+c | 4: b, c'
        """
        left_out, partitions = set(tasks), list[Partition]()
        for last, groups in self.levels():
            kept = (tuple(task for task in group if task not in left_out) for group in groups)
            ordered = sorted(filter(None, kept), key=lambda group: self.tasks.index(group[0]))
            partitions += [tuple(ordered)] * (last - len(partitions))
        return Tree(tuple(partitions))

    def joined_by(self, task: str) -> Tree:
        """The tree with one more task. It shares the blocks that all tasks share, and then has its own.

        Example:
            >>> str(Tree.of("2: all | each", ["a", "b"], blocks=4).joined_by("c"))
            '2: a+b+c | 4: a, b, c'
        """
        together = (((*groups[0], task),) if len(groups) == 1 else (*groups, (task,)) for groups in self.partitions)
        return Tree(tuple(together))

    def levels(self) -> list[tuple[int, Partition]]:
        """The last block of each level, and its groups."""
        following = (*self.partitions[1:], None)
        pairs = enumerate(zip(self.partitions, following, strict=True), start=1)
        return [(last, groups) for last, (groups, then) in pairs if groups != then]

    def __str__(self) -> str:
        return " | ".join(f"{last}: {', '.join(map('+'.join, groups))}" for last, groups in self.levels())

    def drawing(self) -> str:
        """The tree as lines of text."""
        roots = [place for place, node in enumerate(self.nodes) if node.parent is None]
        return "\n".join(line for root in roots for line in self._lines(root))

    def _lines(self, place: int) -> list[str]:
        node = self.nodes[place]
        where = f"block {node.first}" if node.first == node.last else f"blocks {node.first}-{node.last}"
        lines = [f"{where}: {' + '.join(node.tasks)}"]
        for number, child in enumerate(node.children, start=1):
            last = number == len(node.children)
            first_line, *others = self._lines(child)
            lines.append(f"{'`' if last else '|'}-- {first_line}")
            lines += [f"{' ' if last else '|'}   {line}" for line in others]
        return lines


def read_levels(given: Any, tasks: Sequence[str]) -> Levels:
    """The levels that a user describes, checked in everything that needs no encoder.

    Args:
        given: The number of blocks that all tasks share before each goes its own way, perhaps as text; a text such as
            ``"6: all | each"``; or a mapping from the last block of each level to its groups, as text or as lists.
        tasks: All tasks in order.

    Raises:
        TreeError: Not a tree, an unknown, missing or repeated task, levels out of order, or groups that join again.

    Example:
        >>> read_levels("6: all | each", ["depth", "edges"])
        ((6, (('depth', 'edges'),)), (None, (('depth',), ('edges',))))
    """
    if isinstance(given, bool) or not isinstance(given, (int, str, Mapping)) or given in ("", {}):
        raise TreeError(f"{shown(given)} is no tree of shared blocks: give the number of shared blocks, or {EXAMPLE}.")
    if isinstance(given, str) and re.fullmatch(r"\s*-?\d{1,9}\s*", given):
        given = int(given)
    if isinstance(given, int):
        if given < 0:
            raise TreeError(f"the tasks cannot leave after block {given}: give 0 or a number of blocks.")
        shared: list[tuple[Any, Any]] = [(given, [list(tasks)])] if given else []
        given = [*shared, (None, [[task] for task in tasks])]  # no words: they may be names of tasks
    elif isinstance(given, str):
        given = [_level(text) for text in given.split("|")]
    else:
        given = list(given.items())
    levels: list[tuple[int | None, Partition]] = []
    for number, (last, groups) in enumerate(given, start=1):
        end = _last_block(last, is_final=number == len(given))
        before = levels[-1][0] or 0 if levels else 0
        if end is not None and end <= before:
            raise TreeError(f"the levels of a tree go up: block {end} comes after block {before}.")
        partition = _partition(groups, tasks, "the last level" if end is None else f"level {end}")
        tasks = [task for group in (levels[0][1] if levels else partition) for task in group]
        if levels:
            check_refines(levels[-1][1], partition, before + 1)
        levels.append((end, partition))
    return tuple(levels)


def check_sharing(share: Any, budget: float | None, tasks: Sequence[str]) -> None:
    """Raise InputError for a tree or a budget that no encoder can have, or if both are given, or a single task."""
    if share is not None and budget is not None:
        raise InputError("a budget chooses the tree of shared blocks: give one of the two.")
    if len(tasks) < 2:
        raise TreeError(
            f"a single task ({', '.join(tasks)}) shares blocks with no other: give more experts, or leave the"
            " tree or budget out."
        )
    if budget is None:
        read_levels(share, tasks)
        return
    valid = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    if not valid or not 1 <= budget <= len(tasks):
        raise InputError(
            f"a budget of {budget} encoders: give a number from 1 (one encoder) to {len(tasks)} (one per task)."
        )


def check_refines(before: Partition, after: Partition, block: int) -> None:
    """Check that no group of ``after``, the groups at a block, joins tasks that were apart before it.

    Raises:
        TreeError: One does; the message names it.
    """
    place = {task: number for number, wider in enumerate(before) for task in wider}
    for group in after:
        found = {place.get(task) for task in group}
        if len(found) > 1 or None in found:
            parts = [[task for task in wider if task in group] for wider in before]
            apart = ", ".join("+".join(part) for part in parts if part)
            raise TreeError(
                f"{'+'.join(group)} at block {block} joins tasks that were apart before it"
                f" ({', '.join(map('+'.join, before))}), and tasks that have split cannot share a block again. Write"
                f" '{apart}' in the level that begins at block {block}."
            )


def _level(text: str) -> tuple[Any, str]:
    last, colon, groups = text.partition(":")
    return (last.strip(), groups) if colon else (None, text)


def _last_block(given: Any, is_final: bool) -> int | None:
    if given is None or str(given).strip() == "end":
        if is_final:
            return None
        raise TreeError(f"every level of a tree but the last one starts with its last block, as in {EXAMPLE}.")
    try:
        number = int(given)
    except (TypeError, ValueError):
        number = 0
    if isinstance(given, (bool, float)) or number < 1:
        raise TreeError(f"{given!r} is not the last block of a level: give a number of at least 1, as in {EXAMPLE}.")
    return number


def _partition(given: Any, tasks: Sequence[str], level: str) -> Partition:
    """Groups of tasks in the order of the tasks."""
    if given is None or (isinstance(given, str) and not given.strip()):
        raise TreeError(f"{level} of the tree has no groups of tasks: write them after its number, as in {EXAMPLE}.")
    if isinstance(given, str):
        words = given.strip()
        if words in ("all", "each") and words not in tasks:
            return (tuple(tasks),) if words == "all" else tuple((task,) for task in tasks)
        if "|" in words:  # as in a YAML file without the quotes
            raise TreeError(
                f"{level} of the tree is {shown(words)}: put quotes around the tree, or each level on a line."
            )
        given = [[name.strip() for name in group.split("+")] for group in words.split(",")]
    if not isinstance(given, Iterable) or not all(isinstance(group, (str, list, tuple)) for group in given):
        raise TreeError(f"{shown(given)} is no list of groups of tasks: give a tree such as {EXAMPLE}.")
    groups = [group.split("+") if isinstance(group, str) else list(group) for group in given]
    names = [name for group in groups for name in group]
    known, counts = set(tasks), Counter(map(str, names))
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise TreeError(f"the tree names {shown(name)}, which is no task here{suggestion(str(name), tasks)}")
        if counts[name] > 1:
            raise TreeError(f"the tree has task {name!r} in one level twice: give it once in every level.")
    if missing := [task for task in tasks if task not in counts]:
        raise TreeError(f"the tree leaves out task {missing[0]!r}: every level has all of {', '.join(tasks)}.")
    order = {task: place for place, task in enumerate(tasks)}
    sorted_groups = [tuple(sorted(group, key=order.__getitem__)) for group in groups if group]
    return tuple(sorted(sorted_groups, key=lambda group: order[group[0]]))
