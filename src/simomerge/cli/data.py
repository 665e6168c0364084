"""simomerge data"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from simomerge.cli import options
from simomerge.cli.output import console, say


@click.group("data")
def command() -> None:
    """Inspect a dataset on disk before training on it."""


@command.command("check")
@click.argument("data")
@click.option("--count", type=click.IntRange(1), default=100, show_default=True, help="Images to read in each split.")
@options.folder(Path("contact-sheet.png"), "Contact sheet to write: some images with their targets in colour.")
@options.as_json
def check_command(data: str, count: int, output: Path, as_json: bool) -> None:
    """Count and measure the contents of DATA, show some of it, and find common mistakes.

    DATA is a manifest (data.yaml, data.csv or their folder) or a published dataset: nyuv2:FOLDER, cityscapes:FOLDER
    or taskonomy:FOLDER.

    The exit code is 1 if there is something to fix.
    """
    from simomerge.core.errors import InputError
    from simomerge.core.files import atomic_file
    from simomerge.datasets.check import check, contact_sheet
    from simomerge.datasets.load import find_manifest

    manifest = find_manifest(data)
    with console():
        found = check(manifest, count)
    result = found.to_dict()
    lines = [line for split, what in result["splits"].items() for line in _split_lines(split, what)]
    try:
        sheet = contact_sheet(manifest)
    except InputError as error:  # No image can be shown.
        sheet = None
        lines.append(f"No contact sheet: {error}")
    if sheet is not None:
        with atomic_file(output) as handle:
            sheet.save(handle, "PNG")
        lines.append(f"Contact sheet: {output}")
        result["contact_sheet"] = str(output)
    problems = [f"  {problem}" for problem in found.problems[:20]]
    more = [f"  and {len(found.problems) - 20} more"] if len(found.problems) > 20 else []
    verdict = [f"To fix ({len(found.problems)}):", *problems, *more] if problems else ["Nothing to fix."]
    say(as_json, result, *lines, *verdict)
    if problems:
        raise click.exceptions.Exit(1)


def _split_lines(split: str, what: dict[str, Any]) -> list[str]:
    sizes = ", ".join(f"{size} ({count})" for size, count in what["sizes"].items()) or "none readable"
    lines = [f"{split}: {what['images']} images; width x height of those read: {sizes}"]
    for name, task in what["tasks"].items():
        line = f"  {name}: {task['images']} images, {task['valid']:.1%} of the pixels valid"
        if "classes" in task:
            line += "; " + ", ".join(f"{c} {share:.1%}" for c, share in task["classes"].items())
        elif "low" in task:
            line += f"; {task['low']:.3g} to {task['high']:.3g}, mean {task['mean']:.3g}"
        lines.append(line)
    return lines
