"""The run in a few sentences, computed from its numbers and never kinder than they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from simomerge.report.results import Results, family, finite, rows, signed, value

ROUNDING = 0.05
"""Differences of Delta_MTL, in points, that one decimal cannot show."""

SMALL_COST = 1.0
"""Points below which a share of the cost says more about noise than about re-alignment."""

RE_ALIGNED = {
    "heads": "re-aligning its heads",
    "adapters": "re-aligning it with adapters",
    "fold": "folding its heads",
    "fold-cross": "folding its heads cross tap",
    "distill": "distilling its heads from the experts",
    "fold+heads": "folding, then re-aligning its heads",
    "fold+adapters": "folding, then re-aligning it with adapters",
}


@dataclass(frozen=True)
class Standing:
    """Where one row stands: Delta_MTL in percent and its standard deviation (0 where unknown)."""

    method: str
    delta: float
    std: float
    labelled_images: int
    unlabelled_images: int = 0

    def gain_over(self, other: Standing) -> float:
        """Points of Delta_MTL above ``other``; 0 within rounding or the spread between seeds."""
        gain = self.delta - other.delta
        return gain if abs(gain) > max(self.std, other.std, ROUNDING) else 0.0


def headline(results: Results) -> str:
    """The sentences of :func:`sentences` in one line.

    Example:
        >>> headline({"rows": []})
        'This run measured no merged model.'
    """
    return " ".join(sentences(results))


def sentences(results: Results) -> list[str]:
    """What merging cost and what re-alignment recovered; then what the control says about both.

    The re-aligned row is the best one whose merge was measured too; rows that are missing leave their part
    of the story out.

    Example:
        >>> def row(method, delta):
        ...     return {"method": method, "delta_mtl": {"mean": delta}, "labelled_images": 256}
        >>> for part in sentences({"rows": [row("ties", -20.0), row("ties+heads", -5.0)]})[0].split("; "):
        ...     print(part)
        Merging by ties cost 20.0 points of Delta_MTL
        re-aligning its heads on 256 labelled images recovered 75 % of that (now -5.0 %).
    """
    standings = _standings(results)
    merges = {name: row for name, row in standings.items() if family(name) == "merge"}
    re_aligned = {name: row for name, row in standings.items() if family(name) == "re-aligned"}
    paired = [row for row in re_aligned.values() if _merge_name(row) in merges]
    if not merges:
        return [_without_merge(re_aligned.values())]
    after = _best(paired)
    before = merges[_merge_name(after)] if after else max(merges.values(), key=lambda row: row.delta)
    story = _cost(before) + (_recovery(before, after, len(paired)) if after else "; nothing was re-aligned") + "."
    told = [story, *_without_labels(re_aligned.values(), after)]
    control = _best(row for name, row in standings.items() if family(name) == "control")
    if control is None:
        return told
    # Adapters have more parameters than heads: a control is compared with a merge re-aligned as it was.
    counterpart = _best(row for row in paired if _kind(row) == _kind(control))
    return [*told, _control(control, before, counterpart or before)]


def _standings(results: Results) -> dict[str, Standing]:
    standings = {}
    for row in rows(results):
        delta = value(row, "delta_mtl")
        if delta.mean is not None and "method" in row:
            labelled, unlabelled = (int(finite(row.get(f"{kind}_images")) or 0) for kind in ("labelled", "unlabelled"))
            standings[row["method"]] = Standing(row["method"], delta.mean, delta.std or 0.0, labelled, unlabelled)
    return standings


def _merge_name(row: Standing) -> str:
    return row.method.split("+")[0]


def _kind(row: Standing) -> str:
    return row.method.partition("+")[2]


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
    kind = _kind(after)
    action = RE_ALIGNED.get(kind, f"re-aligning it ({kind})")
    images = _images(after)
    best_of = f", the best of {candidates} rows that re-align a merge" if candidates > 1 else ""
    return f"; {action}{images} {_outcome(before, after)} (now {signed(after.delta)} %{best_of})"


def _images(row: Standing) -> str:
    if row.labelled_images:
        return f" on {row.labelled_images:,} labelled images"
    return f" on {row.unlabelled_images:,} unlabelled images" if row.unlabelled_images else ""


def _without_labels(rows: Iterable[Standing], best: Standing | None) -> list[str]:
    """The best row that saw no label, where the story was about another one."""
    free = _best(row for row in rows if row.unlabelled_images and not row.labelled_images)
    if free is None or free == best:
        return []
    return [f"Without any label, {free.method} stands at {signed(free.delta)} %{_images(free)}."]


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
    # Rounded down: 99.6 % is not all of it.
    return f"recovered {min(int(100 * gain / -before.delta + 1e-9), 100)} % of that"


def _control(control: Standing, before: Standing, counterpart: Standing) -> str:
    """The control has the base encoder: where it is as good, the merge is not what helped."""
    gain = control.gain_over(counterpart)
    who = f"control {control.method} (base encoder, nothing merged) reaches {signed(control.delta)} %"
    if gain >= 0:
        margin = f"{gain:.1f} points better than" if gain else "level with"
        # A control that saw labels says nothing against a merge that saw none.
        verdict = ": merging added nothing here" if _kind(control) == _kind(counterpart) else ""
        return f"But the {who}, {margin} {counterpart.method}{verdict}."
    above = counterpart != before and control.gain_over(before) > 0
    middle = f", better than {before.method} alone but" if above else ","
    return f"The {who}{middle} {-gain:.1f} points below {counterpart.method}."
