"""simomerge edit"""

from __future__ import annotations

from pathlib import Path

import click

from simomerge.cli import options
from simomerge.cli.output import console, say


@click.command("edit")
@click.argument("model")
@click.option("--base", required=True, help="The base of MODEL.")
@options.pairs("--add", "added", "A task to add; may be repeated.")
@options.pairs("--remove", "removed", "A task to remove; may be repeated.")
@options.pairs("--expert", "staying", "An expert that stays, for methods that need it; may be repeated.")
@options.output()
def command(model: str, base: str, output: Path, overwrite: bool, as_json: bool, **experts: dict[str, str]) -> None:
    """Add tasks to a merged MODEL or remove some, with the merge method and parameters recorded in it.

    Task arithmetic and averages need no other expert. All other methods merge again, and need each expert that stays as
    --expert.

    \b
    simomerge edit runs/scene --base rooms-base --add edges=runs/edges -o runs/scene-2
    """
    from simomerge.core.files import explain_lost_pages
    from simomerge.merging.disk.edit import edit_on_disk

    explain_lost_pages()
    with console():
        result = edit_on_disk(
            model, base, output, experts["added"], experts["removed"], experts["staying"], overwrite=overwrite
        )
    known = {**experts["staying"], **experts["added"]}
    pairs = " ".join(f"{task}={known.get(task, 'EXPERT')}" for task in result.tasks)
    say(
        as_json,
        {"output": str(output), "tasks": list(result.tasks), "merge": result.merge},
        f"Merged {', '.join(result.tasks)} by {result.merge['method']}, as {model} was.",
        f"Model: {output}",
        f"Next: simomerge realign {output} {pairs} --images FOLDER -o {output}-folded   # the heads no longer fit",
    )
