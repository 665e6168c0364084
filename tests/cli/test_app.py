"""simomerge app: what it says before it serves, and that it serves until Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from simomerge.cli.app import _parsed

from .conftest import assert_mistake, simomerge


def test_without_gradio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = simomerge("app")
    assert_mistake(done, r"this needs gradio, which is not installed: pip install .*\[app\]")


def test_the_first_word_may_be_a_model_or_an_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _parsed(()) == (None, {})
    assert _parsed(("runs/demo",)) == ("runs/demo", {})
    assert _parsed(("depth=runs/depth",)) == (None, {"depth": "runs/depth"})
    assert _parsed(("rooms-base", "a=b")) == ("rooms-base", {"a": "b"})
    Path("a=b").mkdir()
    assert _parsed(("a=b",)) == ("a=b", {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("./missing",), "missing"),
        (("rooms-base",), "rooms-base is an encoder without heads: add its experts"),
        (("rooms-base", "depth"), "'depth': give TASK=EXPERT"),
        (("rooms-base", "depth=./nothing"), "nothing"),
        (("--port", "99999"), "99999 is not in the range"),
    ],
)
def test_mistakes_are_named_before_anything_is_served(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    assert_mistake(simomerge("app", *arguments), message)


@pytest.mark.slow
def test_it_serves_one_model_until_ctrl_c(make_model: Any, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    from simomerge.datasets.tasks import Task

    make_model([Task("depth")]).save_pretrained(tmp_path / "expert")
    command = [sys.executable, "-m", "simomerge", "app", str(tmp_path / "expert")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    try:
        address = re.search(r"http://\S+", process.stdout.readline())
        assert address is not None and address[0].startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address[0], timeout=30) as answer:
            assert b"simomerge playground" in answer.read()
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
