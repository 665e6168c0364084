"""Partitions against brute force, and the search that measures the groups of its answer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from simomerge.models.model import SimoModel
from simomerge.relations import Judge, MergedGroup, Relations, group_tasks, partitions
from simomerge.relations.grouping import Grouping, choose_groups, merge_group, predict_gains, worth
from simomerge.relations.partitions import Group, best_partitions

from .conftest import TASKS, RandomDataset


def all_partitions(tasks: list[str]) -> Iterator[list[list[str]]]:
    """Each task joins one of the existing groups, or starts a new one."""
    if not tasks:
        yield []
        return
    for rest in all_partitions(tasks[1:]):
        for place in range(len(rest)):
            yield [*rest[:place], [tasks[0], *rest[place]], *rest[place + 1 :]]
        yield [[tasks[0]], *rest]


def random_worth(tasks: str, seed: int) -> dict[Group, float]:
    rng = random.Random(seed)
    return {
        group: 0.0 if size == 1 else rng.uniform(-10, 3)
        for size in range(1, len(tasks) + 1)
        for group in combinations(tasks, size)
    }


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10**6))
def test_no_partition_is_better(count: int, seed: int) -> None:
    tasks = "abcdef"[:count]
    worth = random_worth(tasks, seed)
    found = best_partitions(tasks, worth.__getitem__)
    every = [[tuple(sorted(group)) for group in partition] for partition in all_partitions(list(tasks))]
    assert len(every) == [1, 1, 2, 5, 15, 52, 203][count]
    for budget in range(1, count + 1):
        assert sorted(task for group in found[budget] for task in group) == sorted(tasks)
        assert len(found[budget]) <= budget
        best = max(sum(map(worth.__getitem__, partition)) for partition in every if len(partition) <= budget)
        assert sum(map(worth.__getitem__, found[budget])) == pytest.approx(best)


def test_the_order_of_the_tasks_does_not_matter() -> None:
    worth = random_worth("abcde", 3)
    one = best_partitions("abcde", worth.__getitem__)
    other = best_partitions("ecadb", lambda group: worth[tuple(sorted(group))])
    for budget in range(1, 6):
        assert {frozenset(g) for g in one[budget]} == {frozenset(g) for g in other[budget]}


def test_many_tasks_are_joined_greedily() -> None:
    """Four families of tasks that only fit with each other: the greedy search finds them too."""
    tasks = [f"t{index}" for index in range(16)]
    assert len(tasks) > partitions.EXACT
    family = {task: index % 4 for index, task in enumerate(tasks)}

    def worth(group: Group) -> float:
        return -float(sum(1 + 9 * (family[a] != family[b]) for a, b in combinations(group, 2)))

    found = best_partitions(tasks, worth)
    assert {frozenset(family[task] for task in group) for group in found[4]} == {frozenset({f}) for f in range(4)}
    assert found[16] == tuple((task,) for task in tasks) and found[1] == (tuple(tasks),)


# The search ---------------------------------------------------------------------------------------------


class World:
    """Groups with known gains; counts how often each is measured."""

    def __init__(self, seed: int, crowd: float) -> None:
        rng = random.Random(seed)
        self.pair_gains = {(a, b): rng.uniform(-4, 0) for a in "abcde" for b in "abcde" if a != b}
        self.crowd = crowd
        self.asked: list[Group] = []

    def gains(self, group: Group) -> dict[str, float]:
        mean = predict_gains(group, lambda a, b: self.pair_gains[a, b])
        return {task: value - self.crowd * (len(group) - 2) for task, value in mean.items()}

    def measure(self, group: Group) -> MergedGroup:
        self.asked.append(group)
        return MergedGroup(group, self.gains(group), 0.3)

    def worth(self, group: Group) -> float:
        return sum(self.gains(group).values()) if len(group) > 1 else 0.0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("crowd", [0.0, 0.5])
def test_if_large_groups_cost_more_the_answer_is_optimal(seed: int, crowd: float) -> None:
    """If larger groups cost more, the prediction is never too low, so no better group can be missed."""
    world = World(seed, crowd)
    merges, choices = choose_groups("abcde", world.measure, True)
    assert len(world.asked) == len(set(world.asked)) == len(merges) <= 26
    best = best_partitions("abcde", world.worth)
    for choice in choices:
        assert choice.measured
        assert 5 * choice.gain == pytest.approx(sum(map(world.worth, best[choice.budget])))
    assert choices[-1].gain == 0 and set(choices[0].gains) == set("abcde")


@pytest.mark.parametrize("seed", range(3))
def test_without_labels_every_task_counts_equally(seed: int) -> None:
    """Without labels a task with a hundred times larger losses changes no answer; with labels it decides."""
    world, loud = World(seed, 0.5), World(seed, 0.5)

    def measure(group: Group) -> MergedGroup:
        gains = loud.gains(group)
        return MergedGroup(group, {t: v * (100 if t == "c" else 1) for t, v in gains.items()}, None)

    groups, others = (
        [choice.groups for choice in choose_groups("abcde", how, False)[1]] for how in (world.measure, measure)
    )
    assert groups == others
    with_labels = choose_groups("abcde", measure, True)[1]
    assert all(("c",) in choice.groups for choice in with_labels[1:])


def test_without_labels_losses_count_in_squares() -> None:
    gains = {"a": -1.0, "b": -3.0}
    assert worth(gains, {"a": 1.0, "b": 1.5}) == pytest.approx(-1 - 4)
    assert worth({"a": 0.5}, {"a": 1.0}) == pytest.approx(0.25)


def test_with_a_limit_some_gains_are_predicted_and_marked() -> None:
    world = World(0, 0.5)
    merges, choices = choose_groups("abcde", world.measure, True, limit=0)
    assert len(merges) == 10 and not choices[0].measured and choices[-1].measured
    assert choices[0].gains == pytest.approx(predict_gains(tuple("abcde"), lambda a, b: world.pair_gains[a, b]))


@pytest.mark.parametrize("labelled", [True, False])
def test_two_tasks(labelled: bool) -> None:
    merges, choices = choose_groups("ab", World(0, 0).measure, labelled)
    assert [merge.tasks for merge in merges] == [("a", "b")]
    assert [choice.groups for choice in choices] == [(("a", "b"),), (("a",), ("b",))]


@pytest.mark.usefixtures("float32")
@pytest.mark.filterwarnings("ignore:.*the fold stays close")
def test_groups_of_models(base: SimoModel, experts: dict[str, SimoModel], dataset: RandomDataset, judge: Judge) -> None:
    found = group_tasks(base, experts, dataset.take(8), judge)
    assert found.tasks == list(TASKS) and not found.labelled
    assert {merge.tasks for merge in found.merges} >= set(combinations(TASKS, 2))
    assert all(set(merge.gains) == set(merge.tasks) for merge in found.merges)
    model, scale = merge_group(base, {task: experts[task] for task in ("depth", "normals")}, dataset.take(8))
    wanted = judge.gains(judge.scores(model))
    pair = next(m for m in found.merges if m.tasks == ("depth", "normals"))
    assert pair.gains == pytest.approx(wanted) and pair.scale == scale


class Plain(nn.Module):
    """A head without the methods that folding needs."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: object) -> torch.Tensor:
        found: torch.Tensor = self.head(features)
        return found


