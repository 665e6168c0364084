"""Progress: plain lines now and then where there is no terminal, bars where there is one."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from simomerge.core.progress import Console, labelled_progress, progress, show_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_sink_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    progress("depth", 1, 2, "loss 0.3")
    assert capsys.readouterr() == ("", "")


def test_the_innermost_sink_gets_the_reports_and_none_hides_them() -> None:
    outer: list[Any] = []
    inner: list[Any] = []
    with show_progress(lambda *report: outer.append(report)):
        progress("a", 1, 2)
        with show_progress(lambda *report: inner.append(report)):
            progress("b", 1, 2, "note")
        with show_progress(None):
            progress("c", 1, 2)
        progress("d", 2, 2)
    progress("e", 2, 2)
    assert outer == [("a", 1, 2, ""), ("d", 2, 2, "")] and inner == [("b", 1, 2, "note")]


def test_labels_are_replaced_or_kept() -> None:
    seen: list[str] = []
    with show_progress(lambda label, *_: seen.append(label)):
        with labelled_progress("outer"):
            progress("inner", 1, 2)
        with labelled_progress("outer", keep=True):
            progress("inner", 1, 2)
    with labelled_progress("outer"):
        progress("inner", 1, 2)  # there is no sink: nothing happens
    assert seen == ["outer", "outer inner"]


def test_lines_come_first_last_and_seldom_in_between(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(every_seconds=1000)
    for step in range(1, 51):
        console("depth", step, 50, f"loss {step}")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["  depth  1/50  loss 1", "  depth  50/50  loss 50"]


def test_labels_have_clocks_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(every_seconds=1000)
    console("depth", 1, 9, "")
    console("normals", 2, 9, "")
    assert capsys.readouterr().err.splitlines() == ["  depth  1/9", "  normals  2/9"]


def test_every_line_is_shown_when_enough_time_has_passed(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(every_seconds=0)
    for step in range(1, 6):
        console("depth", step, 50)
    assert len(capsys.readouterr().err.splitlines()) == 5


def test_bars_leave_their_last_line_and_close_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    console = Console()
    console("depth", 3, 10, "loss 0.31")
    console("normals", 1, 4, "")
    assert {task.description: task.completed for task in console._bars.tasks} == {"depth": 3, "normals": 1}
    assert {task.description: task.fields["note"] for task in console._bars.tasks}["depth"] == "loss 0.31"
    console("depth", 10, 12, "loss 0.2")
    assert {task.description: (task.completed, task.total) for task in console._bars.tasks}["depth"] == (10, 12)
    console("depth", 12, 12, "loss 0.1")
    assert [task.description for task in console._bars.tasks] == ["normals"]
    console.close()
    assert console._bars is None
    assert "  depth  12/12  loss 0.1" in terminal.getvalue() and "normals  1/4" not in terminal.getvalue()
