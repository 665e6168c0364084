"""The table of merge methods for the documentation and the command line, generated from the dataclasses."""

from __future__ import annotations

from typing import Any

from simomerge.core.registry import range_text, settings, summary
from simomerge.merging.method import MergeMethod, available

_PAGE = """\
# Merge methods

Generated from the code by `simomerge methods --markdown`; a test compares the two. The docstrings give details: the
public convention that each method follows, and where other implementations differ.

| method | what it does | needs | parameters (default; range) | source |
| --- | --- | --- | --- | --- |
{rows}

A schedule over the depth combines with every method: `--schedule 0.2,0.5,1` (one factor per block, or a few factors
that are interpolated) or `--schedule lines` (LiNeS, [arXiv 2410.17146](https://arxiv.org/abs/2410.17146)).
"""


def method_rows() -> list[dict[str, Any]]:
    """One row per merge method: name, what it does, needs, parameters with ranges and defaults, paper and link.

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


def methods_markdown() -> str:
    """The table as a Markdown page."""
    lines = []
    for row in method_rows():
        parameters = "<br>".join(f"`{name}` {text}" for name, text in row["parameters"].items()) or "none"
        summary = row["summary"].replace("|", "\\|")
        cells = (f"`{row['name']}`", summary, row["needs"], parameters, f"[{row['paper']}]({row['link']})")
        lines.append(f"| {' | '.join(cells)} |")
    return _PAGE.format(rows="\n".join(lines))


def _needs(method: type[MergeMethod]) -> str:
    needs = ["base"] * method.needs_base
    if method.minimum_experts > 1:
        needs.append(f"{method.minimum_experts} experts")
    if method.needs_labels:
        needs.append("labelled images")
    elif method.needs_data:
        needs.append("images")
    return ", ".join(needs) or "experts only"
