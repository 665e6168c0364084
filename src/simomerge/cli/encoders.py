"""simomerge encoders"""

from __future__ import annotations

import click

from simomerge.cli.options import json_option, say


@click.command("encoders")
@json_option
def command(as_json: bool) -> None:
    """List the encoder families that can serve as a base.

    A base is a hub id, or a folder with config.json and model.safetensors. Heads read the BLOCKS of a plain transformer
    (all with one stride) or the STAGES of a pyramid (strides 4 to 32). Other plain vision transformers of the
    transformers library also work if their blocks can be found.
    """
    from simomerge.models.encoders.families import FAMILIES

    rows = [
        {"title": f.title, "model_types": list(f.model_types), "taps": f.taps, "example": f.example} for f in FAMILIES
    ]
    wide = max(len(family.title) for family in FAMILIES)
    lines = [f"{f.title:<{wide}}  {f.taps:<6}  {', '.join(f.model_types):<27}  e.g. {f.example}" for f in FAMILIES]
    say(as_json, {"encoders": rows}, *lines)
