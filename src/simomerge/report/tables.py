"""The table of a run, formatted once and written as text, as Markdown or (by the page) as HTML."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from simomerge.report.results import MISSING, Results, Row, Value, finite, rows, signed, value

ASCII = str.maketrans({"±": "+-", "↑": "(up)", "↓": "(down)", "–": "-", "─": "-"})


@dataclass(frozen=True)
class Column:
    """One column of finished strings.

    Attributes:
        head: up to three lines: what it is; metric and arrow of the better direction; unit.
        cells: one per row of the results.
        cost: what a row takes, not how good it is.
    """

    head: tuple[str, ...]
    cells: tuple[str, ...]
    cost: bool = False

    @property
    def title(self) -> str:
        """The head in one line: ``depth abs_err ↓ (m)``."""
        name, *rest = self.head
        return " ".join([name, *(part for part in rest[:1] if part), *(f"({unit})" for unit in rest[1:] if unit)])


def columns(results: Results) -> list[Column]:
    """Every column of the table, the methods first: the one place where numbers become text.

    Example:
        >>> tasks = [{"name": "depth", "metric": "abs_err", "unit": "m", "higher_is_better": False}]
        >>> row = {"method": "ties", "delta_mtl": {"mean": -12.34, "std": 0.41}, "steps": 1200}
        >>> for column in columns({"tasks": tasks, "rows": [row]})[:3]:
        ...     print(column.title, column.cells)
        method ('ties',)
        Delta_MTL ↑ (%) ('-12.3 ± 0.4',)
        depth abs_err ↓ (m) ('–',)
    """
    table = rows(results)
    return [
        Column(("method",), tuple(_method(row) for row in table)),
        Column(("Delta_MTL", "↑", "%"), tuple(_delta(value(row, "delta_mtl")) for row in table)),
        *(_task_column(task, table) for task in results.get("tasks") or []),
        Column(("seconds",), tuple(_seconds(finite(row.get("seconds"))) for row in table), cost=True),
        Column(("steps",), tuple(_count(finite(row.get("steps"))) for row in table), cost=True),
        Column(
            ("trained", "params"), tuple(_millions(finite(row.get("trained_parameters"))) for row in table), cost=True
        ),
        *(
            Column((kind, "images"), tuple(_count(finite(row.get(f"{kind}_images"))) for row in table), cost=True)
            for kind in ("labelled", "unlabelled")
            if kind == "labelled" or any(f"{kind}_images" in row for row in table)
        ),
    ]


def text_table(results: Results, width: int = 120, ascii_only: bool = False) -> str:
    """The table for a terminal. Where it is too wide, the costs follow below, with the methods repeated.

    Args:
        results: the content of a run's ``results.json``.
        width: characters in a line.
        ascii_only: for a terminal that has neither arrows nor ±.

    Example:
        >>> row = {"method": "ties", "delta_mtl": {"mean": -12.34, "std": None}, "seconds": 3.21, "steps": 0}
        >>> print(text_table({"tasks": [], "rows": [row]}))
        method  Delta_MTL  seconds  steps  trained  labelled
                        ↑                   params    images
                        %
        ────────────────────────────────────────────────────
        ties        -12.3      3.2      0        –         –
    """
    methods, *others = columns(results)
    first = _aligned(methods, ascii_only)
    scores, costs = ([_aligned(c, ascii_only) for c in others if c.cost == cost] for cost in (False, True))
    parts = list(_fitting(first, [*scores, *costs], width))
    if len(parts) > 1:
        parts = [*_fitting(first, scores, width), *_fitting(first, costs, width)]
    blocks = ["\n".join(_block(part)) for part in parts]
    return "\n\n".join(blocks).translate(ASCII if ascii_only else {})


def markdown_table(results: Results) -> str:
    """The table in Markdown, numbers to the right.

    Example:
        >>> row = {"method": "ties", "delta_mtl": {"mean": -12.34, "std": None}, "seconds": 3.21, "steps": 0}
        >>> print(markdown_table({"tasks": [], "rows": [row]}))
        | method | Delta_MTL ↑ (%) | seconds | steps | trained params | labelled images |
        | :-- | --: | --: | --: | --: | --: |
        | ties | -12.3 | 3.2 | 0 | – | – |
    """
    table = columns(results)
    heads = [column.title for column in table]
    body = zip(*(column.cells for column in table), strict=True)
    lines = [heads, [":--", *["--:"] * (len(table) - 1)], *body]
    return "\n".join("| " + " | ".join(map(_markdown_cell, line)) + " |" for line in lines)


def _method(row: Row) -> str:
    encoders = finite(row.get("encoders")) or 1
    return _printable(row.get("method", MISSING)) + (f" ({encoders:.0f} encoders)" if encoders > 1 else "")


def _task_column(task: Any, table: Sequence[Row]) -> Column:
    values = [value(row, "metrics", task["name"]) for row in table]
    decimals = _decimals(values)
    arrow = "↑" if task["higher_is_better"] else "↓"
    head = (
        _printable(task["name"]),
        f"{_printable(task['metric'])} {arrow}",
        _printable(task.get("unit") or ""),
    )
    return Column(head, tuple(_spread(cell, decimals) for cell in values))


def _decimals(values: Sequence[Value]) -> int:
    """Three significant digits of the median: one far-off row must not cost the others their digits."""
    sizes = [abs(cell.mean) for cell in values if cell.mean]
    return min(max(2 - math.floor(math.log10(median(sizes))), 0), 6) if sizes else 1


def _spread(cell: Value, decimals: int) -> str:
    if cell.mean is None:
        return MISSING
    return f"{cell.mean:.{decimals}f}" + ("" if cell.std is None else f" ± {cell.std:.{decimals}f}")


def _delta(cell: Value) -> str:
    if cell.mean is None:
        return MISSING
    return signed(cell.mean) + ("" if cell.std is None else f" ± {cell.std:.1f}")


def _seconds(number: float | None) -> str:
    return f"{number:.1f}" if number and number < 100 else _count(number)


def _count(number: float | None) -> str:
    return MISSING if number is None else f"{number:,.0f}"


def _millions(number: float | None) -> str:
    if not number or number < 1000:
        return _count(number)
    return f"{number / 1e6:,.1f} M" if number >= 50_000 else f"{number / 1e3:.1f} k"


def _printable(text: Any) -> str:
    """Line breaks and escape sequences in a name would break the table, or the terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text))


