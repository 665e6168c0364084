"""The curve of gain against cost of shared blocks: the tree to take, and where tasks leave it. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from simomerge.merging.tree import Tree
from simomerge.relations.units import ENOUGH, avoided_share
from simomerge.report.facts import signed

Found = Mapping[str, Any]
"""What `simomerge.relations.Relations.to_dict` returns, with the section ``sharing``."""

WORTH = 0.1
"""A tree is recommended if the share of the loss that it avoids exceeds its share of the extra cost by this much."""

TOLERANCE = 1e-6
"""Costs are sums of the blocks' shares, and no more exact than this."""


def measure(found: Found) -> str:
    """What the gains of the curve are measured in.

    Example:
        >>> measure({"judged_by": "labels", "judged_images": 128})
        'Delta_MTL on 128 labelled images'
    """
    if found["judged_by"] == "labels":
        return f"Delta_MTL on {found['judged_images']} labelled images"
    return "agreement with the experts, an estimate without labels"


def recommended_tree(found: Found, budget: float | None = None) -> Mapping[str, Any] | None:
    """The entry of ``sharing`` to take, never one that costs as much as all experts.

    It is one encoder if that is enough, otherwise the tree at which the curve bends most: the one that is highest
    above the straight line from one encoder to one per task.

    Args:
        found: The result of `Relations.to_dict`.
        budget: The largest cost that is allowed.

    Returns:
        None if no tree is worth its cost.

    Example:
        >>> curve = [{"cost": cost, "gain": gain} for cost, gain in ((1, -4.0), (1.5, -0.8), (2, 0.0))]
        >>> recommended_tree({"tasks": ["a", "b"], "sharing": curve})
        {'cost': 1.5, 'gain': -0.8}
    """
    one: Mapping[str, Any] = found["sharing"][0]
    if one["gain"] >= -ENOUGH:
        return one
    best = _sharpest(found, budget)
    return best if best is not None and _avoided(found, best) - _extra(found, best) >= WORTH else None


def sharing_sentences(found: Found, budget: float | None = None) -> Iterator[str]:
    """The recommendation, and where the tasks leave the recommended tree."""
    if budget == 1:
        return  # there is no choice
    tasks, one, best = len(found["tasks"]), found["sharing"][0], recommended_tree(found, budget)
    loss = f"{signed(one['gain'])} %"
    if best is one:
        yield f"Shared blocks: one encoder for all {tasks} tasks is enough ({measure(found)}: {loss})."
    elif best is not None:
        avoided, extra = 100 * min(_avoided(found, best), 1.0), 100 * _extra(found, best)
        yield (
            f"Shared blocks: take the tree of {best['cost']:.2f} encoders ({measure(found)}: {signed(best['gain'])} %,"
            f" with one encoder {loss})."
        )
        where = (
            "There the curve bends most" if best is recommended_tree(found) else "This is the best within the budget"
        )
        yield (
            f"{where}: the tree avoids {avoided:.0f} % of the loss for {extra:.0f} % of the extra cost of {tasks}"
            " encoders."
        )
        places = (f"{task} {_leaving(found, count)}" for task, count in best["shared"].items())
        yield f"Where the tasks leave this tree: {', '.join(places)}."
    else:
        nearest = _sharpest(found, budget)
        other = "" if nearest is None else f", with the tree of {nearest['cost']:.2f} {signed(nearest['gain'])} %"
        apart = f"keep the {tasks} experts apart, or " if budget is None or budget >= tasks else ""
        yield (
            f"Shared blocks: no tree is worth its cost; {apart}distil one encoder for all"
            f" ({measure(found)}: with one encoder {loss}{other})."
        )


def sharing_tables(found: Found) -> Iterator[tuple[str, list[list[str]]]]:
    """The tree for each cost, and the block after which each task leaves it, with headings."""
    curve, tasks = found["sharing"], list(found["tasks"])
    costs = [f"{each['cost']:.2f}" for each in curve]
    rows = [[cost, signed(each["gain"]), each["tree"]] for cost, each in zip(costs, curve, strict=True)]
    yield f"Shared blocks ({measure(found)})", [["encoders", "gain %", "tree"], *rows]
    leaves = [
        [cost, *("never" if each["shared"][task] == _blocks(found) else str(each["shared"][task]) for task in tasks)]
        for cost, each in zip(costs, curve, strict=True)
    ]
    yield "The last block that each task shares; after it, the task leaves", [["encoders", *tasks], *leaves]


def drawings(found: Found) -> Iterator[tuple[str, str]]:
    """A heading and a drawing in text of the tree for each cost."""
    best = recommended_tree(found, found.get("budget"))
    for each in found["sharing"]:
        mark = ", recommended" if each is best else ""
        tree = Tree.of(each["tree"], found["tasks"], _blocks(found))
        yield f"{each['cost']:.2f} encoders: {signed(each['gain'])} %{mark}", tree.drawing()


def _sharpest(found: Found, budget: float | None) -> Mapping[str, Any] | None:
    """The tree at which the curve bends most; None if no tree costs more than one encoder and less than all."""
    all_experts = len(found["tasks"])
    between = [each for each in found["sharing"][1:] if each["cost"] < all_experts - TOLERANCE]
    between = [each for each in between if each["cost"] <= (budget or all_experts) + TOLERANCE]
    return max(between, key=lambda each: _avoided(found, each) - _extra(found, each), default=None)


def _avoided(found: Found, each: Mapping[str, Any]) -> float:
    """The share of the loss of one encoder that a tree avoids; all experts avoid all of it.

    Agreements of different tasks cannot be compared. Without labels each task's loss is relative to its own.
    """
    one = found["sharing"][0]
    if found.get("judged_by") != "labels" and "gains" in one:
        return avoided_share(one["gains"], each["gains"])
    return float(1 - each["gain"] / one["gain"])


def _extra(found: Found, each: Mapping[str, Any]) -> float:
    """The share of the extra cost of one encoder per task that a tree takes."""
    return (each["cost"] - 1) / (len(found["tasks"]) - 1)


def _leaving(found: Found, shared: int) -> str:
    if shared == _blocks(found):
        return "never"
    return f"after block {shared}" if shared else "before block 1"


def _blocks(found: Found) -> int:
    """The number of blocks: the first tree is one encoder, of which every task shares all."""
    return max(found["sharing"][0]["shared"].values())
