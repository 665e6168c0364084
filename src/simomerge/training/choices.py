"""Names that commands and recipes offer, each with the place of its code, so that listing them imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from simomerge.core.errors import InputError

WEIGHTINGS = {
    "equal": "training.weighting:Weighting",
    "uncertainty": "training.weighting:Uncertainty",
    "dwa": "training.weighting:DynamicAverage",
    "random": "training.weighting:RandomWeights",
    "gradnorm": "training.weighting:GradNorm",
    "pcgrad": "training.weighting:PCGrad",
    "cagrad": "training.weighting:CAGrad",
    "nash": "training.weighting:NashMTL",
}
"""Loss weightings of joint training. To add one, add a line here."""

AUGMENTATIONS = {
    "none": "",
    "flip": "datasets.base:random_flip",
    "scale-crop-flip": "datasets.augment:augment",
}
"""Augmentations of training images and their targets. The last is the paper's."""

TRACKERS = ("tensorboard", "wandb", "trackio")
"""Experiment trackers that training can report to."""


def find(what: str, table: Mapping[str, str], name: str) -> Any:
    """The class or function ``name`` of a table in this module; None if its place is empty.

    Raises:
        InputError: The name is unknown.

    Example:
        >>> find("loss weighting", WEIGHTINGS, "equal")(tasks=2)
        Weighting()
    """
    if name not in table:
        raise InputError(f"unknown {what} {name!r}; choose one of: {', '.join(table)}.")
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(f"simomerge.{module}"), attribute) if module else None
