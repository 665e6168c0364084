"""simomerge data"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from simomerge.cli import options
from simomerge.cli.next_step import next_step
from simomerge.cli.output import console, say


@click.group("data")
def command() -> None:
    """Inspect a dataset on disk before training on it."""


@command.command("check")
@click.argument("data", type=options.place)
@click.option("--count", type=click.IntRange(1), default=100, show_default=True, help="Images to read in each split.")
@options.output(
    required=False,
    model=False,
    help="Picture to write (OUT): some images with their targets in colour, such as contact-sheet.png.",
)
def check_command(data: str, count: int, output: Path | None, overwrite: bool, as_json: bool) -> None:
    """Count and measure the contents of DATA, show some of it, and find common mistakes.

    DATA is a manifest (data.yaml, data.csv or their folder) or a published dataset: nyuv2:FOLDER, cityscapes:FOLDER
    or taskonomy:FOLDER.

    The exit code is 1 if there is something to fix.
    """
    from simomerge.core.files import check_apart
    from simomerge.datasets.check import check
    from simomerge.datasets.load import find_manifest

    manifest = find_manifest(data)
    if output is not None and output.exists():
        check_apart(output, manifest.files(), inside=False)
    with console():
        found = check(manifest, count)
    result = found.to_dict()
    lines = [line for split, what in result["splits"].items() for line in _split_lines(split, what)]
    if output is not None:
        lines += _write_sheet(manifest, output, result)
    problems = [f"  {problem}" for problem in found.problems[:20]]
    more = [f"  and {len(found.problems) - 20} more"] if len(found.problems) > 20 else []
    verdict = [f"To fix ({len(found.problems)}):", *problems, *more] if problems else ["Nothing to fix."]
    comment = "a picture of some images with their targets"
    hint = [next_step("data", "check", data, "-o", "contact-sheet.png", comment=comment)] if output is None else []
    say(as_json, result, *lines, *verdict, *hint)
    if problems:
        raise click.exceptions.Exit(1)


def _write_sheet(manifest: Any, output: Path, result: dict[str, Any]) -> list[str]:
    """Write the contact sheet, enter its path into the result, and say where it is."""
    from simomerge.core.errors import InputError
    from simomerge.core.files import atomic_file
    from simomerge.datasets.sheet import contact_sheet

    try:
        sheet = contact_sheet(manifest)
    except InputError as error:  # No image can be shown.
        return [f"No contact sheet: {error}"]
    with atomic_file(output) as handle:
        sheet.save(handle, "PNG")
    result["contact_sheet"] = str(output)
    return [f"Contact sheet: {output}"]


@command.command("init")
@click.argument("images", type=click.Path(path_type=Path))
@click.argument("targets", nargs=-1, required=True)
@click.option("--kind", "kinds", multiple=True, metavar="TASK=KIND", help="Kind of a task, if the guess is wrong.")
@options.folder(Path("data.yaml"), "Manifest to write; the table of images is written next to it, as .csv.")
@click.option("--overwrite", is_flag=True, help="Replace the manifest if it exists.")
@options.as_json
def init_command(
    images: Path, targets: tuple[str, ...], kinds: tuple[str, ...], output: Path, overwrite: bool, as_json: bool
) -> None:
    """Draft the manifest of a dataset from a folder of IMAGES and the folders of its TARGETS.

    Each of TARGETS is a folder, whose name is the name of the task, or TASK=FOLDER. A target belongs to the image of
    the same name. Splits, kinds, units and ignored values are guessed, and every guess is printed.

    Example: simomerge data init photos/ masks/ depth/ -o data.yaml
    """
    from simomerge.core.errors import InputError
    from simomerge.core.files import check_absent
    from simomerge.datasets.check import check
    from simomerge.datasets.draft import draft_manifest, write_draft
    from simomerge.datasets.manifest import read_manifest

    if output.suffix not in (".yaml", ".yml"):
        raise InputError(f"{output}: a manifest ends in .yaml; name it so, such as data.yaml.")
    check_absent(output, overwrite)
    folders: dict[str, Path] = {}
    for text in targets:
        name, equals, folder = text.partition("=")
        path = Path(folder if equals else text)
        task = name if equals else path.resolve().name.replace("-", "_")
        if task in folders:
            raise InputError(f"two folders of {task!r}: {folders[task]} and {path}; name them as TASK=FOLDER.")
        folders[task] = path
    with console():
        draft = draft_manifest(images, folders, output.resolve().parent, options.parse_pairs(kinds, "TASK=KIND"))
        write_draft(draft, output, overwrite)
        problems = check(read_manifest(output)).problems
    plain = {"manifest": str(output), "images": len(draft.rows), "tasks": draft.tasks, "notes": draft.notes}
    lines = [*draft.notes, f"Manifest of {len(draft.rows)} images: {output}"]
    lines += [f"To fix ({len(problems)}):", *(f"  {problem}" for problem in problems)] if problems else []
    say(as_json, {**plain, "problems": problems}, *lines, next_step("data", "check", output))


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
