"""Refuse configurations of transformers that name another model, which transformers or timm would fetch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simomerge.core.errors import InputError
from simomerge.core.text import shown

_OF_TIMM = ("timm_backbone", "timm_wrapper")
"""Model types whose entries name a model of timm, which may be one on the hub."""


def check_no_other_model(where: str | Path, config: Any) -> None:
    """Raise InputError if a configuration, or one inside it, names another model instead of describing it.

    Args:
        where: What the message begins with, usually the file.
        config: The configuration as plain data, before transformers reads it.
    """
    if isinstance(config, (list, tuple)):
        for inner in config:
            check_no_other_model(where, inner)
    if not isinstance(config, Mapping):
        return
    for key, value in config.items():
        names = key == "backbone" and isinstance(value, str) and value
        if names or (key == "use_pretrained_backbone" and value) or (key == "model_type" and value in _OF_TIMM):
            raise InputError(
                f"{where}: {key} is {shown(value)}, so another model would be fetched. Nothing is fetched for a file:"
                " give a model that describes its whole encoder, as in backbone_config."
            )
        check_no_other_model(where, value)
