"""The model that a run recommends, in words for someone who has not read the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simomerge.report.facts import MISSING, ROUNDING, Results, Row, family, finite, rows, seeds, signed, value

NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Recommendation:
    """What the page says first.

    Attributes:
        folder: Where the model lies.
        sentences: The first one is the headline.
        table: Per task: its name, its metric, this model's value, its expert's, and the change for the better.
        heads: The heads of the table's columns.
        size: Height and width of the run's images in pixels.
    """

    folder: str
    sentences: tuple[str, ...]
    table: tuple[tuple[str, ...], ...]
    heads: tuple[str, ...]
    size: str


def recommendation(results: Results, folder: str) -> Recommendation | None:
    """The recommendation of a run; None if it has none.

    Args:
        results: The content of a run's ``results.json``.
        folder: The run folder, as the reader may type it.

    Example:
        >>> row = {"method": "ties+fold", "family": "re-aligned", "delta_mtl": {"mean": -1.5}}
        >>> model = {"folder": "model", "row": "ties+fold", "bytes": 8e6, "experts_bytes": 24e6, "candidates": {}}
        >>> how = {"metric": "error", "higher_is_better": False}
        >>> tasks = [{"name": name, **how} for name in ("depth", "normals")]
        >>> recommendation({"tasks": tasks, "rows": [row], "model": model}, "runs/demo").sentences[0]
        'Ship runs/demo/model: one model for depth and normals, on average 1.5 % worse than the two separate experts.'
    """
    model = results.get("model")
    if not model:
        return None
    table, count = {row.get("method"): row for row in rows(results)}, seeds(results)
    row = table.get(model["row"], {})
    place = f"{folder.rstrip('/')}/{model['folder']}" if folder not in ("", ".") else model["folder"]
    tasks = [task["name"] for task in results.get("tasks") or []]
    story = [
        f"Ship {place}: one model for {_joined(tasks)}, {_standing(row, len(tasks))}{_mean(count)}.",
        *_seed(model, count),
        *_cost(model, len(tasks)),
        _choice(model, row),
        *_better(row, rows(results)),
    ]
    size = "x".join(map(str, model.get("image") or ()))
    heads = ("task", *(f"{head}{_mean(count)}" for head in ("this model", "its expert", "change")))
    return Recommendation(place, tuple(story), tuple(_table(results, row, table.get("experts", {}))), heads, size)


def _mean(seeds: int) -> str:
    """What is added to a figure that is a mean over seeds."""
    return f" (mean over {seeds} seeds)" if seeds > 1 else ""


def _seed(model: Mapping[str, Any], seeds: int) -> list[str]:
    """Which of several models of the row lies in the folder: the first seed's if there was nothing to choose from."""
    if seeds < 2:
        return []
    which = "the best seed on the validation images" if model.get("candidates") else "the first seed"
    return [f"The folder holds the model of one seed, {model['seed']}: {which}. Its own figures are in its README.md."]


def _joined(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _count(number: int) -> str:
    return NUMBER_WORDS[number] if number < len(NUMBER_WORDS) else str(number)


def _standing(row: Row, tasks: int) -> str:
    delta = value(row, "delta_mtl").mean
    separate = f"the {_count(tasks)} separate experts" if tasks > 1 else "its expert"
    if delta is None:
        return f"not compared with {separate}"
    if abs(delta) < ROUNDING:
        return f"on average as good as {separate}"
    return f"on average {abs(delta):.1f} % {'better' if delta > 0 else 'worse'} than {separate}"


def _cost(model: Mapping[str, Any], tasks: int) -> list[str]:
    """Its size and its time, each next to those of the experts."""
    size, experts = finite(model.get("bytes")), finite(model.get("experts_bytes"))
    found = []
    if size and experts:
        found.append(f"takes {_megabytes(size)} on the disk instead of {_megabytes(experts)}")
    own, theirs = finite(model.get("milliseconds")), finite(model.get("experts_milliseconds"))
    if own and theirs:
        height, width = model["image"]
        found.append(
            f"needs {_time(own)} instead of {_time(theirs)} for one image of {height} x {width} pixels"
            f" ({model['device']}, the machine of this run)"
        )
    compared = "the experts one after the other" if tasks > 1 else "its expert"
    return [f"Compared with {compared}, it {' and '.join(found)}."] if found else []


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e8 else f"{size / 1e6:,.0f} MB"


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.1f} ms" if milliseconds < 20 else f"{milliseconds:,.0f} ms"


def _choice(model: Mapping[str, Any], row: Row) -> str:
    steps = row.get("realignment") or []
    labels = any(step.get("labels") for step in steps)
    kind = f"merges that were repaired with{'' if labels else 'out'} labels" if steps else "merges"
    kind = "merges that were repaired without labels" if row.get("merge") == "auto" and not labels else kind
    others = len(model.get("candidates") or {})
    if not others:
        return f"In the table it is the row {model['row']}. There was no other candidate."
    return (
        f"In the table it is the row {model['row']}, the best of {others} {kind} on {model['validation_images']}"
        " validation images. The test images had no part in this choice."
    )


def _better(row: Row, table: Sequence[Row]) -> list[str]:
    """Models with one encoder that ended above it on the test images, although they are no merges of the experts."""
    own = value(row, "delta_mtl").mean
    if own is None:
        return []
    found = []
    for other in table:
        delta = value(other, "delta_mtl").mean
        is_other = family(other) in ("reference", "control") and (finite(other.get("encoders")) or 1) == 1
        if is_other and delta is not None and delta > own + ROUNDING:
            found.append((delta, other))
    if not found:
        return []
    delta, best = max(found, key=lambda pair: pair[0])
    what = "the base encoder without any merge" if family(best) == "control" else "trained on all labels at once"
    return [f"But {best['method']} ({what}) is better on the test images: {signed(delta)} % against {signed(own)} %."]


def _table(results: Results, row: Row, experts: Row) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for task in results.get("tasks") or []:
        own, theirs = (value(each, "metrics", task["name"]).mean for each in (row, experts))
        unit = f" in {task['unit']}" if task.get("unit") else ""
        better = "higher" if task["higher_is_better"] else "lower"
        change = MISSING
        if own is not None and theirs:
            change = f"{signed(100 * (own / theirs - 1) * (1 if task['higher_is_better'] else -1))} %"
        numbers = (MISSING if each is None else f"{each:.4g}" for each in (own, theirs))
        lines.append((task["name"], f"{task['metric']}{unit}, {better} is better", *numbers, change))
    return lines
