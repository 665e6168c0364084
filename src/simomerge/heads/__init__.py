"""Heads (decoders): Features -> a dense prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from simomerge.encoders import Encoder
from simomerge.errors import InputError
from simomerge.heads.dpt import DPTHead
from simomerge.heads.linear import LinearHead

HEADS: dict[str, type[nn.Module]] = {"linear": LinearHead, "dpt": DPTHead}
"""Every head that a recipe or a model folder can name. A new one is one line here."""


def build_head(
    kind: str, in_channels: Sequence[int], out_channels: int, settings: dict[str, Any] | None = None
) -> nn.Module:
    """A freshly initialised head.

    Args:
        kind: a key of `HEADS`.
        in_channels: channels of each tap.
        out_channels: channels of the task.
        settings: further keyword arguments of the head's class.

    Raises:
        InputError: an unknown kind or setting.
    """
    if kind not in HEADS:
        raise InputError(f"unknown head {kind!r}; choose one of: {', '.join(HEADS)}.")
    try:
        return HEADS[kind](in_channels, out_channels, **(settings or {}))
    except TypeError as error:
        raise InputError(f"head {kind!r}: {error}.") from error


def head_for(encoder: Encoder, kind: str, out_channels: int, **settings: Any) -> nn.Module:
    """A fresh head that fits an encoder's taps; reads CLS tokens where the encoder has them."""
    return build_head(kind, encoder.channels, out_channels, {"cls": encoder.has_cls, **settings})


def head_kind(head: nn.Module) -> str:
    """The key of `HEADS` that a head was built from."""
    for kind, cls in HEADS.items():
        if type(head) is cls:
            return kind
    raise InputError(f"{type(head).__name__} is not a registered head; add it to simomerge.heads.HEADS to save it.")


__all__ = ["HEADS", "DPTHead", "LinearHead", "build_head", "head_for", "head_kind"]
