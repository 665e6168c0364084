"""Write safetensors files: atomically, streaming, the same bytes for the same input."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.checkpoints.files import atomic_file
from simomerge.checkpoints.tensors import FLOATS, STORAGE, TensorInfo, as_numpy, encode, tensor_info
from simomerge.errors import InputError


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
    dtypes: str | Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    layout: Mapping[str, TensorInfo] | None = None,
) -> Path:
    """Write named tensors to one safetensors file; one tensor is in memory at a time.

    The header comes first in the file, so shapes and dtypes must be known before the first value: from
    ``tensors`` itself when it is a mapping (a Checkpoint answers without reading), else from ``layout``. The
    bytes depend on the tensors only, not on their order.

    Args:
        path: the file to write or replace; it appears complete or not at all.
        tensors: name -> numpy array or torch tensor, or an iterable of such pairs in any order.
        dtypes: storage dtype of the floats, ``"F32"``, ``"F16"`` or ``"BF16"``, for all or by name; by
            default each keeps the dtype it has. Tensors that are not floats always do.
        metadata: text entries of the header; ``format: pt`` is added, which transformers asks for.
        layout: name -> TensorInfo of everything that ``tensors`` will deliver; needed for an iterable.

    Raises:
        InputError: an unknown dtype, a value too large for it, a tensor that ``layout`` lacks or shapes
            otherwise, no space left (the needed bytes are named).

    Example:
        >>> write_safetensors("w.safetensors", {"w": np.ones(3, np.float32)}, "BF16").name
        'w.safetensors'
    """
    path = Path(path)
    if layout is None:
        if not isinstance(tensors, Mapping):
            tensors = dict(tensors)
        layout = {name: tensor_info(tensors, name) for name in tensors}
    layout = {name: TensorInfo(info.shape, _dtype(name, info, dtypes)) for name, info in layout.items()}
    header, offsets = _header(layout, metadata)
    pending = set(layout)
    pairs = ((name, tensors[name]) for name in tensors) if isinstance(tensors, Mapping) else tensors
    with atomic_file(path, len(header) + sum(info.nbytes for info in layout.values())) as handle:
        handle.write(header)
        for name, value in pairs:
            array = as_numpy(value, name)
            if name not in pending or array.shape != layout[name].shape:
                expected = f"{layout[name].shape} once" if name in layout else "no such tensor"
                raise InputError(f"{path}: got '{name}' of shape {array.shape}, expected {expected}.")
            handle.seek(len(header) + offsets[name])
            handle.write(encode(array, layout[name].dtype, name).reshape(-1).view(np.uint8).data)
            pending.remove(name)
        if pending:
            raise InputError(f"{path}: {len(pending)} tensors never came, the first is '{min(pending)}'.")
    return path


def _dtype(name: str, info: TensorInfo, dtypes: str | Mapping[str, str] | None) -> str:
    if not info.is_float or dtypes is None:
        return info.dtype
    dtype = dtypes if isinstance(dtypes, str) else dtypes.get(name, info.dtype)
    if dtype not in FLOATS:
        raise InputError(f"'{name}' cannot be stored as {dtype!r}: use one of {', '.join(sorted(FLOATS))}.")
    return dtype


def _header(layout: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int]]:
    """The length-prefixed JSON header, and where each tensor begins after it."""
    # Wide dtypes first (as the safetensors library does), so that every tensor is aligned to its own width.
    names = sorted(layout, key=lambda name: (-int(STORAGE[layout[name].dtype][2:]), name))
    text = {"format": "pt"} | dict(metadata or {})
    header: dict[str, Any] = {"__metadata__": {key: str(text[key]) for key in sorted(text)}}
    offsets = {}
    position = 0
    for name in names:
        info = layout[name]
        offsets[name] = position
        position += info.nbytes
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offsets[name], position],
        }
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded, offsets
