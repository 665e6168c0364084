"""How tasks relate, for people: tables, figures as files, one HTML page. Needs no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from simomerge.core.files import atomic_write_text
from simomerge.core.text import one_line
from simomerge.relations.curve import drawings, sharing_tables
from simomerge.relations.figures import (
    cka_figure,
    cosine_figure,
    norm_figure,
    pair_figure,
    sharing_figure,
    sweep_figure,
)
from simomerge.report.drawing import NothingToDraw, inline_figures, png
from simomerge.report.facts import MISSING, signed
from simomerge.report.page import render_html

Found = Mapping[str, Any]
"""What `simomerge.relations.Relations.to_dict` returns."""

Table = list[list[str]]
"""Rows of finished strings, the head first."""

FIGURES = {
    "Pairs": pair_figure,
    "Sharing": sharing_figure,
    "Sweeps": sweep_figure,
    "Norms": norm_figure,
    "Cosines": cosine_figure,
    "CKA": cka_figure,
}
"""The figures by heading; their captions are in the template captions.html."""


def write_relations(folder: str | os.PathLike[str], found: Found) -> Path:
    """Write relate.json, the figures (PNG) and relate.html, which needs no other file, into a folder.

    Returns:
        The page.

    Example:
        >>> write_relations("related", {"tasks": ["a", "b"], "verdict": ["Nothing was measured."]}).name
        'relate.html'
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / "relate.json", json.dumps(found, indent=2) + "\n")
    for heading, draw in FIGURES.items():
        file = folder / f"{heading.lower()}.png"
        file.unlink(missing_ok=True)  # it may be an earlier run's
        with suppress(NothingToDraw):
            file.write_bytes(png(draw(found)))
    verdict = list(found.get("verdict") or []) or ["Nothing was measured."]
    html = render_html(
        "relations.html",
        title="Task relationships",
        sentences=verdict[:1],
        tasks=found.get("tasks") or [],
        images=found.get("images"),
        judged_by=found.get("judged_by"),
        verdict=verdict[1:],
        tables=list(relation_tables(found)),
        trees=[(heading, _lines(drawing)) for heading, drawing in drawings(found)] if "sharing" in found else [],
        figures=inline_figures(FIGURES, found),
    )
    page = folder / "relate.html"
    atomic_write_text(page, html)
    return page


def _lines(drawing: str) -> Markup:
    """A drawing of several lines; names in it cannot add any."""
    return Markup("\n").join(escape(one_line(line)) for line in drawing.split("\n"))


def seeds_section(relations: Found) -> Markup:
    """The section of a run's report: the choices of every seed, and the verdict and figures of the first seed.

    Args:
        relations: the result of `simomerge.relations.Relations.to_dict` by seed; empty if nothing was measured.
    """
    if not relations:
        return Markup("")
    seed, first = next(iter(relations.items()))
    rows = [
        [str(choice["budget"]), str(seed), _named(choice), signed(choice["gain"])]
        for place in range(len(first["tasks"]))
        for seed, found in relations.items()
        for choice in found["groups"]["choices"][place : place + 1]
    ]
    return render_html(
        "seeds.html",
        choices=[["encoders", "seed", "groups", "Delta_MTL % (validation)"], *rows],
        seed=seed,
        verdict=first.get("verdict") or [],
        figures=inline_figures({name: FIGURES[name] for name in ("Sweeps", "Pairs", "Cosines")}, first),
    )


def relation_tables(found: Found, budget: int | None = None) -> Iterator[tuple[str, Table]]:
    """All tables of the measured sections with their headings; the choices have none.

    Example:
        >>> choice = {"budget": 1, "groups": [["a", "b"]], "gain": -2.0, "gains": {"a": -1, "b": -3}, "measured": True}
        >>> list(relation_tables({"tasks": ["a", "b"], "groups": {"merges": [], "choices": [choice]}}))
        [('', [['encoders', 'gain %', 'groups'], ['1', '-2.0', 'a + b']])]
    """
    tasks = list(found["tasks"])
    if "groups" in found:
        chosen = [c for c in found["groups"]["choices"] if budget in (None, c["budget"])]
        rows = [[str(c["budget"]), signed(c["gain"]) + ("" if c["measured"] else " *"), _named(c)] for c in chosen]
        yield "", [["encoders", "gain %", "groups"], *rows]
    if "sharing" in found:
        yield from sharing_tables(found)
    if "sweeps" in found:
        yield "Sensitivity and effects", _sweep_table(found["sweeps"], tasks)
    if "geometry" in found:
        yield "Task vectors (whole encoder)", _geometry_table(found["geometry"][0], tasks)
    if "alignment" in found:
        keys = ("r2_before", "r2_after", "cka_before", "cka_after")
        rows = [[row["task"], str(row["tap"]), *(_number(row[k], ".3f") for k in keys)] for row in found["alignment"]]
        head = ["task", "block", "R2 before", "after map", "CKA before", "after map"]
        yield "Alignment of the merged model", [head, *rows]


def _named(choice: Found) -> str:
    return " | ".join(" + ".join(group) for group in choice["groups"])


def _sweep_table(sweeps: Found, tasks: Sequence[str]) -> Table:
    rows = []
    for task in tasks:
        effects = [_number(sweeps["effects"][task].get(other), "+.2f") for other in tasks]
        rows.append([task, _number(sweeps["peaks"][task], ".1f"), _number(sweeps["widths"][task], ".2f"), *effects])
    return [["task", "peak at", "width", *(f"on {task}" for task in tasks)], *rows]


def _geometry_table(part: Found, tasks: Sequence[str]) -> Table:
    rows = []
    for i, task in enumerate(tasks):
        conflicts = {tasks[j]: value for j, value in enumerate(part["weighted_conflict"][i]) if j != i}
        known = {name: value for name, value in conflicts.items() if value is not None}
        worst = max(known, key=known.__getitem__) if known else ""
        cosines = [MISSING if i == j else _number(part["cosine"][i][j], ".2f") for j in range(len(tasks))]
        relative = part["relative"][i]
        share = _number(None if relative is None else 100 * relative, ".1f")
        conflict = f"{worst} {known[worst]:.0%}" if worst else MISSING
        rows.append([task, _number(part["norms"][i], ".3g"), share, *cosines, conflict])
    return [["task", "norm", "% of base", *(f"cos {task}" for task in tasks), "most conflict with"], *rows]


def _number(value: float | None, form: str) -> str:
    text = MISSING if value is None else format(value, form)
    return text if text.strip("+-0.") else text.lstrip("+-")  # zero has no sign
