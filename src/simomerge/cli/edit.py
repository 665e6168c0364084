"""simomerge edit"""

from __future__ import annotations

from pathlib import Path

import click

from simomerge.cli.options import check_output, console, json_option, output_option, overwrite_option, parse_pairs, say


@click.command("edit")
@click.argument("model")
@click.option("--base", required=True, help="The base of MODEL.")
@click.option("--add", multiple=True, metavar="TASK=EXPERT", help="A task to add; may be repeated.")
@click.option("--remove", multiple=True, metavar="TASK=EXPERT", help="A task to remove; may be repeated.")
@click.option(
    "--expert",
    "others",
    multiple=True,
    metavar="TASK=EXPERT",
    help="An expert that stays, for methods that need it; may be repeated.",
)
@output_option()
@overwrite_option
@json_option
def command(
    model: str,
    base: str,
    add: tuple[str, ...],
    remove: tuple[str, ...],
    others: tuple[str, ...],
    output: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Add tasks to a merged MODEL or remove some, with the merge method and parameters recorded in it.

    Task arithmetic and averages need no other expert. All other methods merge again, and need each expert that stays as
    --expert.

    \b
    simomerge edit runs/scene --base rooms-base --add edges=runs/edges -o runs/scene-2
    """
    check_output(output, overwrite)
    added, removed, staying = (parse_pairs(given) for given in (add, remove, others))
    from simomerge.merging.disk.edit import edit_on_disk

    with console():
        result = edit_on_disk(model, base, output, added, removed, staying, overwrite=overwrite)
    say(
        as_json,
        {"output": str(output), "tasks": list(result.tasks), "merge": result.merge},
        f"Merged {', '.join(result.tasks)} by {result.merge['method']}, as {model} was.",
        f"Model: {output}",
        f"Next: simomerge realign {output} -o {output}-realigned   (the heads no longer fit)",
    )
