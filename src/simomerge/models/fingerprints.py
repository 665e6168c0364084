"""The fingerprint of a module's weights, computed only once while the weights stay the same."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from simomerge.checkpoints import fingerprint

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
