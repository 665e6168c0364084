"""The weights in what torch.load returns: alone, or next to the other values that training code saves.

Training code saves a state dict under a key, and often a second one: an average of the weights over the steps (EMA), or
the teacher of a distillation. Which of them an expert is, nobody but the user knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from simomerge.checkpoints.names import canonical_name
from simomerge.core.errors import InputError

_TRAINED = ("state_dict", "model", "model_state_dict", "net", "network", "params", "student", "current_model_state")
_AVERAGES = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "params_ema", "teacher")
"""The keys under which training code saves the weights as trained, and an average of them."""


def state_dict_in(loaded: Any, file: Path, key: str = "") -> Mapping[str, Any]:
    """The state dict in what torch.load returned: at the top, or under a usual key. Values next to it are ignored.

    Args:
        loaded: What torch.load returned.
        file: The file, for messages.
        key: The key of the state dict, if the user names one; ``::`` separates the keys of nested mappings.

    Raises:
        InputError: No state dict, more than tensors in it, several of them and no key, or nothing under the key.
    """
    sets = _sets(loaded) if isinstance(loaded, Mapping) else {}
    state = _under(loaded, file, key, sets) if key else _only_one(loaded, file, sets)
    if not isinstance(state, Mapping) or not state:
        found = "nothing" if state is None or isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise InputError(f"{file} holds {found}, not a state dict: save model.state_dict().")
    _check_tensors(state, file, sets if state is loaded else ())
    return state


def _sets(loaded: Mapping[Any, Any]) -> dict[str, Any]:
    """Key -> everything at the top that holds tensors, and what is inside a mapping under a usual key.

    A list of tensors, as some code saves an average, counts too: that it is there must not be overlooked.
    """
    import torch

    found: dict[str, Any] = {}
    for key, value in loaded.items():
        inner: dict[str, Any] = {}
        if isinstance(value, Mapping) and key in (*_TRAINED, *_AVERAGES):
            own = [each for each in value.values() if isinstance(each, torch.Tensor)]
            if all(each.numel() == 1 for each in own):  # no weights, but such as a number of steps
                inner = {f"{key}::{name}": each for name, each in value.items() if _holds_tensors(each)}
        found |= inner or ({str(key): value} if _holds_tensors(value) else {})
    return found


def _holds_tensors(value: Any) -> bool:
    import torch

    values: Iterable[Any] = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return any(isinstance(each, torch.Tensor) for each in values)


def _under(loaded: Any, file: Path, key: str, sets: Iterable[str]) -> Any:
    """What is under the key that the user gave."""
    for part in key.split("::"):
        loaded = loaded.get(part) if isinstance(loaded, Mapping) else None
    if loaded is None:
        known = f"there are {', '.join(sets)}" if sets else "it has no sets of weights by keys"
        raise InputError(f"{file} has no weights under {key!r}: {known}.")
    return loaded


def _only_one(loaded: Any, file: Path, sets: Mapping[str, Any]) -> Any:
    """The set of weights under a usual key if there is one, else what was loaded. Raises InputError if others rival it.

    A rival is another set under a usual key, or under any key one with names of the same tensors.
    """
    usual = [name for key in (*_TRAINED, *_AVERAGES) for name in sets if name.partition("::")[0] == key]
    if not usual:
        return loaded
    own = _names(sets[usual[0]])
    rivals = [name for name, other in sets.items() if name not in usual and own & _names(other)]
    if not rivals and len(usual) == 1:
        return sets[usual[0]]
    found = [_described(name, sets[name]) for name in (*usual, *rivals)]
    names = (*rivals, *usual)  # the last that can be read is the example
    readable = [f"{file}::{name}" for name in names if isinstance(sets[name], Mapping)]
    remedy = f"Choose one by its key, such as {readable[-1]}." if readable else "Save model.state_dict()."
    raise InputError(f"{file} holds several sets of weights: {', '.join(found)}. {remedy}")


def _described(name: str, state: Any) -> str:
    if not isinstance(state, Mapping):
        return f"{name} (a {type(state).__name__}, which cannot be read)"
    return f"{name} (an average)" if name.startswith(_AVERAGES) else name


def _names(state: Any) -> set[str]:
    return {canonical_name(str(name)) for name in state} if isinstance(state, Mapping) else set()


def _check_tensors(state: Mapping[Any, Any], file: Path, sets: Iterable[str]) -> None:
    import torch

    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            others = ", ".join(f"{file}::{key}" for key in sets)
            raise InputError(
                f"{file} is not a state dict: '{name}' is a {type(value).__name__}, not a tensor. "
                + (
                    f"Choose the weights in it: {others}."
                    if others
                    else "Save model.state_dict(), alone or under 'state_dict'."
                )
            )
        if value.layout != torch.strided or value.is_quantized:
            kind = "quantised" if value.is_quantized else "sparse"
            raise InputError(f"{file}: '{name}' is a {kind} tensor: save it dense, by .dequantize() or .to_dense().")
