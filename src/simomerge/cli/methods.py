"""simomerge methods"""

from __future__ import annotations

from typing import Any

import click

from simomerge.cli import options
from simomerge.cli.output import Table, say
from simomerge.core.errors import InputError
from simomerge.core.progress import starting
from simomerge.core.registry import suggestion

_PAGE = """\
# Merge methods and re-alignments

Generated from the code by `simomerge methods --markdown`; a test compares the two. The docstrings give details: the
public convention that each method follows, and where other implementations differ.

## Merge methods

{merges}

A schedule over the depth combines with every method: `--schedule 0.2,0.5,1` (one factor per block, or a few factors
that are interpolated) or `--schedule lines` (LiNeS, [arXiv 2410.17146](https://arxiv.org/abs/2410.17146)).

## Re-alignments

{realignments}

On the command line, each parameter is an option of `simomerge realign`, such as `--batch-size 16` for `batch_size`.
"""


@click.command("methods")
@click.argument("names", nargs=-1)
@click.option("--markdown", is_flag=True, help="Print the page docs/methods.md.")
@options.as_json
def command(names: tuple[str, ...], markdown: bool, as_json: bool) -> None:
    """List the merge methods and the re-alignments with their parameters: all, or those in NAMES."""
    from simomerge.assembly.realign.method import realignment_rows
    from simomerge.merging.table import method_rows

    merges, realignments = method_rows(), realignment_rows()
    if markdown:
        starting.end()
        click.echo(_PAGE.format(merges=_markdown(merges), realignments=_markdown(realignments)), nl=False)
        return
    known = [row["name"] for row in (*merges, *realignments)]
    for name in names:
        if name not in known:
            raise InputError(f"There is no merge method or re-alignment '{name}'{suggestion(name, known)}")
    chosen = [[row for row in rows if not names or row["name"] in names] for rows in (merges, realignments)]
    shown: list[str | Table] = []
    for heading, option, rows in (("Merge methods:", "-p {}={}", chosen[0]), ("Re-alignments:", "--{} {}", chosen[1])):
        shown += [heading, "", _table(rows, option), ""] if rows else []
    say(as_json, {"methods": chosen[0], "realignments": chosen[1]}, *shown[:-1])


def _table(rows: list[dict[str, Any]], option: str) -> Table:
    """Name, needs, and what a method does with its parameters; as paragraphs where there is no terminal."""
    cells, text = [], []
    for row in rows:
        name, needs = row["name"], _needs(row)
        parameters = [option.format(each.replace("_", "-"), value) for each, value in row["parameters"].items()]
        lines = [row["summary"], *parameters, f"{row['paper']}, {row['link']}"]
        cells.append((name, needs, "\n".join([*lines, ""])))
        text += [f"{name}  (needs {needs})", *(f"    {line}" for line in lines)]
    return Table(("name", "needs", "what it does"), cells, text="\n".join(text))


def _needs(row: dict[str, Any]) -> str:
    return row["needs"] + ("; changes the encoder" if row.get("changes_encoder") else "")


def _markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| name | what it does | needs | parameters (default; range) | source |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        parameters = "<br>".join(f"`{name}` {text}" for name, text in row["parameters"].items()) or "none"
        source = f"[{row['paper']}]({row['link']})"
        cells = (f"`{row['name']}`", row["summary"].replace("|", "\\|"), _needs(row), parameters, source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
