"""The tensors of a LoRA adapter under the names of its base."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from simomerge.checkpoints.names import canonical_name
from simomerge.core.caution import warn
from simomerge.core.errors import InputError

REMEDY = "call merge_and_unload() in peft and give the merged model"
_SHOWN = 3  # the most names in a message; it also has their number
_WRAPPERS = ("encoder.", "model.")  # possible prefixes of the encoder's own names; names.py knows the others

_Tensor = TypeVar("_Tensor")


def others_of(
    known: Mapping[str, str], config: Mapping[str, Any], names: Iterable[str], prefixes: Sequence[str] = ()
) -> list[str]:
    """The tensors trained in full that belong to no module of the base: those of a head.

    Args:
        known: Canonical name -> the base's own.
        config: The adapter's configuration. Only modules that it names in ``modules_to_save`` may be missing in a base.
        names: The adapter's tensor names.
        prefixes: Of more tensors that may be missing.
    """
    saved = [str(module) for module in config.get("modules_to_save") or []]
    saved = [module for module in saved if not any(f".{module}." in f".{name}" for name in known)]
    may_miss = [name for name in names if _is_of(name, saved) or name.startswith(tuple(prefixes))]
    return [name for name in may_miss if _found(name, known) is None]


def of_base(known: Mapping[str, str], tensors: Mapping[str, _Tensor], others: Sequence[str] = ()) -> dict[str, _Tensor]:
    """The tensors without those of a pooler that the base does not have, as no head reads it, and without others.

    Args:
        known: Canonical name -> the base's own.
        tensors: The adapter's tensor names -> anything.
        others: Prefixes of names that are left out unless the base has them.
    """
    poolers = [] if any(_is_of(name, ["pooler"]) for name in known) else ["pooler"]
    elsewhere = {name for name in tensors if name.startswith(tuple(others)) and _found(name, known) is None}
    return {name: each for name, each in tensors.items() if name not in elsewhere and not _is_of(name, poolers)}


def _is_of(name: str, modules: Iterable[str]) -> bool:
    return any(f".{module}." in f".{name}" for module in modules)


def warn_of_head(folder: Path, names: Collection[str]) -> None:
    """Warn that an adapter's head is left out where only weights are merged, with the way to keep it."""
    if names:
        modules = list(dict.fromkeys(map(_module, names)))
        warn(
            f"{folder}: left out {len(names)} tensors of {', '.join(modules)}, which the base does not have."
            f" {import_command(folder, modules[0])}"
        )


def _module(name: str) -> str:
    """The module at the top of the trained model that a tensor belongs to."""
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name.partition(".")[0]


def import_command(folder: str | Path, module: str) -> str:
    """How to make an expert of an adapter and the head in it, as a sentence."""
    return (
        f"To keep a head, make an expert first: simomerge import {folder} --task TASK --encoder BASE --head HEAD"
        f" --head-prefix {module}."
    )


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
        own_modules = {name.partition(".")[0] for name in known}
        of_head = not own_modules & {canonical_name(name).partition(".")[0] for name in unknown}
        raise InputError(
            f"{file} changes {tensors} that the base does not have: {shown}. Give the base that the adapter was trained"
            f" on. {import_command(file.parent, _module(unknown[0])) if of_head else ''}".rstrip()
        )
    own = {name: str(value) for name, value in found.items()}
    by_own = {value: name for name, value in own.items()}
    if twice := [name for name, value in own.items() if by_own[value] != name]:
        raise InputError(
            f"{file}: '{twice[0]}' and '{by_own[own[twice[0]]]}' are both '{own[twice[0]]}' of the base: {REMEDY}."
        )
    return own
