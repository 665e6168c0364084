"""Trees of shared blocks: their text, their nodes, and what is refused before any work."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simomerge.core.errors import InputError
from simomerge.merging.tree import Partition, Tree, check_sharing, read_levels

TASKS = ["a", "b", "c", "d"]


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """A random tree: at every block each group may split in two."""
    tasks = TASKS[: draw(st.integers(1, 4))]
    partitions: list[Partition] = [(tuple(tasks),)]
    for _ in range(draw(st.integers(1, 6))):
        groups: list[tuple[str, ...]] = []
        for group in partitions[-1]:
            first = tuple(task for task in group if draw(st.booleans()))
            rest = tuple(task for task in group if task not in first)
            groups += [part for part in (first, rest) if part]
        partitions.append(tuple(sorted(groups)))
    return Tree(tuple(partitions[draw(st.integers(0, 1)) :]))


@settings(max_examples=100, deadline=None)
@given(trees())
def test_a_tree_is_its_text(tree: Tree) -> None:
    assert Tree.read(str(tree)) == Tree.of(str(tree), tree.tasks, tree.blocks)
    assert [set(map(frozenset, groups)) for groups in Tree.read(str(tree)).partitions] == [
        set(map(frozenset, groups)) for groups in tree.partitions
    ]


@settings(max_examples=100, deadline=None)
@given(trees(), st.data())
def test_a_smaller_and_a_larger_tree_are_their_texts(tree: Tree, data: st.DataObject) -> None:
    """A folder is written for the tree in memory, and read for the tree of its text."""
    left = data.draw(st.lists(st.sampled_from(tree.tasks), max_size=len(tree.tasks) - 1, unique=True))
    smaller = tree.without(left)
    for before, after in zip(tree.partitions, smaller.partitions, strict=True):
        assert {frozenset(set(group) - set(left)) for group in before} - {frozenset()} == set(map(frozenset, after))
    for changed in (smaller, smaller.joined_by("z"), tree.joined_by("z").without(left)):
        assert Tree.read(str(changed)) == changed


@given(trees())
def test_nodes_cover_every_task_at_every_block_once(tree: Tree) -> None:
    for block, groups in enumerate(tree.partitions, start=1):
        assert sorted(n.tasks for n in tree.nodes if n.first <= block <= n.last) == sorted(groups)
    for task in tree.tasks:
        path = [tree.nodes[place] for place in tree.path(tree.leaf_of(task))]
        assert path[0].first == 1 and path[-1].last == tree.blocks
        for before, after in pairwise(path):
            assert after.first == before.last + 1 and task in after.tasks and set(after.tasks) < set(before.tasks)
    assert len({node.name for node in tree.nodes}) == len(tree.nodes)


@settings(max_examples=50, deadline=None)
@given(trees())
def test_the_cost_is_that_of_the_nodes(tree: Tree) -> None:
    assert tree.cost() == pytest.approx(sum(n.last - n.first + 1 for n in tree.nodes) / tree.blocks)
    shares = [2.0**block for block in range(tree.blocks)]
    assert tree.cost(shares) == pytest.approx(sum(sum(shares[n.first - 1 : n.last]) for n in tree.nodes))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (3, "3: a+b+c+d | 4: a, b, c, d"),
        (0, "4: a, b, c, d"),
        (4, "4: a+b+c+d"),
        ("3", "3: a+b+c+d | 4: a, b, c, d"),
        (" 0 ", "4: a, b, c, d"),
        ("all", "4: a+b+c+d"),
        ("2: all | 3: d, c + b , a | each", "2: a+b+c+d | 3: a, b+c, d | 4: a, b, c, d"),
        ({2: "all", "end": [["d"], ["a", "b", "c"]]}, "2: a+b+c+d | 4: a+b+c, d"),
        ({1: ["a+d", "b", "c"], 4: "each"}, "1: a+d, b, c | 4: a, d, b, c"),
        ("1: all | 2: all | each", "2: a+b+c+d | 4: a, b, c, d"),
    ],
)
def test_forms_of_a_tree(given: Any, expected: str) -> None:
    assert str(Tree.of(given, TASKS, 4)) == expected


def test_a_number_of_blocks_is_read_the_same_whatever_the_tasks_are_called() -> None:
    assert str(Tree.of(3, ["each", "all"], 4)) == "3: each+all | 4: each, all"


def refused() -> Iterator[tuple[Any, str]]:
    yield (
        "2: a, b+c+d | 3: a+b, c+d | each",
        r"a\+b at block 3 joins .* again\. Write 'a, b' in the level that .* block 3",
    )
    yield (
        "1: a+b, c+d | 3: a+b+c, d | each",
        r"joins tasks .* \(a\+b, c\+d\).* Write 'a\+b, c' in the level .* block 2\.",
    )
    yield "2: all | a, b, c, e", "names 'e', which is no task"
    yield "2: all | a, b, c", "leaves out task 'd'"
    yield "2: all | a, b, c, d+a", "'a' in one level twice"
    yield "3: all | 2: each", "block 2 comes after block 3"
    yield "3: all | 3: each", "block 3 comes after block 3"
    yield "5: all | each", "splits after block 5, but the encoder has 4 blocks: give at most 4"
    yield 5, "splits after block 5, but the encoder has 4 blocks: give at most 4"
    yield "5", "splits after block 5, but"
    yield "2: all | 5: each", "ends at block 5, but the encoder has 4 blocks: the last level may leave its number out"
    yield -1, "cannot leave after block -1"
    yield "-1", "cannot leave after block -1"
    yield "9" * 5000, "no task here"
    yield "3: all", r"ends at block 3, but .* 4 blocks: add a last level .* the blocks after it, such as '\| each'"
    yield "1:", "level 1 of the tree has no groups of tasks: write them after its number"
    yield "1: all |", "the last level of the tree has no groups"
    yield {1: None, 4: "each"}, "level 1 of the tree has no groups"
    yield "all | each", "every level of a tree but the last one starts with its last block"
    yield "x: all | each", "'x' is not the last block"
    yield {0: "all", 4: "each"}, "0 is not the last block"
    yield {2.0: "all", 4: "each"}, "2.0 is not the last block"
    yield {2: 5}, "no list of groups"
    yield {2: [["a", 3]]}, "names 3, which is no task"
    yield "", "no tree of shared blocks"
    yield None, "no tree of shared blocks"
    yield True, "no tree of shared blocks"
    yield 2.5, "no tree of shared blocks"


@pytest.mark.parametrize(("given", "message"), list(refused()))
def test_what_is_no_tree(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Tree.of(given, TASKS, 4)


def test_units_are_called_by_their_name() -> None:
    with pytest.raises(InputError, match="splits after stage 9, but the encoder has 4 stages"):
        Tree.of(9, TASKS, 4, "stage")


def test_a_text_is_checked_without_an_encoder() -> None:
    assert read_levels(2, ["a", "b"]) == ((2, (("a", "b"),)), (None, (("a",), ("b",))))
    with pytest.raises(InputError, match="joins"):
        read_levels("2: a, b | all", ["a", "b"])


@pytest.mark.parametrize("budget", [0.9, 4.1, float("nan"), float("inf"), True, "2"])
def test_a_budget_is_between_one_encoder_and_one_per_task(budget: Any) -> None:
    with pytest.raises(InputError, match=r"from 1 \(one encoder\) to 4 \(one per task\)"):
        check_sharing(None, budget, TASKS)


@pytest.mark.parametrize("given", [(1, None), ("each", None), (None, 1.0)])
def test_a_single_task_shares_nothing(given: tuple[Any, Any]) -> None:
    with pytest.raises(
        InputError, match=r"a single task \(a\) shares blocks with no other: give more experts, or leave"
    ):
        check_sharing(*given, ["a"])
    check_sharing(*given, ["a", "b"])


def test_a_tree_and_a_budget_exclude_each_other() -> None:
    check_sharing(None, 1.5, TASKS)
    with pytest.raises(InputError, match="give one of the two"):
        check_sharing(2, 1.5, TASKS)
