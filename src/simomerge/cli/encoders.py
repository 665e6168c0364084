"""simomerge encoders"""

from __future__ import annotations

import click

from simomerge.cli import options
from simomerge.cli.output import Table, say


@click.command("encoders")
@options.as_json
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
    table = [(f.title, f.taps, ", ".join(f.model_types), f.example) for f in FAMILIES]
    say(as_json, {"encoders": rows}, Table(("family", "heads read", "model types", "example"), table))
