"""simomerge import"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from simomerge.cli import options
from simomerge.cli.next_step import next_step
from simomerge.cli.output import say
from simomerge.core.errors import InputError

TOLERANCE = 1e-3
"""Maximum difference from the source's predictions, relative to the largest one; rounding stays well below it."""


def _list_of(kind: type) -> Callable[..., tuple[Any, ...] | None]:
    """A callback that parses values separated by commas; None if the option is not given."""

    def parse(context: click.Context, option: Any, text: str | None) -> tuple[Any, ...] | None:
        try:
            return tuple(kind(part) for part in text.split(",") if part) if text else None
        except ValueError as error:
            raise InputError(f"{option.opts[0]} {text}: give numbers, as {option.metavar}.") from error

    return parse


def _settings(context: click.Context, option: Any, pairs: tuple[str, ...]) -> dict[str, Any]:
    """KEY=JSON pairs; a value that is not JSON is text."""
    given: dict[str, Any] = {**options.parse_pairs(pairs, "KEY=JSON")}
    for name, text in given.items():
        with suppress(ValueError):
            given[name] = json.loads(text)
    return given


@click.command("import")
@click.argument("source", type=options.place)
@click.option("--task", required=True, help="Name of the expert's task.")
@click.option("--kind", help="Kind of the task. [default: its name]")
@click.option("--classes", callback=_list_of(str), metavar="A,B,...", help="Class names of a segmentation.")
@click.option(
    "--encoder", metavar="BASE", help="The encoder that a weight file or adapter fine-tuned: a folder or hub id."
)
@click.option("--encoder-prefix", metavar="PREFIX", help="Prefix of the encoder's tensors, such as 'backbone.'")
@click.option("--head-prefix", metavar="PREFIX", help="Prefix of the head's tensors, such as 'decode_head.'")
@click.option("--head", metavar="CLASS", help="module:Class, conv, linear, dpt, binned-depth or transformers.")
@click.option(
    "--head-arg",
    "head_settings",
    multiple=True,
    callback=_settings,
    metavar="KEY=JSON",
    help="Argument of the head; may be repeated.",
)
@click.option("--drop", multiple=True, metavar="PREFIX", help="Prefix of tensors to ignore; may be repeated.")
@click.option("--taps", callback=_list_of(int), metavar="3,6,9,12", help="Blocks or stages the head reads.")
@click.option(
    "--layernorm/--no-layernorm",
    "apply_layernorm",
    default=None,
    help="Whether the layer norm is applied to the features that the head reads.",
)
@click.option("--mean", callback=_list_of(float), metavar="0.5,0.5,0.5", help="RGB mean. [default: the encoder's]")
@click.option("--std", callback=_list_of(float), metavar="0.5,0.5,0.5", help="RGB standard deviation.")
@click.option("--size", metavar="HEIGHTxWIDTH", help="Size of its training images, to which photos are resized later.")
@options.trust_code
@options.output()
def command(source: str, task: str, output: Path, overwrite: bool, as_json: bool, **given: Any) -> None:
    """Import SOURCE, a model that was trained elsewhere, as an expert.

    \b
    SOURCE is
      a folder or hub id of transformers' Depth Anything or DPT
      a head that DINOv2 publishes, such as dinov2_vitb14_nyu_linear4_head.pth (with --encoder)
      any other weight file: --encoder, --encoder-prefix, --head-prefix and --head describe its tensors;
        FILE::KEY is one of several sets of weights in a training file
      a peft LoRA adapter with a head in it: --encoder is its base, --head-prefix and --head describe the head
    """
    from simomerge.core.files import check_apart
    from simomerge.models.importing import import_expert, transformers

    check_apart(output, [source, *([given["encoder"]] if given["encoder"] else [])], inside=False)
    expert = import_expert(source, task, **{key: value for key, value in given.items() if value is not None})
    how = expert.provenance["imported"]["as"]
    original = transformers.source_model(source) if how in transformers.ARCHITECTURES else None
    difference = transformers.largest_difference(expert, original) if original is not None else None
    if difference and difference[0] > TOLERANCE * difference[1]:
        raise InputError(
            f"{source}: the import would differ from it by {difference[0]:.1e}, with predictions up to"
            f" {difference[1]:.2g}; nothing was written. This is an error in simomerge, please report it."
        )
    expert.save_pretrained(output, overwrite=overwrite)
    described, taps = expert.tasks[task], list(expert.encoder.taps)
    result = {"output": str(output), "task": described.to_dict(), "taps": taps}
    say(
        as_json,
        {**result, "largest_difference": difference[0] if difference else None},
        f"{output}: {described.kind} of {described.channels} channels, taps {taps} of"
        f" {type(expert.encoder.backbone).__name__}.",
        f"Its predictions differ from the source's by at most {difference[0]:.1e} (they reach {difference[1]:.2g})."
        if difference
        else "There is no model to compare its predictions with: look at some with `simomerge predict`.",
        next_step("inspect", output, comment="then merge it with experts of other tasks: simomerge merge --help"),
    )
