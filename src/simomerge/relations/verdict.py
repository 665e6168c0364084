"""What the numbers of `relate` mean, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from simomerge.core.errors import InputError

Found = Mapping[str, Any]
"""What `Relations.to_dict` gives."""


def verdict(found: Found, budget: int | None = None) -> list[str]:
    """Sentences on what to merge, who helps and hurts whom, and who is sensitive; only on what was measured.

    Args:
        found: of `Relations.to_dict`.
        budget: encoders at most; every budget by default.

    Raises:
        InputError: a budget that is none, or no groups were measured for one.
    """
    if budget is not None:
        check_budget(budget, found)
    lines: list[str] = []
    if "groups" in found:
        lines += [*(_overview(found) if budget is None else []), *_choices(found, budget)]
        lines += _pairs(found)
    if "sweeps" in found:
        lines += _effects(found["sweeps"])
        lines += _widths(found["sweeps"])
    if "geometry" in found:
        lines += _geometry(found)
    if "cka" in found:
        lines += _cka(found)
    return lines


def check_budget(budget: int, found: Found) -> None:
    """Raises InputError where it is not one of 1 to the number of tasks, or where no groups were measured."""
    tasks = found["tasks"]
    if not 1 <= budget <= len(tasks):
        raise InputError(f"budget {budget}: give 1 to {len(tasks)} encoders, for {len(tasks)} tasks.")
    if "groups" not in found:
        raise InputError("a budget is of the section 'groups': ask for that section too.")


def _overview(found: Found) -> Iterator[str]:
    """One encoder against two, which is what most ask first."""
    choices, tasks = found["groups"]["choices"], found["tasks"]
    if len(tasks) < 3:
        return
    what = "change Delta_MTL by" if found["judged_by"] == "labels" else "change the agreement with the experts by"
    one, two = choices[0], choices[1]
    more = f" Two ({_named(two['groups'])}): by {_signed(two['gain'])} %." if len(two["groups"]) == 2 else ""
    yield f"One encoder for all {len(tasks)} tasks would {what} {_signed(one['gain'])} %.{more}"


def _choices(found: Found, budget: int | None) -> Iterator[str]:
    unit = "Delta_MTL" if found["judged_by"] == "labels" else "agreement with the experts"
    for choice in found["groups"]["choices"]:
        if budget is not None and choice["budget"] != budget:
            continue
        used = len(choice["groups"])
        head = f"{choice['budget']} encoder{'s' if choice['budget'] > 1 else ''}"
        if used < choice["budget"] and budget is None:
            yield f"{head}: no better than {used}."
            continue
        said = "every expert by itself" if used == len(found["tasks"]) else _named(choice["groups"])
        predicted = "" if choice["measured"] else ", predicted from pairs"
        worst = min(choice["gains"], key=lambda task: choice["gains"][task])
        told = found["judged_by"] == "labels" and choice["gains"][worst] < 0  # agreements of two tasks do not compare
        loss = _signed(choice["gains"][worst])
        loses = f"; {worst} loses most, {loss} %" if told and float(loss) else ""
        more = f"; more than {used} bring{'s' if used == 1 else ''} nothing" if used < choice["budget"] else ""
        yield f"{head}: {said} ({unit} {_signed(choice['gain'])} %{predicted}{loses}){more}."


def _named(groups: Any) -> str:
    """Groups in words: the merged ones, then the tasks that stay alone."""
    merged = [" + ".join(group) for group in groups if len(group) > 1]
    alone = [group[0] for group in groups if len(group) == 1]
    return "; ".join([*merged, *([f"alone: {', '.join(alone)}"] if alone else [])])


def _pairs(found: Found) -> Iterator[str]:
    """Which tasks get on best and worst when two are merged, and beside whom the others lose most.

    Without labels a task's losses compare with its own only: they are taken in its mean over the pairs.
    """
    tasks, labelled = found["tasks"], found["judged_by"] == "labels"
    if len(tasks) < 3:
        return
    gains = pair_gains(found)
    units = {task: 1.0 if labelled else _mean(map(abs, gains[task].values())) or 1.0 for task in tasks}
    beside = {task: {other: gain / units[task] for other, gain in gains[task].items()} for task in tasks}
    both = {(a, b): (beside[a][b] + beside[b][a]) / 2 for a, b in combinations(tasks, 2)}
    given = {task: _mean(beside[other][task] for other in tasks if other != task) for task in tasks}
    best, worst = max(both, key=both.__getitem__), min(both, key=both.__getitem__)
    if both[best] - both[worst] < (0.05 if labelled else SEEN):
        return  # as far as the digits show, all pairs are alike
    hurter = min(given, key=given.__getitem__)

    def said(value: float) -> str:
        return f"{_signed(value)} %" if labelled else f"{-value:.2f}"

    unit = "on average" if labelled else "of what these tasks lose in their mean pair"
    yield (
        f"Merged in pairs, {best[0]} and {best[1]} get on best ({said(both[best])} {unit}), {worst[0]} and {worst[1]}"
        f" worst ({said(both[worst])})."
    )
    hurt = f"Beside {hurter} the others {'lose most' if given[hurter] < 0 else 'gain least'} ({said(given[hurter])})"
    if not labelled:
        yield f"{hurt}."
        return
    own = {task: _mean(beside[task].values()) for task in tasks}
    loser = min(own, key=own.__getitem__)
    yield f"{hurt}; {loser} {'loses most' if own[loser] < 0 else 'gains least'} beside another ({said(own[loser])})."


def pair_gains(found: Found) -> dict[str, dict[str, float]]:
    """By task and other task what the first gains when the two are merged, in percent."""
    gains: dict[str, dict[str, float]] = {task: {} for task in found["tasks"]}
    for merge in found["groups"]["merges"]:
        if len(merge["tasks"]) == 2:
            a, b = merge["tasks"]
            gains[a][b], gains[b][a] = merge["gains"][a], merge["gains"][b]
    return gains


SEEN = 0.005
"""The least effect, or difference of widths, that is not zero in the two digits that are shown."""


def _effects(sweeps: Found) -> Iterator[str]:
    effects = {(a, b): value for a, row in sweeps["effects"].items() for b, value in row.items() if value is not None}
    if not effects:
        return
    best, worst = max(effects, key=effects.__getitem__), min(effects, key=effects.__getitem__)
    if effects[best] >= SEEN:
        yield (
            f"Along its task vector {best[0]} helps {best[1]} most ({_signed(effects[best], 2)} of the expert's"
            " performance, the mean for lambda up to 1)."
        )
    else:
        yield "Along no task vector another task does better, in the mean for lambda up to 1, than at the base."
    if effects[worst] <= -SEEN:
        yield f"Along its task vector {worst[0]} hurts {worst[1]} most ({_signed(effects[worst], 2)})."


def _widths(sweeps: Found) -> Iterator[str]:
    widths = {task: width for task, width in sweeps["widths"].items() if width is not None}
    if len(widths) < 2:
        return
    narrow, wide = min(widths, key=widths.__getitem__), max(widths, key=widths.__getitem__)
    if widths[wide] - widths[narrow] < SEEN:
        yield f"All keep {sweeps['kept']:.0%} of their performance over a width of {widths[wide]:.2f} in lambda."
        return
    yield (
        f"Most sensitive to a disturbed encoder: {narrow}, which keeps {sweeps['kept']:.0%} of its performance over a"
        f" width of {widths[narrow]:.2f} in lambda; least: {wide}, {widths[wide]:.2f}."
    )


def _geometry(found: Found) -> Iterator[str]:
    whole, tasks = found["geometry"][0], found["tasks"]
    cosines = {(i, j): whole["cosine"][i][j] for i, j in combinations(range(len(tasks)), 2)}
    cosines = {pair: value for pair, value in cosines.items() if value is not None}
    if not cosines:
        return
    best = max(cosines, key=cosines.__getitem__)
    value = cosines[best]
    conflict = whole["weighted_conflict"][best[0]][best[1]]
    apart = "no weight in common" if conflict is None else f"{conflict:.0%} of the weight pulls apart"
    yield f"The task vectors of {tasks[best[0]]} and {tasks[best[1]]} are closest (cosine {value:.2f}, {apart})."


def _cka(found: Found) -> Iterator[str]:
    similarity = found["cka"]
    first, last = similarity["cka"][0], similarity["cka"][-1]
    tasks = range(1, len(similarity["names"]))
    means = [
        _mean(table[i][j] for i, j in combinations(tasks, 2) if table[i][j] is not None) for table in (first, last)
    ]
    yield (
        f"The experts' features have a CKA of {means[0]:.2f} at block {similarity['taps'][0]} and {means[1]:.2f} at"
        f" block {similarity['taps'][-1]}."
    )


def _mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else float("nan")


def _signed(number: float, decimals: int = 1) -> str:
    """With its sign, but for zero."""
    text = f"{number:+.{decimals}f}"
    return text if float(text) else text[1:]
