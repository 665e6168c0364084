"""What several commands share: options, parsing of TASK=FOLDER, output for people and for machines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from simomerge.core.errors import InputError
from simomerge.core.progress import Console, show_progress
from simomerge.training.choices import TRACKERS

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace OUT where it exists.")
data_option = click.option(
    "--data",
    default="rooms",
    show_default=True,
    help="rooms, nyuv2:FOLDER, cityscapes:FOLDER, taskonomy:FOLDER, or a manifest of your own data.",
)
images_option = click.option("--images", metavar="FOLDER", help="Pictures without labels, also in subfolders.")
size_option = click.option(
    "--size", metavar="HEIGHTxWIDTH", help="Make the pictures this size (pixels); as they are by default."
)
workers_option = click.option(
    "--workers", type=click.IntRange(1), help="Processes side by side; one per core by default."
)

cache_budget_option = click.option(
    "--cache-budget", metavar="SIZE", help="What features on disk may take at most, such as 20GB."
)
checkpointing_option = click.option(
    "--gradient-checkpointing", is_flag=True, help="Compute blocks again in the backward pass: less memory, slower."
)


track_option = click.option(
    "--track",
    "trackers",
    multiple=True,
    type=click.Choice(TRACKERS),
    help="Report losses and learning rates there too; may be repeated.",
)


def output_option(required: bool = True) -> Any:
    return click.option(
        "-o", "--output", type=click.Path(path_type=Path), required=required, help="Folder to write (OUT)."
    )


def parse_pairs(pairs: Sequence[str], what: str = "TASK=EXPERT") -> dict[str, str]:
    """``["depth=runs/depth"]`` -> ``{"depth": "runs/depth"}``.

    Raises:
        InputError: no equals sign, an empty side, or a name given twice.
    """
    parsed: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise InputError(f"{pair!r}: give {what}, such as depth=runs/depth.")
        if name in parsed:
            raise InputError(f"two experts for task {name!r}: {parsed[name]} and {value}; give one.")
        parsed[name] = value
    return parsed


def parse_parameters(pairs: Sequence[str]) -> dict[str, Any]:
    """``["density=0.2"]`` -> ``{"density": 0.2}``; what is no number stays text.

    ``scale=depth:0.3,normals:0.5`` gives one value per expert.
    """
    return {name: parse_value(value) for name, value in parse_pairs(pairs, "KEY=VALUE").items()}


def parse_value(text: str) -> Any:
    """A number, a mapping ``NAME:NUMBER,NAME:NUMBER``, or the text."""
    items = [item.rpartition(":") for item in text.split(",")]
    if all(name and colon for name, colon, _ in items):
        return {name: _number(value) for name, _, value in items}
    return _number(text)


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that exists before any work starts."""
    if output.exists() and not overwrite:
        raise InputError(f"{output} exists; choose another folder, or give --overwrite.")


def logs_of(output: Path) -> Path:
    """Where trackers write beside a folder that appears only when all is done."""
    return output.parent / f"{output.name}-logs"


def is_first() -> bool:
    """Under torchrun, whether this is the process that writes and speaks; asked before torch is there."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def console() -> Iterator[None]:
    """Show progress on the terminal until the block ends."""
    shown = Console()
    try:
        with show_progress(shown if is_first() else None):
            yield
    finally:
        shown.close()


def say(as_json: bool, data: dict[str, Any], *lines: str) -> None:
    """Print the result: lines for people, or JSON for machines."""
    if is_first():
        click.echo(json.dumps(data, indent=2) if as_json else "\n".join(lines))


def score_lines(scores: dict[str, dict[str, float]], tasks: dict[str, Any]) -> list[str]:
    """One line per task: its metric first, the others after it."""
    lines = []
    for name, values in scores.items():
        task = tasks[name]
        others = "  ".join(f"{key} {value:.4g}" for key, value in values.items() if key != task.metric)
        lines.append(f"  {name:<14} {task.metric} {values[task.metric]:.4g} {task.unit:<4} {others}".rstrip())
    return lines


def report_run(results: dict[str, Any], folder: Path, as_json: bool) -> None:
    """Write the report of a finished run beside its results.json, and print the table."""
    import sys

    from simomerge.relations.page import seeds_section
    from simomerge.report import text_table, write_report

    if not is_first():
        return
    related = ("Task relationships", seeds_section(results.get("relations") or {}))
    report = write_report(folder / "report.html", results, results.pop("gallery"), [related])
    say(
        as_json,
        {**results, "report": str(report)},
        text_table(results, ascii_only="utf" not in (sys.stdout.encoding or "").lower()),
        "",
        f"Results: {folder / 'results.json'}",
        f"Report:  {report}",
    )
