"""What holds for every tree: drawn trees, methods and experts."""

from __future__ import annotations

import tempfile
from itertools import combinations
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from simomerge.assembly.experts import check_experts
from simomerge.assembly.merge import merge
from simomerge.assembly.sharing.grow import Grower
from simomerge.assembly.sharing.search import changes, path_of
from simomerge.merging import get_method
from simomerge.merging.tree import Partition, Tree
from simomerge.models.model import SimoModel, load

from .conftest import TASKS, equal, predicted, random_stitches

FEW = settings(
    max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
Experts = dict[str, SimoModel]


@st.composite
def trees(draw: st.DrawFn, tasks: tuple[str, ...] = tuple(TASKS), whole: bool = True) -> Tree:
    """A random tree of four blocks: at every block each group may split in two. All share the first one if whole."""
    partitions: list[Partition] = [(tasks,)]
    for _ in range(4):
        groups: list[tuple[str, ...]] = []
        for group in partitions[-1]:
            first = tuple(task for task in group if draw(st.booleans()))
            rest = tuple(task for task in group if task not in first)
            groups += [part for part in (first, rest) if part]
        partitions.append(tuple(sorted(groups, key=lambda group: tasks.index(group[0]))))
    return Tree(tuple(partitions[:4] if whole else partitions[1:]))


methods = st.one_of(
    st.builds(lambda scale: get_method("task-arithmetic", scale=scale), st.floats(0.1, 1)),
    st.builds(lambda density: get_method("ties", density=density), st.floats(0.1, 0.9)),
    st.just(get_method("average")),
)


def grown(base: SimoModel, experts: Experts, method: Any, tree: Tree) -> SimoModel:
    return random_stitches(Grower(base, check_experts(base, experts), method).grow(tree))


@FEW
@given(methods)
def test_the_trivial_tree_is_the_merge_and_the_finest_is_the_experts(
    base: SimoModel, experts: Experts, picture: Tensor, method: Any
) -> None:
    grower = Grower(base, check_experts(base, experts), method)
    one, each = (grower.grow(Tree.of(text, list(TASKS), 4)) for text in ("all", "each"))
    assert equal(predicted(one, picture), predicted(merge(base, experts, method), picture))
    found = predicted(each, picture)
    for task, expert in experts.items():
        assert equal(predicted(expert, picture), {task: found[task]})


@FEW
@given(trees(), methods, st.permutations(list(TASKS)))
def test_the_order_of_tasks_does_not_matter(
    base: SimoModel, experts: Experts, picture: Tensor, tree: Tree, method: Any, order: list[str]
) -> None:
    other = Tree.of({last: [list(group) for group in groups] for last, groups in tree.levels()}, order, 4)
    assert other.cost() == tree.cost()
    grower = [Grower(base, check_experts(base, {t: experts[t] for t in tasks}), method) for tasks in (TASKS, order)]
    first, second = (predicted(each.grow(shape), picture) for each, shape in zip(grower, (tree, other), strict=True))
    for task in TASKS:
        assert_close(second[task], first[task], rtol=1e-3, atol=1e-4)


@FEW
@given(trees(whole=False), methods)
def test_a_saved_tree_loads_to_equal_predictions(
    base: SimoModel, experts: Experts, picture: Tensor, tree: Tree, method: Any
) -> None:
    model = Grower(base, check_experts(base, experts), method).grow(tree)
    model = model if tree.is_trivial else random_stitches(model)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(model.save_pretrained(f"{folder}/scene"))
    assert equal(predicted(loaded, picture), predicted(model, picture))


@FEW
@given(trees(("normals", "parts"), whole=False), methods)
def test_a_task_that_leaves_at_once_changes_nothing_for_the_others(
    base: SimoModel, experts: Experts, picture: Tensor, tree: Tree, method: Any
) -> None:
    """Neither the weights nor the predictions: they are those of a merge without it, bit for bit."""
    some = {task: experts[task] for task in tree.tasks}
    alone = Grower(base, check_experts(base, some), method).grow(tree)
    joined = Tree(tuple((("depth",), *groups) for groups in tree.partitions))
    found = predicted(Grower(base, check_experts(base, experts), method).grow(joined), picture, list(some))
    assert equal(found, predicted(alone, picture))


def apart(tree: Tree) -> set[tuple[int, str, str]]:
    """Every block at which two tasks are in different groups."""
    groups = [{task: group for group in level for task in group} for level in tree.partitions]
    return {(n, a, b) for n, of in enumerate(groups) for a, b in combinations(sorted(tree.tasks), 2) if of[a] != of[b]}


@given(trees(("a", "b", "c", "d", "e"), whole=False))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_change_keeps_apart_what_is_apart_and_costs_more(tree: Tree) -> None:
    found = list(changes(tree, "abcde"))
    assert len(found) == len(set(found)) and (found or tree.cost() == 5)
    for other in found:
        assert apart(tree) < apart(other) and other.cost() > tree.cost()


@pytest.mark.parametrize("tasks", ["ab", "abc", "abcd"])
def test_changes_lead_from_one_encoder_to_every_tree(tasks: str) -> None:
    """Counted by another way: a tree is a chain of ever finer partitions."""
    reached, border = set[Tree](), {Tree.of("all", list(tasks), 3)}
    while border:
        reached |= border
        border = {other for tree in border for other in changes(tree, tasks)} - reached
    partitions = {frozenset(map(frozenset, tree.partitions[-1])) for tree in reached}

    def count(partition: frozenset[frozenset[str]], blocks: int) -> int:
        finer = [each for each in partitions if all(any(group <= wide for wide in partition) for group in each)]
        return sum(count(each, blocks - 1) for each in finer) if blocks else 1

    assert len(partitions) == {2: 2, 3: 5, 4: 15}[len(tasks)]  # Bell numbers
    assert len(reached) == count(frozenset([frozenset(tasks)]), 3)


@FEW
@given(trees(), trees(), methods)
def test_a_task_depends_on_the_groups_of_its_path_only(
    base: SimoModel, experts: Experts, picture: Tensor, one: Tree, other: Tree, method: Any
) -> None:
    grower = Grower(base, check_experts(base, experts), method)
    alike = [task for task in TASKS if path_of(one, task) == path_of(other, task)]
    if alike:
        found = [predicted(grower.grow(tree), picture, alike) for tree in (one, other)]
        assert equal(*found)
