"""Heads by name: build one, and name the kind of one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from simomerge.core.classes import class_path, make
from simomerge.core.documents import check
from simomerge.core.errors import InputError
from simomerge.core.registry import suggestion
from simomerge.core.text import shortened, shown
from simomerge.models.encoders import Encoder

HEADS: dict[str, type[nn.Module]] = {}
"""Every head that a recipe or a model folder can name; `simomerge.models.heads` fills it."""

_TYPES: dict[Any, type] = {"bool": bool, "int": int, "float": float, "str": str}
"""Annotations of arguments, which are text in this package, and the types that they stand for."""


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
        InputError: An unknown kind or setting, or a value that a setting cannot have.
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
        _check_settings(kind, settings or {})
        return HEADS[kind](in_channels, out_channels, **(settings or {}))
    except InputError as error:
        raise InputError(f"head {kind!r}: {str(error).rstrip('.')}.") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # values that fit together in no head
        reason = shortened(" ".join(str(error).split()), 200).rstrip(".") or type(error).__name__
        raise InputError(f"head {kind!r} cannot be made with the settings {shown(settings)} ({reason}).") from error


def _check_settings(kind: str, settings: Mapping[str, Any]) -> None:
    """Raise InputError for a setting of another type than its argument, or a count below 1."""
    arguments = inspect.signature(HEADS[kind]).parameters
    for name, value in settings.items():
        wanted = _TYPES.get(arguments[name].annotation)
        if wanted is None:
            continue
        try:
            check(value, wanted, name)
        except ValueError as error:
            raise InputError(str(error)) from error
        if wanted is int and value < 1:
            raise InputError(f"{name} is {value}: give at least 1")


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
