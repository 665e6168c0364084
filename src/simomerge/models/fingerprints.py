"""Fingerprints of a module's weights, computed only once while they stay the same, and of all of an encoder."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from simomerge.checkpoints import fingerprint
from simomerge.models.encoders import Encoder

_NO_RESULT = ("transformers_version", "transformers_weights", "architectures", "dtype", "torch_dtype")
"""Keys of a configuration that change between machines, files and versions, but not what the encoder computes."""

_PACKAGES = {*sys.stdlib_module_names, "torch", "torchvision", "transformers", "timm", "simomerge"}
"""Packages whose classes are known by their name and settings; other classes are somebody's own."""

_State = list[tuple[str, int, int, int, int]]
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes

_KNOWN: WeakKeyDictionary[nn.Module, tuple[_State, str]] = WeakKeyDictionary()
"""Module -> the state of its weights when they were last hashed, and their fingerprint."""


def fingerprint_of(module: nn.Module) -> str:
    """The sha256 of a module's weights, see `simomerge.checkpoints.fingerprint`.

    Hashing takes seconds for a large encoder. It is repeated only after a weight changed: in place (an optimiser step,
    ``load_state_dict``), by assignment, or by moving the module.
    """
    weights = module.state_dict()
    if not all(isinstance(value, Tensor) for value in weights.values()):  # extra state of an encoder of one's own
        return fingerprint(weights)
    state = [(name, tensor.data_ptr(), *_change_marks(tensor)) for name, tensor in weights.items()]
    known = _KNOWN.get(module)
    if known is None or known[0] != state:
        _KNOWN[module] = known = state, fingerprint(weights)
    return known[1]


def encoder_identity(encoder: Encoder) -> str:
    """A sha256 of all that decides what an encoder computes and how it trains, by which results of it are found again.

    It covers the weights, the taps, the normalisation and the configuration (such as epsilons, activations and drop
    rates). For a class of one's own, it also covers the name, the settings and the source files of the encoder and its
    modules. It depends on no path and no machine.
    """
    about = {
        "weights": [fingerprint_of(each) for each in (encoder.backbone, encoder.adapters) if each is not None],
        "encoder": encoder.describe(),
        "configuration": _configuration(encoder),
        "code": sorted(set(_sources(encoder))),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _configuration(encoder: Encoder) -> Any:
    """The configuration of the first module that has one of transformers, without keys that decide no result."""
    configs = (getattr(module, "config", None) for module in encoder.modules())
    found = next((config for config in configs if hasattr(config, "to_json_string")), None)
    return None if found is None else _deciding(json.loads(found.to_json_string()))


def _deciding(value: Any) -> Any:
    """A configuration without `_NO_RESULT` and private keys, which hold paths and kinds of attention."""
    if not isinstance(value, dict):
        return value
    return {key: _deciding(each) for key, each in value.items() if key not in _NO_RESULT and not key.startswith("_")}


def _sources(encoder: Encoder) -> Iterator[str]:
    """A sha256 of each source file of the classes of one's own; of a notebook or script, of the class alone."""
    for cls in {cls for module in encoder.modules() for cls in type(module).__mro__}:
        if cls.__module__.partition(".")[0] in _PACKAGES:
            continue
        try:
            if cls.__module__ == "__main__":
                content = inspect.getsource(cls).encode()
            else:
                content = Path(inspect.getfile(cls)).read_bytes()
        except (OSError, TypeError):  # no file has it, as for a class that was typed in
            continue
        yield hashlib.sha256(content).hexdigest()


def _change_marks(tensor: Tensor) -> tuple[int, int, int]:
    """PyTorch's count of in-place changes, and two sums of the values as integers of the same bits.

    Fused optimisers and writing to ``parameter.data`` leave the count as it is; the sums reveal them. The first one
    reveals changed values; the second one weights every value by its place, and reveals values that changed places.
    """
    flat = tensor.detach().reshape(-1)
    bits = flat.view(_INTEGERS.get(tensor.itemsize, torch.int64))
    places = torch.arange(1, len(bits) + 1, device=bits.device) if len(bits) else bits.long()
    weighted = int((bits.long() * places).sum())  # wraps around modulo 2^64
    return 0 if tensor.is_inference() else tensor._version, int(bits.sum(dtype=torch.int64)), weighted
