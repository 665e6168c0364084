"""What the report reads from a run's results, in which anything may be missing, and the run in a few sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Any]
"""The content of a run's ``results.json``: title, machine, recipe, tasks, rows, scale_curves, realignments, notes."""

Row = Mapping[str, Any]
"""One entry of ``results["rows"]``: a method with its Delta_MTL, its metrics and its cost."""

MISSING = "–"
"""Shown in place of an unknown number."""

FAMILIES = {
    "reference": "trained on all labels, not merged",
    "merge": "the experts' encoders merged into one, with the experts' heads unchanged",
    "re-aligned": "a merge that was re-aligned",
    "control": "the base encoder in place of a merged one",
}
"""The families of rows and their meaning."""

FEW_TEST_IMAGES = 100
"""With fewer test images, the sentences end with a warning."""

ROUNDING = 0.05
"""Smaller differences of Delta_MTL, in points, do not show in one decimal."""

SMALL_COST = 1.0
"""If merging costs fewer points, a recovered share of the cost is mostly noise."""


@dataclass(frozen=True)
class Value:
    """A mean over seeds and the standard deviation between seeds; None if unknown."""

    mean: float | None = None
    std: float | None = None


def value(row: Row, *keys: str) -> Value:
    """The value under ``keys``; a missing key, null, NaN or infinity becomes None.

    Example:
        >>> value({"metrics": {"depth": {"mean": 0.4, "std": None}}}, "metrics", "depth")
        Value(mean=0.4, std=None)
        >>> value({}, "delta_mtl")
        Value(mean=None, std=None)
    """
    found: Any = row
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    found = found if isinstance(found, Mapping) else {}
    return Value(finite(found.get("mean")), finite(found.get("std")))


def finite(number: Any) -> float | None:
    """``number`` as a float, or None if it is not a finite number.

    Example:
        >>> finite(2), finite(None), finite(float("nan"))
        (2.0, None, None)
    """
    known = isinstance(number, (int, float)) and math.isfinite(number)
    return float(number) if known else None


def rows(results: Results) -> list[Row]:
    """All rows, in their order."""
    return list(results.get("rows") or [])


def task_names(results: Results) -> list[str]:
    """Names of the tasks, in their order."""
    return [task["name"] for task in results.get("tasks") or []]


def family(row: Row) -> str:
    """The family of a row, a key of `FAMILIES`; a row without a known family counts as a merge.

    Example:
        >>> family({"method": "joint-mtl", "family": "reference"}), family({"method": "ties"})
        ('reference', 'merge')
    """
    name = row.get("family")
    return name if name in FAMILIES else "merge"


def seeds(results: Results) -> int:
    """The number of seeds that the means are over: the largest number of any row."""
    return max((len((row.get("delta_mtl") or {}).get("per_seed") or []) for row in rows(results)), default=0)


def signed(number: float, decimals: int = 1) -> str:
    """A number with its sign; zero has none.

    Example:
        >>> signed(1.24), signed(-27.5), signed(-0.01)
        ('+1.2', '-27.5', '0.0')
    """
    text = f"{number:+.{decimals}f}"
    return text[1:] if float(text) == 0 else text


@dataclass(frozen=True)
class Standing:
    """A row as the headline uses it.

    Attributes:
        method: the row's name.
        family: a key of `FAMILIES`.
        merge: name of the merge method.
        steps: names of the re-alignment's steps, in order.
        action: the steps in words, such as "folding its heads".
        delta: Delta_MTL in percent.
        std: standard deviation of ``delta`` between seeds, 0 if unknown.
        labelled_images, unlabelled_images: images that merging and re-alignment used.
    """

    method: str
    family: str
    merge: str
    steps: tuple[str, ...]
    action: str
    delta: float
    std: float
    labelled_images: int
    unlabelled_images: int

    def gain_over(self, other: Standing) -> float:
        """Points of Delta_MTL above ``other``; 0 within rounding or within the spread between seeds."""
        gain = self.delta - other.delta
        return gain if abs(gain) > max(self.std, other.std, ROUNDING) else 0.0

    @property
    def images(self) -> str:
        """The images that were used, in words; empty if none."""
        if self.labelled_images:
            return f" on {self.labelled_images:,} labelled images"
        return f" on {self.unlabelled_images:,} unlabelled images" if self.unlabelled_images else ""