def test_heads_that_cannot_be_folded_are_averaged(
    base: SimoModel, experts: dict[str, SimoModel], dataset: RandomDataset
) -> None:
    plain = SimoModel(
        experts["depth"].encoder, {"depth": TASKS["depth"]}, {"depth": Plain(experts["depth"].heads["depth"])}
    )
    model, scale = merge_group(base, {"depth": plain, "normals": experts["normals"]}, dataset)
    assert scale is None
    weight = "layernorm.weight"
    ours, first, second = (
        m.encoder.backbone.state_dict()[weight] for m in (model, experts["depth"], experts["normals"])
    )
    assert torch.allclose(ours, (first + second) / 2, atol=1e-6)


def test_without_labels_a_task_that_loses_almost_nothing_does_not_choose_the_groups() -> None:
    """Texture loses at most 0.08 %: the pair in which segmentation loses least is the best, not that of depth."""
    gains = {
        ("seg", "depth"): (-6.0, -6.0),
        ("seg", "texture"): (-2.0, -0.08),
        ("depth", "texture"): (-6.2, -0.001),
        ("seg", "depth", "texture"): (-9.0, -9.0, -0.1),
    }

    def measure(group: Group) -> MergedGroup:
        return MergedGroup(group, dict(zip(group, gains[group], strict=True)), 0.3)

    merges, choices = choose_groups(["seg", "depth", "texture"], measure, False)
    assert choices[1].groups == (("seg", "texture"), ("depth",))
    found = Relations(
        ["seg", "depth", "texture"], "the experts' predictions", 16, 8, Grouping([], False, merges, choices)
    )
    (pairs,) = (line for line in found.verdict() if line.startswith("Merged in pairs"))
    assert pairs == (
        "Merged in pairs, seg and texture do best (0.33 of what these tasks lose in their mean pair), seg and depth"
        " worst (1.24)."
    )
