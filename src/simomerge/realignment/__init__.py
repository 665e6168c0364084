"""Re-alignment: repair the mismatch between merged features and the experts' heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from simomerge.errors import InputError
from simomerge.model import SimoModel
from simomerge.progress import Progress, silent
from simomerge.realignment.adapters import ADAPTER_SETTINGS, realign_adapters
from simomerge.realignment.heads import HEAD_SETTINGS, realign_heads

REALIGNMENTS: dict[str, Callable[..., SimoModel]] = {"heads": realign_heads, "adapters": realign_adapters}
"""Every re-alignment by name; each takes a model and data and returns a new model."""


def realign(
    model: SimoModel, data: Any, method: str = "heads", progress: Progress = silent, **options: Any
) -> SimoModel:
    """Re-align a merged model; see `realign_heads` and `realign_adapters` for the options.

    Raises:
        InputError: an unknown method, or what the method refuses.

    Example:
        >>> model = realign(model, load_data("rooms", split="val"), "heads")     # doctest: +SKIP
    """
    if method not in REALIGNMENTS:
        raise InputError(f"unknown re-alignment {method!r}; choose one of: {', '.join(REALIGNMENTS)}.")
    if not model.tasks:
        raise InputError("the model has no heads to re-align; give a merged model.")
    return REALIGNMENTS[method](model, data, progress=progress, **options)


__all__ = [
    "ADAPTER_SETTINGS",
    "HEAD_SETTINGS",
    "REALIGNMENTS",
    "realign",
    "realign_adapters",
    "realign_heads",
]
