"""Merge whole encoders: check, read one tensor at a time, let the method do the arithmetic."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from simomerge.checkpoints import as_numpy, canonicalise
from simomerge.errors import InputError
from simomerge.merging.checks import check_models
from simomerge.merging.method import MergeMethod, get_method
from simomerge.merging.schedule import Factor, Schedule, as_schedule
from simomerge.merging.stream import TaskVectorStream


def merge_tensors(
    base: Mapping[str, Any] | None,
    experts: Mapping[str, Mapping[str, Any]],
    method: str | MergeMethod = "task-arithmetic",
    schedule: Schedule | Sequence[float] | str | None = None,
    threads: int | None = None,
    **parameters: Any,
) -> Iterator[tuple[str, np.ndarray]]:
    """Merge tensor by tensor; what is in memory is a few tensors of each model (and the method's statistics).

    The contracts are checked in the call, before the first tensor. Values are checked as they are read: an
    error can come after some tensors have been delivered, so write them where half a result is discarded, as
    ``checkpoints.write_safetensors`` does.

    Args:
        base: name -> numpy array or torch tensor, or a Checkpoint. None for a method that needs no base.
        experts: expert name -> the same, fine-tuned from ``base``. On-disk and in-memory names may be mixed.
        method: a name of ``available()``, or a method.
        schedule: factors over the depth for the merged task vector: see ``schedule.as_schedule``.
        threads: all cores by default; the result does not depend on it.
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
    chosen = as_schedule(schedule)
    if chosen is not None and base is None:
        raise InputError("a schedule scales the task vectors: give the base.")
    return _merged_tensors(method.for_experts(list(experts)), base, experts, chosen, threads)


def _merged_tensors(
    method: MergeMethod,
    base: Mapping[str, Any] | None,
    experts: Mapping[str, Mapping[str, Any]],
    schedule: Schedule | None,
    threads: int | None,
) -> Iterator[tuple[str, np.ndarray]]:
    # Without a base any point of reference will do (the method said so), and an expert is at hand: always the same
    # one, for the last digit depends on it.
    reference = experts[min(experts)] if base is None else base
    stream = TaskVectorStream(reference, experts, threads)
    _keep_freed_memory()
    statistics = method.prepare(stream)
    factors = schedule.factors(method, stream, statistics) if schedule else None
    merged = stream.map(partial(_merged_tensor, method, stream, statistics, factors))
    for name, own_name in canonicalise(reference).items():
        if name in stream.sizes:
            yield own_name, next(merged)[1]
        else:
            yield own_name, as_numpy(reference[own_name], own_name).copy()
    for _ in merged:  # nothing is left: this lets its threads end
        pass
    unchanged = [expert for expert in stream.experts if expert not in stream.changed]
    if unchanged and base is not None:
        warnings.warn(f"The task vector of {', '.join(unchanged)} is zero: the weights equal the base's.", stacklevel=2)


def _keep_freed_memory() -> None:
    """Let the allocator keep what a block of a tensor frees, for the next block.

    glibc gives freed arrays of a block's size back to the system and maps every new one page by page, which took as
    long as the arithmetic (8.7 instead of 14 ns per entry of TIES). Freeing one larger array raises that limit.
    It is never touched, so it takes no memory.
    """
    np.empty(24 << 20, np.uint8)


def _merged_tensor(
    method: MergeMethod, stream: TaskVectorStream, statistics: Any, factors: Factor | None, name: str
) -> np.ndarray:
    merged = np.empty(stream.shapes[name], np.float32)
    flat = merged.reshape(-1)
    workspace = stream.workspace(name) if method.elementwise else None
    for part in stream.blocks(name) if method.elementwise else (None,):
        base, task_vectors = stream.read(name, part, workspace)
        values = method.merge_tensor(name, base, task_vectors, statistics)
        if factors is not None:
            values = base + np.float32(factors(name)) * (values - base)
        flat[slice(None) if part is None else part] = values.reshape(-1)
    return merged


def merge_state_dicts(
    base: Mapping[str, Any] | None,
    experts: Mapping[str, Mapping[str, Any]],
    method: str | MergeMethod = "task-arithmetic",
    schedule: Schedule | Sequence[float] | str | None = None,
    threads: int | None = None,
    **parameters: Any,
) -> dict[str, Any]:
    """Merge state dicts into one, without any model class.

    Like :func:`merge_tensors`, but all at once and in the base's terms: its names, and for each tensor its
    kind (numpy or torch), dtype and device. The arithmetic is in float32 whatever the dtype. With
    ``base=None`` the first expert by name takes that role.

    Args:
        base, experts, method, schedule, threads, **parameters: see :func:`merge_tensors`.

    Returns:
        name -> merged tensor; nothing is shared with the inputs. A Checkpoint as base gives float32 arrays.

    Raises:
        InputError: see :func:`merge_tensors`.

    Example:
        >>> merge_state_dicts({"w": np.zeros(1, np.float16)}, {"a": {"w": np.ones(1)}}, scale=0.5)
        {'w': array([0.5], dtype=float16)}
    """
    merged = merge_tensors(base, experts, method, schedule, threads, **parameters)
    reference = experts[min(experts)] if base is None else base
    return {name: like(array, reference[name]) for name, array in merged}


def like(array: np.ndarray, original: Any) -> Any:
    """The array as the kind, dtype and device of the original."""
    if hasattr(original, "new_tensor"):
        return original.new_tensor(array)
    return array.astype(original.dtype, copy=False)
