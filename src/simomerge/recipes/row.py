"""A row of a recipe's table as a value: a merge, then re-alignments with their parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from simomerge.core.errors import InputError
from simomerge.core.schema import plain_value

AUTO = "auto"
"""The merge that `simomerge.merge` chooses and folds by itself."""

LEARNED = "learned"
"""Task arithmetic with one coefficient per expert and block, learned without labels (``merge --scale learned``)."""

LABEL_FREE = (AUTO, LEARNED)
"""Merges that choose all their settings on images without labels. A recipe's ``merges`` do not list them."""

CONTROL = "zero-shot"
"""The base without a merge, re-aligned like the others for comparison."""


def joint_row(weighting: str) -> str:
    """The row of joint MTL with a weighting of its losses.

    Example:
        >>> joint_row("equal"), joint_row("dwa")
        ('joint-mtl', 'joint-mtl-dwa')
    """
    return "joint-mtl" if weighting == "equal" else f"joint-mtl-{weighting}"


_STEP = r"([\w.-]+)(?:\(([^()]*)\))?"  # name and parameters


@dataclass(frozen=True)
class Step:
    """One re-alignment of a row, by its name, with the parameters that only this row gives it."""

    name: str
    parameters: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        given = ", ".join(f"{key}={value}" for key, value in self.parameters)
        return f"{self.name}({given})" if given else self.name


@dataclass(frozen=True)
class Row:
    """A merge and the re-alignments that follow it.

    Example:
        >>> row = Row.parse("task-arithmetic+fold(count=16)+heads")
        >>> row.merge, [step.name for step in row.steps], row.steps[0].parameters
        ('task-arithmetic', ['fold', 'heads'], (('count', 16),))
        >>> str(row.before)
        'task-arithmetic+fold(count=16)'
    """

    merge: str
    steps: tuple[Step, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Row:
        """A row from ``MERGE+STEP+STEP(KEY=VALUE, ...)``.

        Raises:
            InputError: Text of another form.
        """
        merge, plus, rest = text.partition("+")
        if plus and not re.fullmatch(rf"{_STEP}(?:\+{_STEP})*", rest):
            raise InputError(f"row {text!r}: give MERGE+STEP, or MERGE+STEP(KEY=VALUE, ...)+STEP.")
        return cls(merge, tuple(Step(name, _parameters(text, given)) for name, given in re.findall(_STEP, rest)))

    def __str__(self) -> str:
        return "+".join([self.merge, *map(str, self.steps)])

    @property
    def before(self) -> Row:
        """The row without its last step: what the last step starts from."""
        return Row(self.merge, self.steps[:-1])

    def prefixes(self) -> list[Row]:
        """The row after its first step, after its second, and so on."""
        return [Row(self.merge, self.steps[: length + 1]) for length in range(len(self.steps))]


def _parameters(row: str, text: str) -> tuple[tuple[str, Any], ...]:
    found = []
    for pair in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (key and equals and value):
            raise InputError(f"row {row!r}: {pair!r} is not KEY=VALUE.")
        found.append((key, plain_value(value)))
    return tuple(found)
