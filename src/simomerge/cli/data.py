"""simomerge data"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from simomerge.cli.options import console, json_option, say


@click.group("data")
def command() -> None:
    """Look at a dataset on disk before training on it."""


@command.command("check")
@click.argument("data")
@click.option("--count", type=click.IntRange(1), default=100, show_default=True, help="Images read of each split.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("contact-sheet.png"),
    show_default=True,
    help="Contact sheet: some images with their targets in colour.",
)
@json_option
def check_command(data: str, count: int, output: Path, as_json: bool) -> None:
    """Count, measure and show what is in DATA, and find the usual mistakes.

    DATA is a manifest (data.yaml, data.csv or their folder), or a published dataset as nyuv2:FOLDER, cityscapes:FOLDER
    or taskonomy:FOLDER.

    Exit code 1 where there is something to mend.
    """
    from simomerge.core.errors import InputError
    from simomerge.core.files import atomic_file
    from simomerge.datasets.check import check, contact_sheet
    from simomerge.datasets.load import find_manifest

    said = find_manifest(data)
    with console():
        found = check(said, count)
    result = found.to_dict()
    lines = [line for split, what in result["splits"].items() for line in _split_lines(split, what)]
    try:
        sheet = contact_sheet(said)
    except InputError as error:  # nothing that can be shown
        sheet = None
        lines.append(f"No contact sheet: {error}")
    if sheet is not None:
        with atomic_file(output) as handle:
            sheet.save(handle, "PNG")
        lines.append(f"Contact sheet: {output}")
        result["contact_sheet"] = str(output)
    problems = [f"  {problem}" for problem in found.problems[:20]]
    more = [f"  and {len(found.problems) - 20} more"] if len(found.problems) > 20 else []
    verdict = [f"To mend ({len(found.problems)}):", *problems, *more] if problems else ["Nothing to mend."]
    say(as_json, result, *lines, *verdict)
    if problems:
        raise click.exceptions.Exit(1)


def _split_lines(split: str, what: dict[str, Any]) -> list[str]:
    sizes = ", ".join(f"{size} ({count})" for size, count in what["sizes"].items()) or "none readable"
    lines = [f"{split}: {what['images']} images; width x height of those read: {sizes}"]
    for name, seen in what["tasks"].items():
        valid = f"{seen['images']} images, {seen['valid']:.1%} of the pixels valid"
        if "classes" in seen:
            shares = ", ".join(f"{c} {share:.1%}" for c, share in seen["classes"].items())
            lines.append(f"  {name}: {valid}; {shares}")
        else:
            span = f"; {seen['low']:.3g} to {seen['high']:.3g}, mean {seen['mean']:.3g}" if "low" in seen else ""
            lines.append(f"  {name}: {valid}{span}")
    return lines
