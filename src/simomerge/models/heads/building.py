"""Heads by name: build one, and name the kind of one."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from simomerge.core.classes import class_path, make
from simomerge.core.errors import InputError
from simomerge.core.registry import suggestion
from simomerge.models.encoders import Encoder

HEADS: dict[str, type[nn.Module]] = {}
"""Every head that a recipe or a model folder can name; `simomerge.models.heads` fills it."""


def build_head(
    kind: str, in_channels: Sequence[int], out_channels: int, settings: dict[str, Any] | None = None
) -> nn.Module:
    """A freshly initialised head.

    Args:
        kind: A key of `HEADS`, or ``module:Class`` of a custom head, which gets its settings only; see
            `simomerge.core.classes.make`.
        in_channels: Channels of each tap.
        out_channels: Channels of the task.
        settings: Further keyword arguments of the head's class.

    Raises:
        InputError: An unknown kind or setting.
    """
    if ":" in kind:
        return make(kind, settings or {}, nn.Module)
    if kind not in HEADS:
        raise InputError(f"unknown head {kind!r}; choose one of: {', '.join(HEADS)}.")
    known = head_arguments(kind)
    for name in settings or {}:
        if name not in known:
            raise InputError(f"head {kind!r} has no argument {name!r}{suggestion(name, known)}")
    try:
        return HEADS[kind](in_channels, out_channels, **(settings or {}))
    except (TypeError, ValueError) as error:
        raise InputError(f"head {kind!r}: {str(error).rstrip('.')}.") from error


def head_arguments(kind: str) -> list[str]:
    """The names of the arguments of a head in `HEADS`, besides the channels of taps and task.

    Example:
        >>> head_arguments("linear")
        ['cls', 'subpixels']
    """
    return list(inspect.signature(HEADS[kind]).parameters)[2:]


def head_for(encoder: Encoder, kind: str, out_channels: int, **settings: Any) -> nn.Module:
    """A fresh head for an encoder: it fits the strides of the taps, and reads CLS tokens if the encoder has them."""
    known = head_arguments(kind) if kind in HEADS else []
    fitting = {"cls": encoder.has_cls, "pyramid": len(set(encoder.strides)) > 1}
    accepted = {name: value for name, value in fitting.items() if name in known}
    return build_head(kind, encoder.channels, out_channels, {**accepted, **settings})


def head_kind(head: nn.Module) -> str:
    """The key of a head's class in `HEADS`, or ``module:Class`` of a custom head."""
    return next((kind for kind, cls in HEADS.items() if type(head) is cls), None) or class_path(head)
