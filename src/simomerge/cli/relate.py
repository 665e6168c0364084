"""simomerge relate"""

from __future__ import annotations

from pathlib import Path

import click

from simomerge.cli.options import (
    check_output,
    console,
    images_option,
    json_option,
    output_option,
    overwrite_option,
    parse_pairs,
    say,
    size_option,
)
from simomerge.core.errors import InputError


@click.command("relate")
@click.argument("base")
@click.argument("experts", nargs=-1, required=True, metavar="TASK=EXPERT...")
@images_option
@size_option
@click.option("--data", help="Labelled data instead: rooms, NAME:FOLDER or a manifest; its labels judge.")
@click.option("--split", default="val", show_default=True, help="Of the data; never the one that is reported on.")
@click.option(
    "--count",
    type=click.IntRange(8),
    help="Images, half to merge on, half to judge: 128, or 256 labelled ones, by default.",
)
@click.option("--budget", type=click.IntRange(1), help="Encoders at most; by default every budget is answered.")
@click.option("--merged", metavar="MODEL", help="A model merged from these experts: how well it is aligned with them.")
@click.option(
    "--sections",
    help="Some of groups,sweeps,geometry,cka,alignment; by default all that can be. geometry looks at no image.",
)
@output_option(required=False)
@overwrite_option
@json_option
def command(
    base: str,
    experts: tuple[str, ...],
    images: str | None,
    size: str | None,
    data: str | None,
    split: str,
    count: int | None,
    budget: int | None,
    merged: str | None,
    sections: str | None,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Say which tasks help or hurt each other, which are sensitive, and which of the EXPERTs to merge.

    With --images the experts' own predictions judge, with --data labels do. OUT gets relate.json, the figures and a
    page. docs/relations.md says what each number means.

    \b
    simomerge relate rooms-base depth=runs/depth normals=runs/normals edges=runs/edges --images photos/ --budget 2
    simomerge relate rooms-base depth=runs/depth normals=runs/normals --data rooms -o runs/related
    simomerge relate rooms-base depth=runs/depth normals=runs/normals --sections geometry
    """
    named = parse_pairs(experts)
    if output is not None:
        check_output(output, overwrite)
    if images is not None and data is not None:
        raise InputError("--images and --data exclude each other: give pictures, or data with labels.")
    if size is not None and images is None:
        raise InputError("--size is of --images; a dataset's images have their own size.")
    if len(named) < 2:
        raise InputError("1 expert: how tasks relate takes at least two; give each as TASK=EXPERT.")
    if budget is not None and budget > len(named):
        raise InputError(f"--budget {budget}: {len(named)} experts need no more than {len(named)} encoders.")
    from simomerge.assembly.experts import load_experts
    from simomerge.datasets import load_data
    from simomerge.datasets.pictures import as_images
    from simomerge.models.model import load
    from simomerge.relations import check_sections, relate, verdict
    from simomerge.relations.page import relation_lines, write_relations

    # Where few labels judge, an error of the expert's own counts much with every model.
    count = count or (256 if data is not None else 128)
    sees = images is not None or data is not None
    chosen = check_sections(
        [name.strip() for name in sections.split(",")] if sections else None, sees, merged is not None
    )
    if budget is not None and "groups" not in chosen:
        raise InputError("--budget is of the section 'groups', which looks at images: give --images or --data.")
    pictures = as_images(images, count, size) if images is not None else None
    dataset = load_data(data, split=split, count=count, tasks=list(named)) if data is not None else None
    foundation = load(base)
    if foundation.tasks:
        raise InputError(
            f"{base} is a model with heads ({', '.join(foundation.tasks)}); give the base that the experts were"
            " fine-tuned from first, and a merged model as --merged MODEL."
        )
    model = load(merged) if merged is not None else None
    with console():
        found = relate(foundation, load_experts(**named), pictures, dataset, model, chosen, count).to_dict()
    if budget is not None:
        found |= {"budget": budget, "verdict": verdict(found, budget)}
    page = write_relations(output, found) if output is not None else None
    by = found["judged_by"]
    say(
        as_json,
        {**found, **({"output": str(output)} if output else {})},
        *verdict(found, budget),
        "",
        *relation_lines(found, budget),
        "",
        *([f"Judged by {by}, on half of {found['images']} images."] if by else []),
        *([f"Page: {page}"] if page else []),
        f"Next: {_next(base, named, found, budget)}",
    )


def _next(base: str, experts: dict[str, str], found: dict[str, object], budget: int | None) -> str:
    """The command that makes the first merge of the answer."""
    groups: object = found.get("groups")
    members = list(experts)
    if isinstance(groups, dict):
        choice = groups["choices"][(budget or 1) - 1]
        members = max(choice["groups"], key=len)
    pairs = " ".join(f"{task}={experts[task]}" for task in members)
    if len(members) == 1:
        return "keep the experts: under this budget no merge is better than none."
    return f"simomerge merge {base} {pairs} --method auto --images FOLDER -o OUT"
