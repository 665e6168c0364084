"""simomerge encoders"""

from __future__ import annotations

import click

from simomerge.cli.options import json_option, say


@click.command("encoders")
@json_option
def command(as_json: bool) -> None:
    """List the families of encoders that can be a base.

    Give a hub id or a folder with config.json and model.safetensors. Heads read BLOCKS of a plain transformer (all of
    one stride) or STAGES of a pyramid (strides 4 to 32). Another plain vision transformer of transformers works too
    where its blocks are found.
    """
    from simomerge.models.encoders.families import FAMILIES

    rows = [
        {"title": f.title, "model_types": list(f.model_types), "taps": f.taps, "example": f.example} for f in FAMILIES
    ]
    wide = max(len(family.title) for family in FAMILIES)
    lines = [f"{f.title:<{wide}}  {f.taps:<6}  {', '.join(f.model_types):<27}  e.g. {f.example}" for f in FAMILIES]
    say(as_json, {"encoders": rows}, *lines)
