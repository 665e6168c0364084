"""simomerge import"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from simomerge.cli.options import check_output, json_option, output_option, overwrite_option, parse_pairs, say
from simomerge.core.errors import InputError


@click.command("import")
@click.argument("source")
@click.option("--task", required=True, help="What the expert's task is called.")
@click.option("--kind", default="", help="Kind of the task, where its name does not say it.")
@click.option("--classes", default="", metavar="A,B,...", help="Class names of a segmentation.")
@click.option("--encoder", metavar="BASE", help="Weight files: the encoder they fine-tuned, a folder or hub id.")
@click.option("--encoder-prefix", default="", metavar="PREFIX", help="Of the encoder's tensors, such as backbone.")
@click.option("--head-prefix", default="", metavar="PREFIX", help="Of the head's tensors, such as decode_head.")
@click.option("--head", default="", metavar="CLASS", help="module:Class, linear, dpt or transformers.")
@click.option("--head-arg", "head_args", multiple=True, metavar="KEY=JSON", help="Argument of the head's class.")
@click.option("--drop", multiple=True, metavar="PREFIX", help="Tensors that are not needed.")
@click.option("--taps", default="", metavar="3,6,9,12", help="Blocks (or stages) that the head reads.")
@click.option("--layernorm/--no-layernorm", default=None, help="Whether it reads them through the final layer norm.")
@click.option("--mean", default="", metavar="R,G,B", help="Of a weight file's images; the encoder's by default.")
@click.option("--std", default="", metavar="R,G,B", help="The same, standard deviation.")
@output_option()
@overwrite_option
@json_option
def command(
    source: str,
    task: str,
    classes: str,
    head_args: tuple[str, ...],
    taps: str,
    layernorm: bool | None,
    mean: str,
    std: str,
    output: Path,
    overwrite: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Make an expert of SOURCE, a model that was trained elsewhere.

    \b
    SOURCE is
      a folder or hub id of transformers' Depth Anything or DPT
      a head of DINOv2's own, such as dinov2_vitb14_nyu_linear4_head.pth (with --encoder)
      any other weight file: --encoder, --encoder-prefix, --head-prefix and --head say whose its tensors are
    """
    check_output(output, overwrite)
    from simomerge.models.importing import import_expert
    from simomerge.models.importing.predictions import largest_difference, source_model

    expert = import_expert(
        source,
        task,
        classes=tuple(filter(None, classes.split(","))),
        head_settings={name: _json(value) for name, value in parse_pairs(head_args, "KEY=JSON").items()},
        taps=_numbers("taps", taps, int, "3,6,9,12"),
        mean=_numbers("mean", mean, float, "0.5,0.5,0.5"),
        std=_numbers("std", std, float, "0.5,0.5,0.5"),
        apply_layernorm=layernorm,
        **given,
    )
    original = None if Path(source).is_file() else source_model(source)
    difference = largest_difference(expert, original) if original is not None else None
    if difference and difference[0] > TOLERANCE * difference[1]:
        raise InputError(
            f"{source}: the import would differ from it by {difference[0]:.1e} where its predictions reach"
            f" {difference[1]:.2g}; nothing was written. This is a mistake of simomerge's, please report it."
        )
    expert.save_pretrained(output, overwrite=overwrite)
    described = expert.tasks[task]
    lines = [
        f"{output}: {described.kind} of {described.channels} channels, taps {list(expert.encoder.taps)} of"
        f" {type(expert.encoder.backbone).__name__}.",
        f"Its predictions differ from the source's by at most {difference[0]:.1e} (they reach {difference[1]:.2g})."
        if difference
        else "There is no model to compare its predictions with: look at some with `simomerge predict`.",
        f"Next: simomerge merge BASE {task}={output} OTHER=... -o OUT",
    ]
    said = {"output": str(output), "task": described.to_dict(), "taps": list(expert.encoder.taps)}
    say(as_json, {**said, "largest_difference": difference[0] if difference else None}, *lines)


TOLERANCE = 1e-3
"""How far an import may be from its source, in parts of the largest prediction: rounding, and no more."""


def _numbers(name: str, text: str, kind: Any, example: str) -> list[Any] | None:
    try:
        return [kind(part) for part in text.split(",")] if text else None
    except ValueError as error:
        raise InputError(f"--{name} {text}: give numbers, as {example}.") from error


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
