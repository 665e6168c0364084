"""One tensor: its shape, its storage dtype, and its values as numpy.

Storage dtypes have their safetensors names (``F32``, ``BF16``, ``I64`` ...). All computations are in float32, whatever
the storage. Tensors that are not floats stay as they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from simomerge.core.errors import InputError

#: safetensors dtype -> the numpy dtype that reads its bytes. numpy has no bfloat16; it is the upper half of a float32.
STORAGE = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "C64": "<c8",
    "BOOL": "|b1",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
}
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
#: The storage dtypes in which models are written, by their names in torch.
WRITTEN = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_BY_NAME = {"bfloat16": "BF16"} | {np.dtype(code).name: key for key, code in STORAGE.items() if key != "BF16"}


@dataclass(frozen=True)
class TensorInfo:
    """The shape and storage dtype of a tensor, known without reading its values.

    Example:
        >>> TensorInfo((2, 3), "BF16").nbytes
        12
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def is_float(self) -> bool:
        """True if the tensor takes part in arithmetic; other tensors are only copied."""
        return self.dtype in FLOATS

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in storage."""
        return self.size * np.dtype(STORAGE[self.dtype]).itemsize


def common_float(infos: Iterable[TensorInfo]) -> str | None:
    """The key of `WRITTEN` in which all floats are stored; None if they differ, or if it is none of these.

    Example:
        >>> common_float([TensorInfo((2, 3), "BF16"), TensorInfo((), "I64")])
        'bfloat16'
    """
    found = {info.dtype for info in infos if info.is_float}
    return next((name for name, code in WRITTEN.items() if {code} == found), None)


def tensor_info(tensors: Mapping[str, Any], name: str) -> TensorInfo:
    """Shape and storage dtype of ``tensors[name]``; a Checkpoint knows them without reading the values.

    Raises:
        InputError: the value is not a numpy array or torch tensor, or has a dtype that cannot be stored.

    Example:
        >>> tensor_info({"w": np.zeros((2, 3), np.float16)}, "w")
        TensorInfo(shape=(2, 3), dtype='F16')
    """
    lazy = getattr(tensors, "info", None)
    return lazy(name) if callable(lazy) else value_info(tensors[name], name)


def value_info(value: Any, name: str) -> TensorInfo:
    """Shape and storage dtype of one numpy array or torch tensor; ``name`` appears in the error message."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise InputError(f"'{name}' is a {type(value).__name__}, not a tensor: give arrays or tensors.")
    if str(getattr(value, "layout", "torch.strided")) != "torch.strided":
        raise InputError(f"'{name}' is a sparse tensor, which is not supported: give it dense, by .to_dense().")
    dtype = getattr(value.dtype, "name", None) or str(value.dtype).removeprefix("torch.")
    if dtype not in _BY_NAME:
        raise InputError(f"'{name}' has dtype {value.dtype}, which is not supported: convert it to float32.")
    return TensorInfo(tuple(int(n) for n in value.shape), _BY_NAME[dtype])


def as_numpy(value: Any, name: str = "tensor") -> np.ndarray:
    """The values of a numpy array or a torch tensor on any device: floats as float32, all others as stored.

    A float32 array is returned without a copy: treat the result as read-only.

    Raises:
        InputError: not a tensor, or a dtype that cannot be stored.

    Example:
        >>> as_numpy(np.array([1, 2], np.float16)).dtype
        dtype('float32')
    """
    info = value_info(value, name)
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if info.is_float else value).numpy()
    return np.asarray(value, dtype=np.float32 if info.is_float else None)


def flat_values(tensors: Mapping[str, Any], name: str, part: slice = slice(None)) -> np.ndarray:
    """A part of the flattened values of ``tensors[name]``, like :func:`as_numpy`; a Checkpoint reads only this part.

    Example:
        >>> flat_values({"w": np.arange(6.0).reshape(2, 3)}, "w", slice(2, 4))
        array([2., 3.], dtype=float32)
    """
    lazy = getattr(tensors, "flat", None)
    if callable(lazy):
        return lazy(name, part)
    value = tensors[name]
    value_info(value, name)
    return as_numpy(value.reshape(-1)[part], name)


def decode(stored: np.ndarray, info: TensorInfo) -> np.ndarray:
    """Convert a stored array to its values, in the same shape: floats to float32, all others unchanged."""
    if info.dtype == "BF16":
        return _from_bfloat16(stored)
    return stored.astype(np.float32, copy=False) if info.is_float else stored


def encode(array: np.ndarray, dtype: str, name: str = "tensor") -> np.ndarray:
    """Convert an array to the little-endian, contiguous array whose bytes are stored as ``dtype``.

    Narrowing rounds to nearest, ties to even.

    Raises:
        InputError: a finite value is too large for ``dtype``.
    """
    if dtype not in FLOATS:
        return np.ascontiguousarray(array, dtype=STORAGE[dtype])
    # Overflow gives infinity, which is checked below, so numpy need not warn.
    with np.errstate(over="ignore"):
        if dtype == "BF16":
            stored, values = _round_to_bfloat16(array)
        else:
            stored = values = np.ascontiguousarray(array, dtype=STORAGE[dtype])
    if dtype in ("F16", "BF16") and np.any(np.isinf(values) & np.isfinite(array)):
        largest = np.abs(array[np.isfinite(array)]).max()
        raise InputError(f"'{name}' holds {largest:.3g}, too large for {dtype}: store it as F32.")
    return stored


def _round_to_bfloat16(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The upper 16 bits of float32, rounded half to even, and the float32 values that they represent."""
    bits = np.ascontiguousarray(array, dtype="<f4").view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding would turn a NaN with a full mantissa into infinity or zero: keep it a (quiet) NaN.
    stored = np.where(np.isnan(array), (bits >> 16) | 0x40, rounded).astype("<u2").reshape(np.shape(array))
    return stored, _from_bfloat16(stored)


def _from_bfloat16(stored: np.ndarray) -> np.ndarray:
    return np.asarray(np.left_shift(stored, 16, dtype=np.uint32)).view(np.float32)
