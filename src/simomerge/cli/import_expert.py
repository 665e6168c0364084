"""simomerge import"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from simomerge.cli.options import check_output, json_option, output_option, overwrite_option, parse_parameters, say
from simomerge.errors import InputError


@click.command("import")
@click.argument("source")
@click.option("--task", required=True, help="What the expert's task is called.")
@click.option("--kind", default="", help="Kind of the task, where its name does not say it.")
@click.option("--classes", default="", metavar="A,B,...", help="Class names of a segmentation.")
@click.option("--encoder", metavar="BASE", help="Weight files: the encoder they fine-tuned, a folder or hub id.")
@click.option("--encoder-prefix", default="", metavar="PREFIX", help="Of the encoder's tensors, such as backbone.")
@click.option("--head-prefix", default="", metavar="PREFIX", help="Of the head's tensors, such as decode_head.")
@click.option("--head", default="", metavar="CLASS", help="module:Class of the head, or linear or dpt.")
@click.option("--head-arg", "head_args", multiple=True, metavar="KEY=VALUE", help="Argument of the head's class.")
@click.option("--drop", multiple=True, metavar="PREFIX", help="Tensors that are not needed.")
@click.option("--taps", default="", metavar="3,6,9,12", help="Blocks (or stages) that the head reads.")
@click.option("--layernorm/--no-layernorm", default=None, help="Whether it reads them through the final layer norm.")
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
    from simomerge.sources import import_expert
    from simomerge.sources.predictions import largest_difference, source_model

    expert = import_expert(
        source,
        task,
        classes=tuple(filter(None, classes.split(","))),
        head_settings=parse_parameters(head_args),
        taps=_numbers(taps),
        apply_layernorm=layernorm,
        **given,
    )
    original = None if Path(source).is_file() else source_model(source)
    difference = largest_difference(expert, original) if original is not None else None
    expert.save_pretrained(output, overwrite=overwrite)
    described = expert.tasks[task]
    lines = [
        f"{output}: {described.kind} of {described.channels} channels, taps {list(expert.encoder.taps)} of"
        f" {type(expert.encoder.backbone).__name__}.",
        f"Its predictions differ from the source's by at most {difference[0]:.1e} (they reach {difference[1]:.2g})."
        if difference
        else "Its source's own code is not here to compare predictions with: look at one with `simomerge predict`.",
        f"Next: simomerge merge BASE {task}={output} OTHER=... -o OUT",
    ]
    said = {"output": str(output), "task": described.to_dict(), "taps": list(expert.encoder.taps)}
    say(as_json, {**said, "largest_difference": difference[0] if difference else None}, *lines)


def _numbers(text: str) -> list[int] | None:
    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError as error:
        raise InputError(f"--taps {text}: give whole numbers, as 3,6,9,12.") from error
