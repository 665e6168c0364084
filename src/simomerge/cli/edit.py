"""simomerge edit"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from simomerge.cli import options
from simomerge.cli.next_step import next_step, realign_step, recorded_experts
from simomerge.cli.output import console, say
from simomerge.cli.trees import naming, read_share, stored_dtype
from simomerge.core.errors import InputError


def _removed(context: click.Context, option: Any, given: Sequence[str]) -> dict[str, str | None]:
    """By task the expert, or None where only the task is given."""
    alone = [each for each in given if "=" not in each]
    return {**dict.fromkeys(alone), **options.parse_pairs([each for each in given if each not in alone])}


@click.command("edit")
@click.argument("model", type=options.place)
@click.option("--base", type=options.place, required=True, help="The base of MODEL.")
@options.pairs("--add", "added", "A task to add; may be repeated.")
@click.option(
    "--remove",
    "removed",
    multiple=True,
    metavar="TASK[=EXPERT]",
    callback=_removed,
    help="A task to remove, with its expert where the method needs it; may be repeated.",
)
@options.pairs("--expert", "staying", "An expert that stays, for methods that need it; may be repeated.")
@options.pictures
@click.option("--share", metavar="TREE", help="The new tree of a MODEL with shared and own blocks, as for `merge`.")
@options.trust_code
@options.output()
def command(model: str, base: str, output: Path, overwrite: bool, as_json: bool, **given: Any) -> None:
    """Add tasks to a merged MODEL or remove some, with the merge method and parameters recorded in it.

    Task arithmetic and averages need the experts that come and go, and no other. All other methods merge again, and
    need each expert that stays as --expert. So does a MODEL with shared and own blocks, whose branches are fitted again
    on --images.

    \b
    simomerge edit runs/scene --base rooms-base --add edges=runs/edges -o runs/scene-2
    """
    from simomerge.checkpoints import read_description
    from simomerge.merging.disk.edit import edit_on_disk

    experts = {name: given[name] for name in ("added", "removed", "staying")}
    if _has_tree(model):
        _edit_tree(model, base, output, overwrite, as_json, **given)
        return
    if given["share"] or given["images"]:
        raise InputError(f"{model}: its tasks share one encoder, so --share and --images do not apply; leave them out.")
    with console():
        result = edit_on_disk(
            model, base, output, experts["added"], experts["removed"], experts["staying"], overwrite=overwrite
        )
    recorded = read_description(output)["provenance"]["experts"]
    known = recorded_experts(model, result.tasks, recorded, {**experts["staying"], **experts["added"]})
    absent = ", ".join(task for task in result.tasks if task not in known)
    say(
        as_json,
        {"output": str(output), "tasks": list(result.tasks), "merge": result.merge},
        f"Merged {', '.join(result.tasks)} by {result.merge['method']}, as {model} was.",
        f"Model: {output}",
        realign_step(output, known, base, None)
        if not absent
        else f"The heads no longer fit. `simomerge realign` repairs them; it needs the experts of {absent} too.",
    )


def _has_tree(model: str) -> bool:
    """Whether this is the folder of a model with shared and own blocks."""
    from simomerge.checkpoints import read_description
    from simomerge.checkpoints.description import FILE
    from simomerge.core.hub import local_source

    folder = Path(local_source(model))
    return (folder / FILE).is_file() and bool(read_description(folder)["encoder"].get("tree"))


def _edit_tree(model: str, base: str, output: Path, overwrite: bool, as_json: bool, **given: Any) -> None:
    """Edit a model with shared and own blocks."""
    from simomerge.assembly.experts import load_experts
    from simomerge.assembly.sharing.edit import edit_tree
    from simomerge.checkpoints import open_checkpoint
    from simomerge.cli.merge import tree_lines
    from simomerge.core.files import check_absent, check_apart
    from simomerge.core.hub import local_source
    from simomerge.models.model import load

    check_absent(output, overwrite)
    if given["images"] is None:
        raise InputError(f"{model}: its branches are fitted on images without labels: give --images FOLDER.")
    place, tree = ("", None) if given["share"] is None else read_share(given["share"])
    experts = {**given["staying"], **given["added"]}
    removed = [path for path in given["removed"].values() if path is not None]
    check_apart(output, [base, *experts.values(), *removed])
    with console():
        merged, foundation, loaded = load(model), load(base), load_experts(**experts)
        how = {"remove": list(given["removed"]), "share": tree, "size": given["size"]}
        with naming(place):
            edited = edit_tree(merged, foundation, loaded, given["images"], **how)
        stored = stored_dtype([open_checkpoint(Path(local_source(model)) / "encoder")])
        edited.save_pretrained(output, overwrite, stored)
    made = edited.provenance["merge"]
    say(
        as_json,
        {"output": str(output), "tasks": list(edited.tasks), "merge": made},
        f"Merged {', '.join(edited.tasks)} by {made['method']}, as {model} was.",
        *tree_lines(made),
        f"Model: {output}",
        next_step("inspect", output),
    )
