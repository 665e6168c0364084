"""Progress: plain lines now and then where there is no terminal, bars where there is one."""

from __future__ import annotations

import io
import sys

import pytest

from simomerge.core.progress import Console, silent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_silent_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    silent("depth", 1, 2, "loss 0.3")
    assert capsys.readouterr() == ("", "")


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


def test_bars_follow_their_labels_and_close_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    console = Console()
    console("depth", 3, 10, "loss 0.31")
    console("normals", 1, 4, "")
    assert set(console.bars) == {"depth", "normals"} and console.bars["depth"].n == 3
    assert console.bars["depth"].postfix == "loss 0.31"
    console("depth", 7, 10, "")
    assert console.bars["depth"].n == 7 and console.bars["depth"].total == 10
    console("depth", 10, 10, "")
    assert set(console.bars) == {"normals"}
    console.close()
    assert not console.bars
    assert "depth" in terminal.getvalue() and "normals" in terminal.getvalue()
