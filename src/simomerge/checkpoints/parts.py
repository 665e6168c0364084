"""Tensors that are one on disk and several in memory: the gate and the up projection of a SwiGLU DINOv2 (giant).

They are two linear layers, so everything here works on two tensors. A file that stores them as one (``mlp.weights_in``,
the rows of the gate first) is read through a view, and what is written in its form is joined again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from simomerge.checkpoints.tensors import TensorInfo, flat_values, tensor_info

_GATED = re.compile(r"^(.*\bencoder\.layer\.\d+\.mlp)\.weights_in\.(weight|bias)$")


def parts_of(name: str) -> tuple[str, ...]:
    """The names of the tensors that a stored tensor consists of, in the order of their rows.

    Example:
        >>> parts_of("encoder.layer.0.mlp.weights_in.bias")
        ('encoder.layer.0.mlp.gate_proj.bias', 'encoder.layer.0.mlp.up_proj.bias')
        >>> parts_of("layernorm.weight")
        ('layernorm.weight',)
    """
    found = _GATED.match(name)
    return tuple(f"{found[1]}.{part}.{found[2]}" for part in ("gate_proj", "up_proj")) if found else (name,)


def joined(name: str, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """The stored tensor ``name``, from a function that reads its parts."""
    parts = parts_of(name)
    return read(name) if len(parts) == 1 else np.concatenate([read(part) for part in parts])


def separated(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """A lazy view in which every part is a tensor of its own; the mapping itself if nothing needs a view.

    Example:
        >>> list(separated({"encoder.layer.0.mlp.weights_in.bias": np.ones(4)}))
        ['encoder.layer.0.mlp.gate_proj.bias', 'encoder.layer.0.mlp.up_proj.bias']
    """
    return _Separated(tensors) if any(len(parts_of(name)) > 1 for name in tensors) else tensors


class _Separated(Mapping[str, Any]):
    """See `separated`. It reads values only when asked, like a Checkpoint."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.path = getattr(tensors, "path", None)
        self._tensors = tensors
        self._places = {
            part: (name, index, len(parts_of(name)))
            for name in tensors
            for index, part in enumerate(parts_of(name))
        }  # fmt: skip

    def info(self, name: str) -> TensorInfo:
        """Shape and storage dtype of one tensor. Raises KeyError."""
        own, _, count = self._places[name]
        info = tensor_info(self._tensors, own)
        return TensorInfo((info.shape[0] // count, *info.shape[1:]), info.dtype) if count > 1 else info

    def flat(self, name: str, part: slice = slice(None)) -> np.ndarray:
        """A part of a tensor's flattened values. Raises KeyError."""
        own, index, _ = self._places[name]
        size = self.info(name).size
        start, stop, step = part.indices(size)
        return flat_values(self._tensors, own, slice(index * size + start, index * size + stop, step))

    def __getitem__(self, name: str) -> Any:
        own, index, count = self._places[name]
        tensor = self._tensors[own]
        if count == 1:
            return tensor
        rows = len(tensor) // count
        return tensor[index * rows : (index + 1) * rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