def sentences(results: Results) -> list[str]:
    """What merging cost, what re-alignment recovered, and how the control compares. Never kinder than the numbers.

    The re-aligned row is the best one whose merge was measured too. Missing rows shorten the story.

    Example:
        >>> merge = {"family": "merge", "method": "ties", "merge": "ties", "delta_mtl": {"mean": -20.0}}
        >>> heads = {"name": "heads", "phrase": "re-aligning its heads", "labels": True}
        >>> after = {**merge, "family": "re-aligned", "method": "ties+heads", "realignment": [heads],
        ...          "delta_mtl": {"mean": -5.0}, "labelled_images": 256}
        >>> for clause in sentences({"rows": [merge, after]})[0].split("; "):
        ...     print(clause)
        Merging by ties cost 20.0 points of Delta_MTL
        re-aligning its heads on 256 labelled images recovered 75 % of that (now -5.0 %).
    """
    standings = [
        _standing(row) for row in rows(results) if "method" in row and value(row, "delta_mtl").mean is not None
    ]
    merges = {row.merge: row for row in standings if row.family == "merge"}
    re_aligned = [row for row in standings if row.family == "re-aligned"]
    paired = [row for row in re_aligned if row.merge in merges]
    if not merges:
        return [_without_merge(re_aligned)]
    after = _best(paired)
    before = merges[after.merge] if after else max(merges.values(), key=lambda row: row.delta)
    recovery = _recovery(before, after, len(paired)) if after else "; nothing was re-aligned"
    story = [f"{_cost(before)}{recovery}.", *_without_labels(re_aligned, after)]
    control = _best(row for row in standings if row.family == "control")
    if control is not None:
        # Adapters have more parameters than heads, so the control is compared with a merge after the same steps.
        counterpart = _best(row for row in paired if row.steps == control.steps)
        story.append(_control(control, before, counterpart or before))
    return [*story, *_few_images(results)]


def _few_images(results: Results) -> list[str]:
    """A warning if the figures come from few test images."""
    count = finite(results.get("test_images"))
    if count is None or count >= FEW_TEST_IMAGES:
        return []
    return [f"These figures come from {count:.0f} test images only, so small differences may be chance."]


def _standing(row: Row) -> Standing:
    steps = row.get("realignment") or []
    delta = value(row, "delta_mtl")
    phrases = [step.get("phrase") or f"re-aligning it ({step['name']})" for step in steps]
    labelled, unlabelled = (int(finite(row.get(f"{kind}_images")) or 0) for kind in ("labelled", "unlabelled"))
    return Standing(
        method=row["method"],
        family=family(row),
        merge=row.get("merge") or row["method"],
        steps=tuple(step["name"] for step in steps),
        action=", then ".join(phrases) or "re-aligning it",
        delta=delta.mean or 0.0,
        std=delta.std or 0.0,
        labelled_images=labelled,
        unlabelled_images=unlabelled,
    )


def _best(candidates: Iterable[Standing]) -> Standing | None:
    return max(candidates, key=lambda row: row.delta, default=None)


def _without_merge(re_aligned: Iterable[Standing]) -> str:
    best = _best(re_aligned)
    if best is None:
        return "This run measured no merged model."
    return f"{best.method} stands at Delta_MTL {signed(best.delta)} %; its merge alone was not measured."


def _cost(before: Standing) -> str:
    if before.delta <= -ROUNDING:
        return f"Merging by {before.method} cost {-before.delta:.1f} points of Delta_MTL"
    return f"Merging by {before.method} cost nothing (Delta_MTL {signed(before.delta)} %)"


def _recovery(before: Standing, after: Standing, candidates: int) -> str:
    best_of = f", the best of {candidates} rows that re-align a merge" if candidates > 1 else ""
    return f"; {after.action}{after.images} {_outcome(before, after)} (now {signed(after.delta)} %{best_of})"


def _outcome(before: Standing, after: Standing) -> str:
    gain = after.gain_over(before)
    if gain == 0:
        return "changed nothing measurable"
    if gain < 0:
        return f"made it {-gain:.1f} points worse"
    if -before.delta < SMALL_COST:
        return f"gained {gain:.1f} points"
    if after.delta >= ROUNDING:
        return f"recovered all of that and ended {after.delta:.1f} points above the experts"
    # Rounded down: 99.6 % is not everything.
    return f"recovered {min(int(100 * gain / -before.delta + 1e-9), 100)} % of that"


def _without_labels(re_aligned: Iterable[Standing], best: Standing | None) -> list[str]:
    """The best row that used no label, if the story was about another row."""
    free = _best(row for row in re_aligned if row.unlabelled_images and not row.labelled_images)
    if free is None or free == best:
        return []
    return [f"Without any label, {free.method} stands at {signed(free.delta)} %{free.images}."]


def _control(control: Standing, before: Standing, counterpart: Standing) -> str:
    """The control has the base encoder: if it is as good as the merge, merging is not what helped."""
    gain = control.gain_over(counterpart)
    subject = f"control {control.method} (base encoder, nothing merged) reaches {signed(control.delta)} %"
    if gain >= 0:
        margin = f"{gain:.1f} points better than" if gain else "level with"
        # A control that used labels proves nothing against a merge that used none.
        conclusion = ": merging added nothing here" if control.steps == counterpart.steps else ""
        return f"But the {subject}, {margin} {counterpart.method}{conclusion}."
    above = counterpart != before and control.gain_over(before) > 0
    middle = f", better than {before.method} alone but" if above else ","
    return f"The {subject}{middle} {-gain:.1f} points below {counterpart.method}."
