"""The command line in this process, and a small example that runs once: train, train, merge."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from simomerge.cli import cli, main
from simomerge.core.machine import PRECISION

TINY = ("--count", "8", "--val-count", "8", "--probe-steps", "2", "--steps", "2", "--batch-size", "4")


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def simomerge(*arguments: object) -> Outcome:
    """Run a command as a terminal would."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["simomerge", *map(str, arguments)])
        patch.setenv(PRECISION, os.environ.get(PRECISION, "auto"))  # --precision must not outlast the command
        try:
            main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    assert_next_steps_parse(out.getvalue())
    return Outcome(code, out.getvalue(), err.getvalue())


def assert_next_steps_parse(printed: str) -> None:
    """Every line "Next: simomerge ..." is a command that the command line itself accepts, without placeholders."""
    for line in printed.splitlines():
        if not line.startswith("Next: "):
            continue
        program, name, *arguments = shlex.split(line.removeprefix("Next: "), comments=True)
        assert program == "simomerge", line
        parent = click.Context(cli, **cli.context_settings)  # commands inherit -h from it, and keep what they inherit
        command = cli.get_command(parent, name)
        assert command is not None, line
        if isinstance(command, click.Group):
            command, arguments = command.commands[arguments[0]], arguments[1:]
        command.make_context(name, list(arguments), parent=parent)  # raises if an option or an argument is wrong
        assert not re.search(r"\b(EXPERT|FOLDER|BASE|OUT|OTHER)\b", " ".join(arguments)), line


def assert_mistake(done: Outcome, message: str) -> None:
    """The command ended with status 2 and printed only one short error message, which contains a pattern."""
    assert (done.code, done.out) == (2, ""), done
    assert "Traceback" not in done.err
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("Error: ") and len(last) < 600 and re.search(message, last), done.err
    assert len(re.findall(r"[.?!](?= [A-Z]|$)", last)) <= 3, last


@dataclass
class Story:
    """What the commands wrote, and what they printed as JSON."""

    folder: Path
    said: dict[str, Any]

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="session")
def story(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Folders depth, normals (experts) and scene (merged). Do not write into them."""
    folder = tmp_path_factory.mktemp("story")
    said = {}
    for task in ("depth", "normals"):
        done = simomerge("train", "--task", task, "--base", tiny_base, *TINY, "-o", folder / task, "--json")
        assert done.code == 0, done.err
        said[task] = done.json
    experts = (f"depth={folder / 'depth'}", f"normals={folder / 'normals'}")
    done = simomerge("merge", tiny_base, *experts, "--scale", "0.5", "-o", folder / "scene", "--json")
    assert done.code == 0, done.err
    said["scene"] = done.json
    return Story(folder, said)


@pytest.fixture
def copy_of(story: Story, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the story's models, to be damaged."""
    return lambda name: Path(shutil.copytree(story / name, tmp_path / name))
