"""How tasks relate, for people: lines for a terminal, one HTML page, the figures as files. No torch."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from simomerge.core.errors import InputError
from simomerge.core.files import atomic_write_text
from simomerge.relations.figures import cka_figure, cosine_figure, norm_figure, pair_figure, sweep_figure
from simomerge.report.results import MISSING, signed
from simomerge.report.shell import embedded, shell

Found = Mapping[str, Any]
"""What `simomerge.relations.Relations.to_dict` gives."""

FIGURES: dict[str, tuple[Callable[..., bytes], str]] = {
    "pairs": (
        pair_figure,
        "Two tasks merged into one encoder and folded: what the row's task gains over its own expert beside the"
        " column's, in %.",
    ),
    "sweeps": (
        sweep_figure,
        "The encoder is the base plus lambda times one task's vector; every expert's head reads it. A curve that rises"
        " from lambda = 0 belongs to a task that the vector helps, one that falls to a conflict; a narrow peak at"
        " lambda = 1 to a task that bears no disturbance. The thick curve is the vector's own task.",
    ),
    "norms": (norm_figure, "How far each expert's fine-tuning moved each block, relative to the base's weights."),
    "cosines": (
        cosine_figure,
        "Cosine of the angle between two task vectors: 0 is unrelated, above it they agree, below it they pull apart.",
    ),
    "cka": (
        cka_figure,
        "Linear CKA of the patch features of every two encoders at every tap: 1 is equal up to a rotation and a scale.",
    ),
}
"""Name of the file -> how it is drawn and what it shows."""

WORDS = {
    "gain": "What a task has over its own expert after the merge and the fold, in %: 0 equals the expert.",
    "labels": "Where labels judged, gains are relative changes of the task's metric, and their mean is Delta_MTL.",
    "agreement": "Where no labels were given, the expert's own predictions are the truth: 1 predicts what the expert "
    "predicts, 0 agrees no better than the expert's prediction for another image. A gain is the agreement less 1; "
    "small losses of agreement need not be losses of accuracy.",
    "budget": "So many encoders at most. A group is merged into one; a task alone keeps its expert.",
    "width": "How far lambda may go from 1, both sides together, until less than 90 % of the expert's performance is "
    "left. A small one: sensitive.",
    "effect": "What going along the row's task vector does to the column's task: mean performance for lambda in "
    "(0, 1] less that at the base.",
    "conflict": "Share of the weights which two experts changed in opposite directions; one half is unrelated. "
    "Weighted: each counts by the product of the two changes.",
}


def relation_lines(found: Found, budget: int | None = None) -> list[str]:
    """The tables of a finished `relate` for a terminal.

    Example:
        >>> choice = {"budget": 1, "groups": [["a", "b"]], "gain": -2.0, "gains": {"a": -1, "b": -3}, "measured": True}
        >>> print(*relation_lines({"tasks": ["a", "b"], "groups": {"merges": [], "choices": [choice]}}), sep="\\n")
        encoders  gain %  groups
               1    -2.0  a + b
    """
    lines: list[str] = []
    for head, table in _tables(found, budget):
        lines += [*([head] if head else []), *_aligned(table), ""]
    return lines[:-1]


def write_relations(folder: str | os.PathLike[str], found: Found, title: str = "Task relationships") -> Path:
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
    for name, (draw, _) in FIGURES.items():
        (folder / f"{name}.png").unlink(missing_ok=True)  # another run's
        with contextlib.suppress(InputError):  # nothing of its kind was measured
            (folder / f"{name}.png").write_bytes(draw(found, format="png"))
    page = folder / "relate.html"
    said = list(found.get("verdict") or []) or ["Nothing was measured."]
    atomic_write_text(page, shell(escape(title), said[:1], _about(found), list(relation_sections(found))))
    return page


def relation_sections(found: Found) -> Iterator[tuple[str, str]]:
    """Head and HTML of every part of the page; the verdict's first sentence is its headline."""
    if said := (found.get("verdict") or [])[1:]:
        yield "Verdict", "<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in said) + "\n</ul>"
    entries = (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in WORDS.items())
    yield "How to read it", '<dl class="words">\n' + "\n".join(entries) + "\n</dl>"
    for head, table in _tables(found, None):
        yield head or "Which tasks to merge", _html_table(table)
    for name, (draw, caption) in FIGURES.items():
        if shown := embedded(draw, found, caption):
            yield name.capitalize() if name != "cka" else "CKA", shown


