"""What the commands print: results as lines, tables or JSON, warnings and errors. Colours are for terminals only."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import click

from simomerge.cli.next_step import MARK, next_step
from simomerge.core.progress import Console, has_rich, show_progress, starting
from simomerge.core.text import one_line, printable, without_secrets

if TYPE_CHECKING:
    from simomerge.training.run_folder import RunFolder

REPORT = "report.html"

quiet = False
"""Whether the command shows neither progress nor the next step; set by `be_quiet`."""


def be_quiet(given: bool) -> None:
    """Show results, warnings and errors only."""
    global quiet
    quiet = given


@dataclass(frozen=True)
class Table:
    """Rows of finished text under a head: a rich table on a terminal, aligned columns elsewhere.

    Attributes:
        head: One title per column.
        rows: The cells, row by row.
        colours: A rich style per row, if rows have colours.
        text: Replaces the aligned columns where there is no terminal. Cells may then have several lines.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    colours: Sequence[str] = ()
    text: str | None = None

    def plain(self) -> str:
        """The table for files and pipes."""
        from simomerge.report.table import aligned

        return self.text if self.text is not None else "\n".join(aligned([self.head, *self.rows]))

    def draw(self) -> None:
        """Print the table on the terminal. Cells are plain text: rich interprets no markup in them."""
        from rich import box, table
        from rich.console import Console as Terminal
        from rich.text import Text

        from simomerge.report.table import is_text

        # The gap between columns is two characters, as in plain tables: `report.table.blocks` counts on it.
        drawn = table.Table(
            box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold"
        )
        for title, *cells in zip(self.head, *self.rows, strict=True):
            drawn.add_column(Text(printable(title)), justify="left" if is_text(cells) else "right", overflow="fold")
        for number, row in enumerate(self.rows):
            colour = self.colours[number] if self.colours else None
            clean = one_line if self.text is None else printable
            drawn.add_row(*(Text(without_secrets(clean(cell))) for cell in row), style=colour)
        Terminal(highlight=False).print(drawn)


def say(as_json: bool, data: dict[str, Any], *shown: str | Table) -> None:
    """Print the result: lines and tables for people, or JSON for programs. Under torchrun only one process prints.

    Each text is one line, whatever the names in it contain. URLs are printed without queries and passwords.
    """
    if not is_first():
        return
    starting.end()
    if as_json:
        click.echo(without_secrets(json.dumps(data, indent=2)))
        return
    for each in shown:
        if isinstance(each, Table) and sys.stdout.isatty() and has_rich():
            each.draw()
        elif not (quiet and isinstance(each, str) and each.startswith(MARK)):
            text = printable(each.plain()) if isinstance(each, Table) else one_line(each)
            click.echo(without_secrets(text))


def error(message: str) -> None:
    """Print an error message on standard error; the word "Error:" is red on a terminal."""
    starting.end()
    click.echo(f"{_coloured('Error:', 'red', sys.stderr)} {without_secrets(printable(message))}", err=True)


def warning(message: str) -> None:
    """Print a warning in yellow on standard error."""
    starting.end()
    click.echo(_coloured(f"Warning: {without_secrets(printable(message))}", "yellow", sys.stderr), err=True)


def _coloured(text: str, colour: str, stream: IO[str]) -> str:
    plain = not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else click.style(text, fg=colour)


def is_first() -> bool:
    """Whether this process writes files and prints, under torchrun. It reads the environment and needs no torch."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def console() -> Iterator[None]:
    """Show progress on the terminal until the block ends."""
    shown = Console()
    try:
        with show_progress(shown if is_first() and not quiet else None):
            yield
    finally:
        shown.close()


def report_run(results: dict[str, Any], folder: RunFolder, as_json: bool) -> None:
    """Write the report of a finished run next to its results.json, and print the table."""
    from simomerge.relations.page import seeds_section
    from simomerge.report import text_table, write_report
    from simomerge.report.drawing import FAMILY_COLOURS, LIGHT
    from simomerge.report.facts import family, rows
    from simomerge.report.recommendation import recommendation
    from simomerge.report.table import blocks

    if not is_first():
        return
    related = ("Task relationships", seeds_section(results.get("relations") or {}))
    write_report(folder.path / REPORT, results, results.pop("gallery"), [related], folder.shown())
    folder.send(REPORT)
    report = folder.shown(REPORT)
    ascii_only = "utf" not in (sys.stdout.encoding or "").lower()
    shown: list[str | Table] = []
    if sys.stdout.isatty():
        colours = [LIGHT[FAMILY_COLOURS[family(row)]] for row in rows(results)]
        for block in blocks(results, shutil.get_terminal_size().columns, ascii_only):
            cells = list(zip(*(column.cells for column in block), strict=True))
            shown += [Table(["\n".join(column.head) for column in block], cells, colours), ""]
    else:
        shown = [*text_table(results, ascii_only=ascii_only).splitlines(), ""]
    files = [f"Results: {folder.shown('results.json')}", f"Report:  {report}"]
    if advice := recommendation(results, folder.shown()):
        shown += [*advice.sentences, ""]
        files += [f"Model:   {advice.folder}", next_step("inspect", advice.folder)]
    say(as_json, {**results, "report": report}, *shown, *files)
