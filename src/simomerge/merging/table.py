"""The merge methods as rows, for the documentation and the command line, generated from the dataclasses."""

from __future__ import annotations

from typing import Any

from simomerge.core.registry import range_text, settings, summary
from simomerge.merging.method import MergeMethod, available


def method_rows() -> list[dict[str, Any]]:
    """One row per merge method: name, summary, needs, parameters with defaults and ranges, paper and link.

    Example:
        >>> next(row for row in method_rows() if row["name"] == "average")["parameters"]
        {}
    """
    return [
        {
            "name": name,
            "summary": summary(method),
            "needs": _needs(method),
            "parameters": {spec.name: range_text(spec) for spec in settings(method)},
            "paper": method.paper,
            "link": method.link,
        }
        for name, method in available().items()
    ]


def _needs(method: type[MergeMethod]) -> str:
    needs = ["base"] * method.needs_base
    if method.minimum_experts > 1:
        needs.append(f"{method.minimum_experts} experts")
    if method.needs_labels:
        needs.append("labelled images")
    elif method.needs_data:
        needs.append("images")
    return ", ".join(needs) or "experts only"
