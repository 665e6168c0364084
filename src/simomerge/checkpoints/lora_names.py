"""The tensors of a LoRA adapter under the names of its base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from simomerge.checkpoints.names import canonical_name
from simomerge.core.caution import warn
from simomerge.core.errors import InputError

REMEDY = "call merge_and_unload() in peft and give the merged model"
_SHOWN = 3  # the most names in a message; it also has their number
_WRAPPERS = ("encoder.", "model.")  # possible prefixes of the encoder's own names; names.py knows the others

_Tensor = TypeVar("_Tensor")


def without_heads(
    file: Path, known: Mapping[str, str], config: Mapping[str, Any], replaced: Mapping[str, _Tensor]
) -> dict[str, _Tensor]:
    """The tensors trained in full, without those of saved modules that the base does not have, such as a head.

    Args:
        file: The adapter, for messages.
        known: Canonical name -> the base's own.
        config: The adapter's configuration.
        replaced: The adapter's tensor names -> anything.

    Warns:
        UserWarning: Tensors were left out.
    """
    saved = [str(module) for module in config.get("modules_to_save") or []]
    heads = {
        module: [name for name in replaced if f".{module}." in f".{name}" and _found(name, known) is None]
        for module in saved
        if not any(f".{module}." in f".{name}" for name in known)
    }
    dropped = {name for names in heads.values() for name in names}
    if dropped:
        modules = ", ".join(module for module, names in heads.items() if names)
        warn(f"{file}: left out {len(dropped)} tensors of {modules}, which the base does not have.")
    return {name: full for name, full in replaced.items() if name not in dropped}


def _found(name: str, known: Mapping[str, str]) -> str | None:
    """The base's own name of a tensor of the adapter, or None."""
    while True:
        # Factors of nn.MultiheadAttention itself belong to its input projection.
        stem, _, last = name.rpartition(".")
        for candidate in (name, f"{stem}.in_proj_{last}"):
            if (own := known.get(canonical_name(candidate))) is not None:
                return own
        if not name.startswith(_WRAPPERS):
            return None
        name = name.partition(".")[2]


def own_names(file: Path, known: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """The adapter's tensor names -> the base's own.

    Args:
        file: The adapter, for messages.
        known: Canonical name -> the base's own.
        names: The adapter's tensor names, without what peft adds to them.

    Raises:
        InputError: A tensor that the base does not have, or two that are the same there.
    """
    names = list(names)
    found = {name: _found(name, known) for name in names}
    unknown = [name for name, own in found.items() if own is None]
    inner = unknown[0] if unknown else ""
    while unknown and "." in inner:  # all names may have one more prefix, the encoder's place in a larger model
        inner = inner.partition(".")[2]
        prefix = unknown[0].removesuffix(inner)
        shorter = {name: _found(name.removeprefix(prefix), known) for name in names if name.startswith(prefix)}
        if len(shorter) == len(names) and None not in shorter.values():
            found, unknown = shorter, []
    if unknown:
        shown = ", ".join(unknown[:_SHOWN]) + (", ..." if len(unknown) > _SHOWN else "")
        tensors = f"{len(unknown)} tensor{'s' if len(unknown) > 1 else ''}"
        raise InputError(
            f"{file} changes {tensors} that the base does not have: {shown}."
            " Give the base that the adapter was trained on, and an adapter without a head."
        )
    own = {name: str(value) for name, value in found.items()}
    by_own = {value: name for name, value in own.items()}
    if twice := [name for name, value in own.items() if by_own[value] != name]:
        raise InputError(
            f"{file}: '{twice[0]}' and '{by_own[own[twice[0]]]}' are both '{own[twice[0]]}' of the base: {REMEDY}."
        )
    return own
