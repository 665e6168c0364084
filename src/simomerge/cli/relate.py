"""simomerge relate"""

from __future__ import annotations

from typing import Any

import click

from simomerge.cli import options
from simomerge.cli.next_step import next_step, pairs
from simomerge.cli.output import Table, console, say
from simomerge.core.errors import InputError


@click.command("relate")
@options.base
@options.experts
@options.pictures
@click.option("--data", help="Labelled data instead of --images: rooms, NAME:FOLDER or a manifest.")
@click.option("--split", default="val", show_default=True, help="Split of the data; do not use the one you report on.")
@click.option(
    "--count",
    type=click.IntRange(16),
    help="Number of images: half to merge on, half to judge. [default: 128; 256 with labels]",
)
@click.option("--budget", type=click.IntRange(1), help="Maximum number of encoders. [default: answer every budget]")
@click.option("--merged", metavar="MODEL", help="Also measure how well this merge of the experts aligns with them.")
@click.option(
    "--sections",
    help="Some of groups,sweeps,geometry,cka,alignment,sharing. geometry needs no images."
    " [default: all that the inputs allow, but not sharing]",
)
@options.trust_code
@options.output(required=False, model=False)
def command(base: str, experts: dict[str, str], as_json: bool, **given: Any) -> None:
    """Measure which tasks help or hurt each other, which are sensitive, and which of the EXPERTs to merge.

    With --images, the predictions of the experts judge the merges; with --data, labels do. OUT gets relate.json, the
    figures and a page. docs/relations.md explains each number.

    \b
    simomerge relate rooms-base depth=runs/depth normals=runs/normals edges=runs/edges --images photos/ --budget 2
    simomerge relate rooms-base depth=runs/depth normals=runs/normals --data rooms -o runs/related
    simomerge relate rooms-base depth=runs/depth normals=runs/normals --sections geometry
    """
    _check(experts, given)
    from simomerge.relations import verdict
    from simomerge.relations.page import relation_tables, write_relations

    output, budget = given["output"], given["budget"]
    found = _measure(base, experts, given)
    if budget is not None:
        found |= {"budget": budget, "verdict": verdict(found, budget)}
    page = write_relations(output, found) if output is not None else None
    shown: list[str | Table] = [*verdict(found, budget), ""]
    for heading, (head, *rows) in relation_tables(found, budget):
        shown += [*([heading] if heading else []), Table(head, rows), ""]
    if judge := found["judged_by"]:
        shown.append(f"Judged by {judge}, on {found['judged_images']} of {found['images']} images.")
    if page:
        shown.append(f"Page: {page}")
    shown.append(_next(base, experts, found, given))
    say(as_json, {**found, **({"output": str(output)} if output else {})}, *shown)


def _check(experts: dict[str, str], given: dict[str, Any]) -> None:
    """Reject options that contradict each other, and a folder of images that does not exist."""
    if given["images"] is not None and given["data"] is not None:
        raise InputError("--images and --data exclude each other: give pictures, or data with labels.")
    if given["size"] is not None and given["images"] is None:
        raise InputError("--size requires --images; the images of a dataset have their own size.")
    if len(experts) < 2:
        raise InputError("1 expert: to relate tasks takes at least two; give each as TASK=EXPERT.")
    if given["budget"] is not None and given["budget"] > len(experts):
        raise InputError(
            f"--budget {given['budget']}: {len(experts)} experts need no more than {len(experts)} encoders."
        )
    options.check_images(given["images"])


def _measure(base: str, experts: dict[str, str], given: dict[str, Any]) -> dict[str, Any]:
    """Load the models and the images, and measure the sections."""
    from simomerge.assembly.experts import load_experts
    from simomerge.datasets import load_data
    from simomerge.models.model import load
    from simomerge.relations import check_sections, relate

    images, data, merged = given["images"], given["data"], given["merged"]
    # With few labels, the expert's own errors hide the differences between merges.
    count = (256 if data is not None else 128) if given["count"] is None else given["count"]
    names = [name.strip() for name in given["sections"].split(",")] if given["sections"] else None
    sections = check_sections(names, images is not None or data is not None, merged is not None)
    if given["budget"] is not None and "groups" not in sections:
        curve = " Without --budget, the section 'sharing' answers every cost." if "sharing" in sections else ""
        raise InputError(
            "--budget requires the section 'groups', which uses images: give --images or --data, and"
            f" --sections groups,{','.join(sections)}.{curve}"
        )
    dataset = load_data(data, split=given["split"], count=count, tasks=list(experts)) if data is not None else None
    options.note_images(images, given["count"])
    if dataset is not None:
        options.note_count(given["count"], len(dataset), f"{data} ({given['split']})")
    foundation = load(base)
    if foundation.tasks:
        raise InputError(
            f"{base} is a model with heads ({', '.join(foundation.tasks)}); first give the base that the experts were"
            " fine-tuned from, and give a merged model as --merged MODEL."
        )
    model = load(merged) if merged is not None else None
    with console():
        loaded, size = load_experts(**experts), given["size"]
        return relate(foundation, loaded, images, dataset, model, sections, count, size=size).to_dict()


def _next(base: str, experts: dict[str, str], found: dict[str, Any], given: dict[str, Any]) -> str:
    """The command that makes the first merge of the answer, as a line. A curve decides before groups do."""
    from simomerge.relations.curve import recommended_tree

    budget, images = given["budget"], given["images"] or given["data"]
    curve: list[Any] = found.get("sharing", []) if budget != 1 else []
    tree = recommended_tree(found, budget) if curve else None
    members, chosen = list(experts), ["--method", "auto"] if images else []  # auto chooses on images
    if tree is not None and tree is not curve[0]:
        chosen = ["--share", tree["tree"], "--scale", "auto"]  # the scale that the curve has
    elif curve and tree is None:
        chosen += ["--minutes", "10"]  # to distil the merge
    elif not curve and "groups" in found:
        members = max(found["groups"]["choices"][(budget or 1) - 1]["groups"], key=len)
    if len(members) == 1:
        return "Keep the experts: under this budget no merge is better than none."
    chosen += ["--size", given["size"]] if given["size"] else []
    chosen = [*chosen, "--images", images] if images else []
    return next_step("merge", base, *pairs({task: experts[task] for task in members}), *chosen, "-o", "merged")