def _markdown_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _screen_width(text: str) -> int:
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.combining(letter) > 0 for letter in text)


def _aligned(column: Column, ascii_only: bool) -> list[str]:
    """Three lines of head and the cells, all equally wide; names to the left, numbers to the right."""
    head = [*column.head, *[""] * (3 - len(column.head))]
    lines = [line.translate(ASCII if ascii_only else {}) for line in (*head, *column.cells)]
    width = max(map(_screen_width, lines))
    left = column.head == ("method",)
    pads = [" " * (width - _screen_width(line)) for line in lines]
    return [line + pad if left else pad + line for line, pad in zip(lines, pads, strict=True)]


def _fitting(first: list[str], rest: list[list[str]], width: int) -> Iterator[list[list[str]]]:
    """Groups of aligned columns, each led by the first column and no wider than ``width``."""
    block, used = [first], _screen_width(first[0])
    for column in rest:
        needed = 2 + _screen_width(column[0])
        if len(block) > 1 and used + needed > width:
            yield block
            block, used = [first], _screen_width(first[0])
        block.append(column)
        used += needed
    yield block


def _block(table: list[list[str]]) -> list[str]:
    lines = ["  ".join(cells) for cells in zip(*table, strict=True)]
    rule = "─" * _screen_width(lines[0])
    head = [line.rstrip() for line in lines[:3] if line.strip()]
    return [*head, rule, *(line.rstrip() for line in lines[3:])]
