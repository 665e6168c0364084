"""The table of a run: numbers become text here, and the text is laid out for a terminal, Markdown or the page."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from simomerge.core.text import one_line
from simomerge.report.facts import MISSING, Results, Row, Value, finite, rows, signed, value

ASCII = str.maketrans({"±": "+-", "↑": "(up)", "↓": "(down)", "–": "-", "─": "-"})


_NUMBER = re.compile(r"([+-]?([\d.,]+(e[+-]?\d+)?|inf)|nan|–|)( ?[%*Mk]| ± [\d.,]+)?")


@dataclass(frozen=True)
class Column:
    """One column of finished strings.

    Attributes:
        head: up to three lines: the name; metric and arrow of the better direction; unit.
        cells: one per row of the results.
        cost: the column shows what a row costs, not how good it is.
    """

    head: tuple[str, ...]
    cells: tuple[str, ...]
    cost: bool = False

    @property
    def title(self) -> str:
        """The head in one line: ``depth abs_err ↓ (m)``."""
        name, *rest = self.head
        return " ".join([name, *(line for line in rest[:1] if line), *(f"({unit})" for unit in rest[1:] if unit)])

    @property
    def width(self) -> int:
        """Characters of the widest line on the screen."""
        return max(map(_screen_width, (*self.head, *self.cells)))

    def translated(self, letters: Mapping[int, str]) -> Column:
        """The column with some letters replaced."""
        head, cells = (tuple(text.translate(letters) for text in texts) for texts in (self.head, self.cells))
        return Column(head, cells, self.cost)


def columns(results: Results) -> list[Column]:
    """All columns of the table, the methods first. Only this function turns numbers into text.

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

    def cost(key: str, head: tuple[str, ...], written: Callable[[float | None], str]) -> Column:
        return Column(head, tuple(written(finite(row.get(key))) for row in table), cost=True)

    costs = [
        cost("seconds", ("seconds",), _seconds),
        cost("steps", ("steps",), _count),
        cost("trained_parameters", ("trained", "params"), _millions),
        cost("labelled_images", ("labelled", "images"), _count),
    ]
    if any("unlabelled_images" in row for row in table):
        costs.append(cost("unlabelled_images", ("unlabelled", "images"), _count))
    return [
        Column(("method",), tuple(_method(row) for row in table)),
        Column(("Delta_MTL", "↑", "%"), tuple(_spread(value(row, "delta_mtl"), 1, signed) for row in table)),
        *(_task_column(task, table) for task in results.get("tasks") or []),
        *costs,
    ]


def blocks(results: Results, width: int, ascii_only: bool = False) -> list[list[Column]]:
    """The columns in blocks that fit a terminal; each block starts with the methods. The costs form blocks of their own
    if the table is too wide for one.

    Args:
        results: the content of a run's ``results.json``.
        width: characters in a line.
        ascii_only: for a terminal that has neither arrows nor ±.
    """
    letters = ASCII if ascii_only else {}
    methods, *others = (column.translated(letters) for column in columns(results))
    scores, costs = ([column for column in others if column.cost == cost] for cost in (False, True))
    found = list(_fitting(methods, [*scores, *costs], width))
    return found if len(found) == 1 else [*_fitting(methods, scores, width), *_fitting(methods, costs, width)]


def text_table(results: Results, width: int = 120, ascii_only: bool = False) -> str:
    """The table as plain text. If it is too wide, the costs follow below, with the methods repeated.

    Args:
        results, width, ascii_only: as for `blocks`.

    Example:
        >>> row = {"method": "ties", "delta_mtl": {"mean": -12.34, "std": None}, "seconds": 3.21, "steps": 0}
        >>> print(text_table({"tasks": [], "rows": [row]}))
        method  Delta_MTL  seconds  steps  trained  labelled
                        ↑                   params    images
                        %
        ────────────────────────────────────────────────────
        ties        -12.3      3.2      0        –         –
    """
    rule = "-" if ascii_only else "─"
    return "\n\n".join(_block(block, rule) for block in blocks(results, width, ascii_only))


