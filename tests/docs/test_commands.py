"""Every `simomerge` line of the pages is one that the command line accepts, and every Python block compiles."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path

import click
import pytest

from simomerge.cli import cli

from .blocks import blocks

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "src").rglob("*.md")])
_INDENTED = re.compile(r"^ {4}(.*)$")


def commands(page: Path) -> Iterator[str]:
    """The shell lines of a page that call simomerge; lines that end in a backslash go on in the next."""
    text = page.read_text(encoding="utf-8")
    lines = [match[1] for line in text.splitlines() if (match := _INDENTED.match(line))]
    lines += [line for block in blocks(page) if block.kind == "bash" for line in block.code.splitlines()]
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        found = re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S+ )*simomerge (?P<rest>.*)", line)
        if found and "..." not in found["rest"]:
            yield found["rest"]


def test_there_are_many() -> None:
    assert sum(1 for page in PAGES for _ in commands(page)) > 80


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_command_line_accepts_every_line(page: Path) -> None:
    for line in commands(page):
        words = shlex.split(line, comments=True)
        words = words[: next((place for place, word in enumerate(words) if word in ("|", ">", ";", "&&")), None)]
        parent = click.Context(cli, **cli.context_settings)
        if words[0].startswith("-"):
            continue
        command = cli.get_command(parent, words[0])
        assert command is not None, line
        if isinstance(command, click.Group):
            command, words = command.commands[words[1]], words[1:]
        try:
            copy_context().run(command.make_context, words[0], words[1:], parent=parent)  # --trust-code ends with it
        except click.exceptions.Exit:  # --help and --version
            pass
        except click.ClickException as error:
            pytest.fail(f"simomerge {line}\n{error.format_message()}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_compile(page: Path) -> None:
    for block in blocks(page):
        if block.kind == "python":
            ast.parse(block.code)
