"""What commands print on a terminal: tables, colours, and no control characters from files."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from simomerge.cli import output
from simomerge.cli.output import Table
from simomerge.training.run_folder import RunFolder

from .conftest import simomerge

ESCAPE = "\x1b["


class Terminal(io.StringIO):
    """A text stream that says that it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make standard output and standard error one colour terminal; pytest itself replaces them after fixtures ran."""
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", shown)
    for name, value in {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return shown


TABLE = Table(("task", "value"), [("depth", "1.5"), ("[red]x[/red]\x1b[2J", "12")], ["#d55e00", "#0072b2"])


def test_a_table_has_colours_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = terminal(monkeypatch)
    output.say(False, {}, "Result:", TABLE)
    lines = shown.getvalue().splitlines()
    assert lines[0] == "Result:" and "38;2;213;94;0m" in shown.getvalue() and "38;2;0;114;178m" in shown.getvalue()
    assert any("[red]x[/red][2J" in line for line in lines)  # no markup, no escape sequence
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    output.say(False, {}, TABLE)
    assert sys.stdout.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "task             value",
        "depth              1.5",
        "[red]x[/red][2J     12",
    ]


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    output.say(False, {}, TABLE)
    output.error("wrong")
    output.warning("strange")
    assert "38;2" not in shown.getvalue()
    assert shown.getvalue().endswith("\nError: wrong\nWarning: strange\n")


def test_errors_are_red_and_warnings_yellow_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = terminal(monkeypatch)
    output.error("bad\x1b]0;title\x07 name")
    output.warning("strange")
    assert shown.getvalue() == (
        f"{ESCAPE}31mError:{ESCAPE}0m bad]0;title name\n{ESCAPE}33mWarning: strange{ESCAPE}0m\n"
    )
    assert simomerge("methods", "tie").err.startswith("Error: There is no")  # not a terminal


def test_the_table_of_a_run_has_the_colours_of_the_families(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = terminal(monkeypatch)
    rows = [
        {"method": "experts", "family": "reference", "delta_mtl": {"mean": 0.0, "std": None}},
        {"method": "ties", "family": "merge", "delta_mtl": {"mean": -12.0, "std": None}},
    ]
    results: dict[str, Any] = {"tasks": [], "rows": rows, "gallery": []}
    output.report_run(results | {}, RunFolder.of(tmp_path), as_json=False)
    text = shown.getvalue()
    assert "38;2;139;148;158m" in text and "38;2;213;94;0m" in text and "Delta_MTL" in text
    assert f"Report:  {tmp_path / 'report.html'}" in text
    plain = Terminal()
    monkeypatch.setattr(plain, "isatty", lambda: False)
    monkeypatch.setattr(sys, "stdout", plain)
    output.report_run(results | {}, RunFolder.of(tmp_path), as_json=False)
    assert ESCAPE not in plain.getvalue() and "\nties         -12.0" in plain.getvalue()
