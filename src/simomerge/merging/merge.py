"""Merge whole encoders: check, read one tensor at a time, let the method do the arithmetic."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from simomerge.checkpoints import as_numpy, canonicalise
from simomerge.merging.checks import check_models
from simomerge.merging.method import MergeMethod, get_method
from simomerge.merging.stream import TaskVectorStream


def merge_tensors(
    base: Mapping[str, Any] | None,
    experts: Mapping[str, Mapping[str, Any]],
    method: str | MergeMethod = "task-arithmetic",
    **parameters: Any,
) -> Iterator[tuple[str, np.ndarray]]:
    """Merge tensor by tensor; what is in memory is one tensor of each model (and the method's statistics).

    The contracts are checked in the call, before the first tensor. Values are checked as they are read: an
    error can come after some tensors have been delivered, so write them where half a result is discarded, as
    ``checkpoints.write_safetensors`` does.

    Args:
        base: name -> numpy array or torch tensor, or a Checkpoint. None for a method that needs no base.
        experts: expert name -> the same, fine-tuned from ``base``. On-disk and in-memory names may be mixed.
        method: a name of ``available()``, or a method.
        **parameters: of the method, when it is given by name.

    Yields:
        ``(name, array)`` for every tensor of the base, under the base's own name and in its order: floats
        merged, as float32; all others copied from the base as stored.

    Raises:
        InputError: what ``get_method`` and ``check_models`` raise; values that are not finite.

    Warns:
        UserWarning: an expert is equal to the base.

    Example:
        >>> dict(merge_tensors({"w": np.zeros(1)}, {"a": {"w": np.ones(1)}}, "task-arithmetic", scale=0.5))
        {'w': array([0.5], dtype=float32)}
    """
    if isinstance(method, str):
        method = get_method(method, **parameters)
    elif parameters:
        raise TypeError("parameters go with a method given by name; a method object has its own")
    check_models(method, base, experts)
    return _merge(base, experts, method.for_experts(tuple(experts)))


def _merge(
    base: Mapping[str, Any] | None, experts: Mapping[str, Mapping[str, Any]], method: MergeMethod
) -> Iterator[tuple[str, np.ndarray]]:
    # Without a base any point of reference will do (the method said so), and an expert is at hand.
    reference = next(iter(experts.values())) if base is None else base
    stream = TaskVectorStream(reference, experts)
    statistics = method.prepare(stream)
    taking_part = set(stream.names)
    for name, own_name in canonicalise(reference).items():
        if name not in taking_part:
            yield own_name, as_numpy(reference[own_name], own_name).copy()
            continue
        values, task_vectors = stream.read(name)
        yield own_name, np.asarray(method.merge_tensor(name, values, task_vectors, statistics), np.float32)
    unchanged = [expert for expert in stream.experts if expert not in stream.changed]
    if unchanged and base is not None:
        warnings.warn(f"The task vector of {', '.join(unchanged)} is zero: the weights equal the base's.", stacklevel=2)


def merge_state_dicts(
    base: Mapping[str, Any] | None,
    experts: Mapping[str, Mapping[str, Any]],
    method: str | MergeMethod = "task-arithmetic",
    **parameters: Any,
) -> dict[str, Any]:
    """Merge state dicts into one, without any model class.

    Like :func:`merge_tensors`, but all at once and in the base's terms: its names, and for each tensor its
    kind (numpy or torch), dtype and device. The arithmetic is in float32 whatever the dtype. With
    ``base=None`` the first expert takes that role.

    Args:
        base, experts, method, **parameters: see :func:`merge_tensors`.

    Returns:
        name -> merged tensor; nothing is shared with the inputs. A Checkpoint as base gives float32 arrays.

    Raises:
        InputError: see :func:`merge_tensors`.

    Example:
        >>> merge_state_dicts({"w": np.zeros(1, np.float16)}, {"a": {"w": np.ones(1)}}, scale=0.5)
        {'w': array([0.5], dtype=float16)}
    """
    reference = next(iter(experts.values()), {}) if base is None else base
    merged = merge_tensors(base, experts, method, **parameters)
    return {name: _like(array, reference[name]) for name, array in merged}


def _like(array: np.ndarray, original: Any) -> Any:
    """The array as the kind, dtype and device of the original."""
    if hasattr(original, "new_tensor"):
        return original.new_tensor(array)
    return array.astype(original.dtype, copy=False)
