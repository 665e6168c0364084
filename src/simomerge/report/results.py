"""How the report reads a run's results: plain dictionaries in which anything may be missing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Any]
"""The content of a run's ``results.json``: title, machine, recipe, tasks, rows, scale_curves, notes."""

Row = Mapping[str, Any]
"""One entry of ``results["rows"]``: a method with its Delta_MTL, its metrics and its cost."""

MISSING = "–"
"""What stands where a number is not known."""

FAMILIES = {
    "reference": "trained on all labels, not merged",
    "merge": "the experts' encoders in one, heads as they were",
    "re-aligned": "a merge whose heads or adapters were folded or tuned afterwards",
    "control": "the base encoder in place of a merged one",
}
"""The four sorts of row and what they are."""


@dataclass(frozen=True)
class Value:
    """A mean over seeds and the standard deviation between them; None where it is not known."""

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
    """``number`` as a float, or None where it is not a finite number.

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


def family(method: str) -> str:
    """The sort of a row: a key of `FAMILIES`.

    Example:
        >>> [family(name) for name in ("joint-mtl", "ties", "ties+heads", "zero-shot+heads")]
        ['reference', 'merge', 're-aligned', 'control']
    """
    if method == "experts" or method.startswith("joint-mtl"):
        return "reference"
    if method.split("+")[0] == "zero-shot":
        return "control"
    return "re-aligned" if "+" in method or method == "auto" else "merge"


def seeds(results: Results) -> int:
    """How many seeds the means are over: the largest number that any row has."""
    return max((len((row.get("delta_mtl") or {}).get("per_seed") or []) for row in rows(results)), default=0)


def signed(number: float, decimals: int = 1) -> str:
    """With its sign, but for zero, which has none.

    Example:
        >>> signed(1.24), signed(-27.5), signed(-0.01)
        ('+1.2', '-27.5', '0.0')
    """
    text = f"{number:+.{decimals}f}"
    return text[1:] if float(text) == 0 else text
