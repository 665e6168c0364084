"""The meaning of the numbers of `relate`, in sentences."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, TypeVar

from simomerge.core.errors import InputError
from simomerge.relations.curve import sharing_sentences
from simomerge.relations.units import unit_of
from simomerge.report.facts import signed

Found = Mapping[str, Any]
"""What `Relations.to_dict` returns."""

VISIBLE = 0.005
"""Smaller effects and differences of widths are zero in the two decimals that are shown."""

_K = TypeVar("_K", bound=Hashable)


def verdict(found: Found, budget: int | None = None) -> list[str]:
    """Sentences on what to merge, which tasks help or hurt which, and which are sensitive; only on measured sections.

    Args:
        found: the result of `Relations.to_dict`.
        budget: maximum number of encoders; by default all budgets are described.

    Raises:
        InputError: a budget out of range, or a budget without measured groups.
    """
    tasks = found["tasks"]
    if budget is not None and not 1 <= budget <= len(tasks):
        raise InputError(f"budget {budget}: give 1 to {len(tasks)} encoders, for {len(tasks)} tasks.")
    if budget is not None and "groups" not in found:
        raise InputError("a budget requires the section 'groups': request that section too.")
    lines: list[str] = []
    if "groups" in found:
        lines += [*(_overview(found) if budget is None else []), *_choices(found, budget), *_pairs(found)]
    if "sharing" in found:
        lines += sharing_sentences(found, budget)
    if "sweeps" in found:
        lines += [*_effects(found["sweeps"]), *_widths(found["sweeps"])]
    if "geometry" in found:
        lines += _geometry(found)
    if "cka" in found:
        lines += _cka(found)
    return lines


def _unit(found: Found) -> str:
    return "Delta_MTL" if found["judged_by"] == "labels" else "agreement with the experts"


def _overview(found: Found) -> Iterator[str]:
    """One encoder compared with two, the most common question."""
    choices, tasks = found["groups"]["choices"], found["tasks"]
    if len(tasks) < 3:
        return
    measure = _unit(found) if found["judged_by"] == "labels" else f"the {_unit(found)}"
    one, two = choices[0], choices[1]
    more = f" Two ({_named(two['groups'])}): by {signed(two['gain'])} %." if len(two["groups"]) == 2 else ""
    yield f"One encoder for all {len(tasks)} tasks would change {measure} by {signed(one['gain'])} %.{more}"


def _choices(found: Found, budget: int | None) -> Iterator[str]:
    for choice in found["groups"]["choices"]:
        if budget is not None and choice["budget"] != budget:
            continue
        used = len(choice["groups"])
        head = f"{choice['budget']} encoder{'s' if choice['budget'] > 1 else ''}"
        if used < choice["budget"] and budget is None:
            yield f"{head}: no better than {used}."
            continue
        groups = "every expert by itself" if used == len(found["tasks"]) else _named(choice["groups"])
        predicted = "" if choice["measured"] else ", predicted from pairs"
        worst, _ = _extremes(choice["gains"])
        loss = signed(choice["gains"][worst])
        # Without labels the agreements of different tasks cannot be compared.
        loses = f"; {worst} loses most, {loss} %" if found["judged_by"] == "labels" and float(loss) < 0 else ""
        more = f"; more than {used} bring{'s' if used == 1 else ''} nothing" if used < choice["budget"] else ""
        yield f"{head}: {groups} ({_unit(found)} {signed(choice['gain'])} %{predicted}{loses}){more}."


def _named(groups: Sequence[Sequence[str]]) -> str:
    """Groups in words: the merged ones, then the tasks that stay alone."""
    merged = [" + ".join(group) for group in groups if len(group) > 1]
    alone = [group[0] for group in groups if len(group) == 1]
    return "; ".join([*merged, *([f"alone: {', '.join(alone)}"] if alone else [])])


def _pairs(found: Found) -> Iterator[str]:
    """The best and the worst pairs, and the task that costs the others most.

    Without labels a task's losses can only be compared with its own: they are in units of its mean loss over the pairs
    (see `simomerge.relations.units`).
    """
    tasks, labelled = found["tasks"], found["judged_by"] == "labels"
    if len(tasks) < 3:
        return
    gains = pair_gains(found)
    units = {task: 1.0 if labelled else unit_of(gains[task].values()) for task in tasks}
    relative = {task: {other: gain / units[task] for other, gain in gains[task].items()} for task in tasks}
    both = {(a, b): (relative[a][b] + relative[b][a]) / 2 for a, b in combinations(tasks, 2)}
    caused = {task: _mean(relative[other][task] for other in tasks if other != task) for task in tasks}
    worst, best = _extremes(both)
    if both[best] - both[worst] < (0.05 if labelled else VISIBLE):
        return  # in the decimals that are shown, all pairs are equal

    def shown(value: float) -> str:
        return f"{signed(value)} %" if labelled else f"{-value:.2f}"

    unit = "on average" if labelled else "of what these tasks lose in their mean pair"
    yield (
        f"Merged in pairs, {best[0]} and {best[1]} do best ({shown(both[best])} {unit}), {worst[0]} and {worst[1]}"
        f" worst ({shown(both[worst])})."
    )
    hurter, _ = _extremes(caused)
    verb = "lose most" if caused[hurter] < 0 else "gain least"
    line = f"Merged with {hurter}, the other tasks {verb} ({shown(caused[hurter])})"
    if labelled:
        own = {task: _mean(relative[task].values()) for task in tasks}
        loser, _ = _extremes(own)
        line += f"; {loser} {'loses most' if own[loser] < 0 else 'gains least'} in its pairs ({shown(own[loser])})"
    yield f"{line}."


def pair_gains(found: Found) -> dict[str, dict[str, float]]:
    """``gains[task][other]``: the gain of a task that is merged with one other task, in percent."""
    gains: dict[str, dict[str, float]] = {task: {} for task in found["tasks"]}
    for merge in found["groups"]["merges"]:
        if len(merge["tasks"]) == 2:
            a, b = merge["tasks"]
            gains[a][b], gains[b][a] = merge["gains"][a], merge["gains"][b]
    return gains


def _effects(sweeps: Found) -> Iterator[str]:
    effects = {(a, b): value for a, row in sweeps["effects"].items() for b, value in row.items() if value is not None}
    if not effects:
        return
    worst, best = _extremes(effects)
    if effects[best] >= VISIBLE:
        yield (
            f"Along its task vector {best[0]} helps {best[1]} most ({signed(effects[best], 2)} of the expert's"
            " performance, the mean for lambda up to 1)."
        )
    else:
        yield "Along no task vector does another task perform better than at the base, in the mean for lambda up to 1."
    if effects[worst] <= -VISIBLE:
        yield f"Along its task vector {worst[0]} hurts {worst[1]} most ({signed(effects[worst], 2)})."


def _widths(sweeps: Found) -> Iterator[str]:
    widths = {task: width for task, width in sweeps["widths"].items() if width is not None}
    if len(widths) < 2:
        return
    narrow, wide = _extremes(widths)
    if widths[wide] - widths[narrow] < VISIBLE:
        yield f"All keep {sweeps['kept']:.0%} of their performance over a width of {widths[wide]:.2f} in lambda."
        return
    yield (
        f"Most sensitive to changes of the encoder: {narrow}, which keeps {sweeps['kept']:.0%} of its performance over"
        f" a width of {widths[narrow]:.2f} in lambda; least: {wide}, {widths[wide]:.2f}."
    )


def _geometry(found: Found) -> Iterator[str]:
    encoder, tasks = found["geometry"][0], found["tasks"]
    cosines = {(i, j): encoder["cosine"][i][j] for i, j in combinations(range(len(tasks)), 2)}
    cosines = {pair: value for pair, value in cosines.items() if value is not None}
    if not cosines:
        return
    _, (i, j) = _extremes(cosines)
    conflict = encoder["weighted_conflict"][i][j]
    apart = "no weight in common" if conflict is None else f"{conflict:.0%} of the weight pulls apart"
    yield f"The task vectors of {tasks[i]} and {tasks[j]} are closest (cosine {cosines[i, j]:.2f}, {apart})."


def _cka(found: Found) -> Iterator[str]:
    similarity = found["cka"]
    pairs = list(combinations(range(1, len(similarity["names"])), 2))  # without the base
    first, last = (
        _mean(table[i][j] for i, j in pairs if table[i][j] is not None)
        for table in (similarity["cka"][0], similarity["cka"][-1])
    )
    taps = similarity["taps"]
    yield f"The experts' features have a CKA of {first:.2f} at block {taps[0]} and {last:.2f} at block {taps[-1]}."


def _extremes(values: Mapping[_K, float]) -> tuple[_K, _K]:
    """The keys of the smallest and of the largest value."""
    return min(values, key=values.__getitem__), max(values, key=values.__getitem__)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else float("nan")