def markdown_table(results: Results) -> str:
    """The table in Markdown, with numbers aligned to the right.

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


def align(cells: Sequence[str], left: bool) -> list[str]:
    """Pad cells to the width of the widest one, with wide East Asian letters counted twice.

    Example:
        >>> align(["depth", "9"], left=False)
        ['depth', '    9']
    """
    width = max(map(_screen_width, cells))
    pads = [" " * (width - _screen_width(cell)) for cell in cells]
    return [cell + pad if left else pad + cell for cell, pad in zip(cells, pads, strict=True)]


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells, the head first, as lines with aligned columns: text to the left, numbers to the right.

    Example:
        >>> aligned([["task", "norm"], ["depth", "3.1"]])
        ['task   norm', 'depth   3.1']
    """
    columns = zip(*([one_line(cell) for cell in row] for row in table), strict=True)
    padded = [align(column, left=is_text(column[1:])) for column in columns]
    return ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]


def is_text(cells: Sequence[str]) -> bool:
    """Whether any cell is something other than a number, such as ``1,234``, ``12 %``, ``0.2 ± 0.1`` or ``–``."""
    return not all(map(_NUMBER.fullmatch, cells))


def _method(row: Row) -> str:
    encoders = finite(row.get("encoders")) or 1
    return one_line(row.get("method", MISSING)) + (f" ({encoders:.0f} encoders)" if encoders > 1 else "")


def _task_column(task: Any, table: Sequence[Row]) -> Column:
    values = [value(row, "metrics", task["name"]) for row in table]
    decimals = _decimals(values)
    arrow = "↑" if task["higher_is_better"] else "↓"
    head = (task["name"], f"{task['metric']} {arrow}", task.get("unit") or "")
    return Column(tuple(map(one_line, head)), tuple(_spread(cell, decimals) for cell in values))


def _decimals(values: Sequence[Value]) -> int:
    """Three significant digits of the median, so that one outlier does not cost the other rows their digits."""
    sizes = [abs(cell.mean) for cell in values if cell.mean]
    return min(max(2 - math.floor(math.log10(median(sizes))), 0), 6) if sizes else 1


def _fixed(number: float, decimals: int) -> str:
    return f"{number:.{decimals}f}"


def _spread(cell: Value, decimals: int, written: Callable[[float, int], str] = _fixed) -> str:
    if cell.mean is None:
        return MISSING
    return written(cell.mean, decimals) + ("" if cell.std is None else f" ± {_fixed(cell.std, decimals)}")


def _seconds(number: float | None) -> str:
    return _fixed(number, 1) if number and number < 100 else _count(number)


def _count(number: float | None) -> str:
    return MISSING if number is None else f"{number:,.0f}"


def _millions(number: float | None) -> str:
    if not number or number < 1000:
        return _count(number)
    return f"{number / 1e6:,.1f} M" if number >= 50_000 else f"{number / 1e3:.1f} k"


def _markdown_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _screen_width(text: str) -> int:
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.combining(letter) > 0 for letter in text)


def _fitting(first: Column, others: Sequence[Column], width: int) -> Iterator[list[Column]]:
    """Blocks of columns, each of which starts with the first column and is no wider than ``width``."""
    block, used = [first], first.width
    for column in others:
        if len(block) > 1 and used + 2 + column.width > width:
            yield block
            block, used = [first], first.width
        block.append(column)
        used += 2 + column.width
    yield block


def _block(block: Sequence[Column], rule: str) -> str:
    padded = [
        align([*column.head, *[""] * (3 - len(column.head)), *column.cells], left=number == 0)
        for number, column in enumerate(block)
    ]
    lines = ["  ".join(cells) for cells in zip(*padded, strict=True)]
    head = [line for line in lines[:3] if line.strip()]
    return "\n".join(line.rstrip() for line in (*head, rule * _screen_width(lines[0]), *lines[3:]))
