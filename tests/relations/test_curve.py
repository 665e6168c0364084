"""What the curve of shared blocks recommends, and in which words."""

from __future__ import annotations

from typing import Any

import pytest

from simomerge.relations import verdict
from simomerge.relations.curve import drawings, recommended_tree
from simomerge.relations.units import avoided_share

TREES = {
    1.0: ("8: a+b+c", (8, 8, 8)),
    1.5: ("6: a+b+c | 8: a, b, c", (6, 6, 6)),
    1.75: ("4: a+b+c | 6: a, b+c | 8: a, b, c", (4, 6, 6)),
    2.0: ("8: a, b+c", (0, 8, 8)),
    3.0: ("8: a, b, c", (0, 0, 0)),
}


def curve(gains: dict[float, float], judged_by: str = "labels") -> dict[str, Any]:
    """Trees of three tasks with these gains by cost."""
    shared = [
        {"budget": cost, "cost": cost, "tree": TREES[cost][0], "gain": gain,
         "shared": dict(zip("abc", TREES[cost][1], strict=True)), "gains": dict.fromkeys("abc", gain)}
        for cost, gain in gains.items()
    ]  # fmt: skip
    return {"tasks": list("abc"), "judged_by": judged_by, "images": 256, "judged_images": 128, "sharing": shared}


def test_the_tree_where_the_curve_bends_most() -> None:
    """Above the line to the experts: 0.75 - 0.25 at 1.5, 0.9 - 0.375 at 1.75, 0.95 - 0.5 at 2."""
    found = curve({1.0: -4.0, 1.5: -1.0, 1.75: -0.4, 2.0: -0.2, 3.0: 0.0})
    assert verdict(found) == [
        "Shared blocks: take the tree of 1.75 encoders (Delta_MTL on 128 labelled images: -0.4 %, with one encoder"
        " -4.0 %).",
        "There the curve bends most: the tree avoids 90 % of the loss for 38 % of the extra cost of 3 encoders.",
        "Where the tasks leave this tree: a after block 4, b after block 6, c after block 6.",
    ]
    assert recommended_tree(found, budget=1.5) == found["sharing"][1]
    headings, pictures = zip(*drawings(found), strict=True)
    assert headings[2:4] == ("1.75 encoders: -0.4 %, recommended", "2.00 encoders: -0.2 %")
    assert pictures[3] == "blocks 1-8: a\nblocks 1-8: b + c"


def test_tasks_that_never_leave_and_that_share_nothing() -> None:
    found = curve({1.0: -4.0, 2.0: 0.4, 3.0: 0.0}, "the experts' predictions")
    assert verdict(found) == [
        "Shared blocks: take the tree of 2.00 encoders (agreement with the experts, an estimate without labels: +0.4 %,"
        " with one encoder -4.0 %).",
        "There the curve bends most: the tree avoids 100 % of the loss for 50 % of the extra cost of 3 encoders.",
        "Where the tasks leave this tree: a before block 1, b never, c never.",
    ]


def test_one_encoder_that_is_enough() -> None:
    found = curve({1.0: -0.4, 1.5: -0.1, 3.0: 0.0})
    assert recommended_tree(found) is found["sharing"][0]
    assert verdict(found) == [
        "Shared blocks: one encoder for all 3 tasks is enough (Delta_MTL on 128 labelled images: -0.4 %)."
    ]


@pytest.mark.parametrize("second", [-4.4, -3.1])
def test_no_tree_that_is_worth_its_cost(second: float) -> None:
    """Even a tree that is a little above the line to the experts."""
    found = curve({1.0: -4.0, 1.5: second, 3.0: 0.0})
    assert recommended_tree(found) is None and not any("recommended" in heading for heading, _ in drawings(found))
    assert verdict(found) == [
        "Shared blocks: no tree is worth its cost; keep the 3 experts apart, or distil one encoder for all (Delta_MTL"
        f" on 128 labelled images: with one encoder -4.0 %, with the tree of 1.50 {second} %)."
    ]


def test_all_experts_are_no_tree_to_take() -> None:
    found = curve({1.0: -4.0, 3.0: 0.0})
    assert recommended_tree(found) is None
    assert verdict(found) == [
        "Shared blocks: no tree is worth its cost; keep the 3 experts apart, or distil one encoder for all (Delta_MTL"
        " on 128 labelled images: with one encoder -4.0 %)."
    ]


def test_a_budget_limits_the_recommendation() -> None:
    found = curve({1.0: -4.0, 1.5: -3.9, 2.0: -0.2, 3.0: 0.0})
    choice = {"groups": [["a", "b", "c"]], "gains": dict.fromkeys("abc", -4.0), "gain": -4.0, "measured": True}
    found["groups"] = {"merges": [], "choices": [{**choice, "budget": number} for number in (1, 2, 3)]}
    assert recommended_tree(found, 1.5) is None and recommended_tree(found, 2) == found["sharing"][2]
    assert not any(line.startswith("Shared blocks") for line in verdict_of(found, 1))
    assert any("take the tree of 2.00" in line for line in verdict_of(found, 2))
    found["sharing"][2]["gain"] = -3.0
    (line,) = (line for line in verdict_of(found, 2) if line.startswith("Shared blocks"))
    assert line.startswith("Shared blocks: no tree is worth its cost; distil one encoder for all (")


def verdict_of(found: dict[str, Any], budget: int) -> list[str]:
    pairs = [{"tasks": [a, b], "gains": {a: -1.0, b: -1.0}} for a, b in ("ab", "ac", "bc")]
    return verdict({**found, "groups": {**found["groups"], "merges": pairs}}, budget)


def test_without_labels_a_task_that_loses_almost_nothing_does_not_decide() -> None:
    """Of 5.5 % beyond the half that does not matter, the tree avoids 5.4 for two tasks; the third stays within it."""
    found = curve({1.0: -4.0, 1.5: -0.5, 3.0: 0.0}, "the experts' predictions")
    one, tree, _ = found["sharing"]
    one["gains"], tree["gains"] = {"a": -6.0, "b": -5.99, "c": -0.01}, {"a": -0.6, "b": -0.6, "c": -0.3}
    assert recommended_tree(found) is tree
    assert "the tree avoids 98 % of the loss for 25 % of the extra cost" in verdict(found)[1]


@pytest.mark.parametrize(
    ("third", "share"), [(0.5, 1.0), (-0.5, 1.0), (-0.75, 0.4 / 0.9), (-1.0, -1 / 9), (-40, -1 / 9)]
)
def test_a_task_that_loses_more_in_the_tree_counts_as_at_most_one_loss(third: float, share: float) -> None:
    one, tree = {"a": -5.0, "b": 0.2}, {"a": -0.5, "b": third}
    assert avoided_share(one, tree) == pytest.approx(share)
    assert avoided_share(one, {"a": 0.0, "b": 0.0}) == 1