def seeds_section(relations: Found) -> str:
    """The part of a run's report: the choices of every seed, and the verdict and figures of the first.

    Args:
        relations: by seed what `simomerge.relations.Relations.to_dict` gave; empty where nothing was measured.
    """
    if not relations:
        return ""
    first, found = next(iter(relations.items()))
    parts = [_html_table(_seeds_table(relations))]
    said = "\n".join(f"<li>{escape(line)}</li>" for line in found.get("verdict") or [])
    parts.append(f"<h3>Seed {escape(str(first))}</h3>\n<ul>\n{said}\n</ul>")
    parts += [embedded(FIGURES[name][0], found, FIGURES[name][1]) for name in ("sweeps", "pairs", "cosines")]
    return "\n".join(parts)


def _seeds_table(relations: Found) -> Table:
    rows = [
        [str(choice["budget"]), str(seed), _named(choice), signed(choice["gain"])]
        for place in range(len(next(iter(relations.values()))["tasks"]))
        for seed, found in relations.items()
        for choice in found["groups"]["choices"][place : place + 1]
    ]
    return [["encoders", "seed", "groups", "Delta_MTL % (validation)"], *rows]


def _about(found: Found) -> str:
    judged = f"judged by {found['judged_by']}" if found.get("judged_by") else ""
    images = f"{found['images']} images" if found.get("images") else ""
    return " · ".join(part for part in (", ".join(found.get("tasks") or []), images, judged) if part)


Table = list[list[str]]
"""Rows of finished strings, the head first."""


def _tables(found: Found, budget: int | None) -> Iterator[tuple[str, Table]]:
    """Every table with what stands above it; only of what was measured."""
    tasks = list(found["tasks"])
    if "groups" in found:
        chosen = [c for c in found["groups"]["choices"] if budget in (None, c["budget"])]
        rows = [[str(c["budget"]), signed(c["gain"]) + ("" if c["measured"] else " *"), _named(c)] for c in chosen]
        yield "", [["encoders", "gain %", "groups"], *rows]
    if "sweeps" in found:
        yield "Sensitivity and effects", _sweep_table(found["sweeps"], tasks)
    if "geometry" in found:
        yield "Task vectors (whole encoder)", _geometry_table(found["geometry"][0], tasks)
    if "alignment" in found:
        yield "Alignment of the merged model", _alignment_table(found["alignment"])


def _named(choice: Found) -> str:
    return " | ".join(" + ".join(group) for group in choice["groups"])


def _sweep_table(sweeps: Found, tasks: Sequence[str]) -> Table:
    head = ["task", "peak at", "width", *(f"on {task}" for task in tasks)]
    return [
        head,
        *(
            [
                task,
                _number(sweeps["peaks"][task], ".1f"),
                _number(sweeps["widths"][task], ".2f"),
                *(_number(sweeps["effects"][task].get(other), "+.2f") for other in tasks),
            ]
            for task in tasks
        ),
    ]


def _geometry_table(part: Found, tasks: Sequence[str]) -> Table:
    head = ["task", "norm", "% of base", *(f"cos {task}" for task in tasks), "most conflict with"]
    rows = []
    for i, task in enumerate(tasks):
        conflicts = {tasks[j]: value for j, value in enumerate(part["weighted_conflict"][i]) if j != i}
        known = {name: value for name, value in conflicts.items() if value is not None}
        worst = max(known, key=known.__getitem__) if known else ""
        cosines = [MISSING if i == j else _number(part["cosine"][i][j], ".2f") for j in range(len(tasks))]
        relative = part["relative"][i]
        rows.append(
            [
                task,
                _number(part["norms"][i], ".3g"),
                _number(None if relative is None else 100 * relative, ".1f"),
                *cosines,
                f"{worst} {known[worst]:.0%}" if worst else MISSING,
            ]
        )
    return [head, *rows]


def _alignment_table(rows: Sequence[Found]) -> Table:
    keys = ("r2_before", "r2_after", "cka_before", "cka_after")
    head = ["task", "block", "R2 before", "after map", "CKA before", "after map"]
    return [head, *([row["task"], str(row["tap"]), *(_number(row[key], ".3f") for key in keys)] for row in rows)]


def _number(value: float | None, form: str) -> str:
    text = MISSING if value is None else format(value, form)
    return text if text.strip("+-0.") else text.lstrip("+-")  # no sign of nothing


def _aligned(table: Table) -> list[str]:
    """Names to the left, numbers to the right; the last column of words too to the left."""
    left = [
        all(not cell[:1].isdigit() and cell[:1] not in "+-–" for cell in column[1:])
        for column in zip(*table, strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if words else cell.rjust(width)
            for cell, width, words in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in table
    ]


def _html_table(table: Table) -> str:
    head, *rows = ([f"<{kind}>{escape(cell)}</{kind}>" for cell in row] for kind, row in _kinds(table))
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="numbers">\n<thead><tr>{"".join(head)}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _kinds(table: Table) -> Iterator[tuple[str, list[str]]]:
    for place, row in enumerate(table):
        yield ("td" if place else "th"), row
