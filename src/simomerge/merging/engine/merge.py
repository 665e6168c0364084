"""Merge whole encoders: check them, read one tensor at a time, and let the method do the arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np

from simomerge.checkpoints import TensorInfo, as_numpy, canonicalise, tensor_info
from simomerge.checkpoints.parts import joined, parts_of
from simomerge.checkpoints.tensors import encode, value_info
from simomerge.core.caution import warn
from simomerge.core.errors import InputError
from simomerge.core.parallel import ordered_map
from simomerge.merging.engine.checks import check_models, warn_of_other_tensors
from simomerge.merging.engine.schedule import Factor, Schedule, as_schedule
from simomerge.merging.engine.stream import TaskVectorStream, all_finite
from simomerge.merging.method import MergeMethod, Provisional, get_method


class Merged(Mapping[str, np.ndarray]):
    """A merge as a mapping from tensor names to arrays. A tensor is merged when it is read, and is not kept.

    Several threads may read at the same time. The method's statistics of whole models are computed by `prepare`, or
    else together with the first tensor. Names and order are those of the base. Float tensors are merged, in float32,
    and the running statistics of batch norms are averaged over the experts. All others are copied from the base as
    stored.

    Args:
        method: The method.
        base, experts, schedule, threads, blocks: See `merge_tensors`.

    Raises:
        InputError: What `check_models` raises, or, when a tensor is read, a value that is not finite.

    Example:
        >>> from simomerge.merging import TaskArithmetic
        >>> merged = Merged(TaskArithmetic(scale=0.5), {"w": np.zeros(1)}, {"a": {"w": np.ones(1)}})
        >>> list(merged), merged["w"]
        (['w'], array([0.5], dtype=float32))
    """

    def __init__(
        self,
        method: MergeMethod,
        base: Mapping[str, Any] | None,
        experts: Mapping[str, Mapping[str, Any]],
        schedule: Schedule | Sequence[float] | str | None = None,
        threads: int | None = None,
        blocks: Sequence[str] = (),
    ) -> None:
        check_models(method, base, experts)
        self._schedule = as_schedule(schedule)
        if self._schedule is not None and base is None:
            raise InputError("a schedule scales the task vectors: give the base.")
        # A method without a base accepts any point of reference. It is always the first expert by name, because the
        # last digit of the result depends on it.
        self._reference = experts[min(experts)] if base is None else base
        self._has_base = base is not None
        self._method = method.for_experts(list(experts))
        self._stream = TaskVectorStream(self._reference, experts, threads, blocks)
        self._canonical = {own: name for name, own in canonicalise(self._reference).items()}
        self._is_float = {own: tensor_info(self._reference, own).is_float for own in self._canonical}
        self._threads, self._lock = threads, Lock()
        _keep_freed_memory()

    @cached_property
    def _prepared(self) -> tuple[Any, Factor | None]:
        """The method's statistics and the schedule's factors."""
        statistics = self._method.prepare(self._stream)
        return statistics, self._schedule.factors(self._method, self._stream, statistics) if self._schedule else None

    def prepare(self) -> None:
        """Compute the method's statistics of whole models now, in this thread, not together with the first tensor."""
        with self._lock:
            _ = self._prepared

    def __getitem__(self, own_name: str) -> np.ndarray:
        if not self._is_float[own_name]:
            return as_numpy(self._reference[own_name], own_name).copy()
        self.prepare()
        with np.errstate(over="ignore", invalid="ignore"):  # The check for finite values may overflow.
            return joined(self._canonical[own_name], self._merged)

    def _merged(self, name: str) -> np.ndarray:
        method, stream, (statistics, factors) = self._method, self._stream, self._prepared
        if name in stream.averaged:
            return stream.average(name, method.shares(name, stream.experts, statistics)).reshape(stream.shapes[name])
        merged = np.empty(stream.shapes[name], np.float32)
        flat = merged.reshape(-1)
        blocks = stream.read_blocks(name) if method.elementwise else [(slice(None), *stream.read(name))]
        for part, base, task_vectors in blocks:
            values = method.merge_tensor(name, base, task_vectors, statistics)
            if factors is not None:
                values = base + np.float32(factors(name)) * (values - base)
            flat[part] = self._checked(name, values).reshape(-1)
        return merged

    def _checked(self, name: str, merged: np.ndarray) -> np.ndarray:
        if not all_finite(merged):
            raise InputError(
                f"'{name}' of the merged model is too large for float32 ({self._method.name}): use a smaller scale, or"
                " leave out the expert with such values."
            )
        return merged

    def at_once(self) -> Merged:
        """The same tensors for a reader who reads each of them once, and then `corrections`.

        Some methods need one pass fewer over the models then, see `MergeMethod.provisional`. Call it instead of
        `prepare`, which it includes.
        """
        with self._lock:
            provisional = self._method.provisional(self._stream) if self._schedule is None else None
        if provisional is not None:
            return _Provisional(self, provisional)
        self.prepare()
        return self

    def corrections(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """What to write over tensors that were read: the name, the place in the flattened tensor, the values."""
        return iter(())

    def __contains__(self, own_name: object) -> bool:
        return own_name in self._canonical

    def info(self, own_name: str) -> TensorInfo:
        """Shape and dtype of one tensor of the result, without merging it. Raises KeyError."""
        stored = tensor_info(self._reference, own_name)
        return TensorInfo(stored.shape, "F32") if stored.is_float else stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._canonical)

    def __len__(self) -> int:
        return len(self._canonical)

    def state_dict(self) -> dict[str, Any]:
        """All tensors at once, each of the kind (numpy or torch), dtype and device of the base's.

        Raises:
            InputError: As when a tensor is read, or a value is too large for the dtype.

        Warns:
            UserWarning: As `warn_of_unchanged`.
        """
        merged, reference = self.at_once(), self._reference
        arrays = ordered_map(lambda name: (name, merged[name]), merged, self._threads)
        result = {name: like(array, reference[name], name) for name, array in arrays}
        for name, start, values in merged.corrections():
            result[name].reshape(-1)[start : start + values.size] = like(values, reference[name], name)
        self.warn_of_unchanged()
        return result

    def warn_of_unchanged(self) -> None:
        """Warn of experts that equal the base. Call it after all tensors are read."""
        unchanged = [expert for expert in self._stream.experts if expert not in self._stream.changed]
        if unchanged and self._has_base:
            warn(f"The task vector of {', '.join(unchanged)} is zero: the weights equal the base's.")


class _Provisional(Merged):
    """See `Merged.at_once`. It shares everything with the merge that it comes from."""

    def __init__(self, merged: Merged, provisional: Provisional) -> None:
        vars(self).update(vars(merged))
        self._provisional = provisional
        self._undecided: dict[str, list[slice]] = {}

    def prepare(self) -> None:
        """Nothing is left to compute before the first tensor."""

    def _merged(self, name: str) -> np.ndarray:
        stream = self._stream
        if name in stream.averaged:
            return stream.average(name, self._method.shares(name, stream.experts, None)).reshape(stream.shapes[name])
        merged, parts = np.empty(stream.shapes[name], np.float32), []
        flat = merged.reshape(-1)
        for part, base, task_vectors in stream.read_blocks(name):
            values, undecided = self._provisional.merge(base, task_vectors)
            flat[part] = self._checked(name, values)
            if undecided is not None:
                parts.append(slice(part.start + undecided.start, part.start + undecided.stop))
        if parts:
            self._undecided[name] = parts
        return merged

    def corrections(self) -> Iterator[tuple[str, int, np.ndarray]]:
        statistics, stream = self._provisional.statistics(), self._stream
        for own_name, name in self._canonical.items():
            start = 0
            for piece in parts_of(name):
                for part in self._undecided.get(piece, ()):
                    with np.errstate(over="ignore", invalid="ignore"):
                        values = self._method.merge_tensor(piece, *stream.read(piece, part), statistics)
                        values = self._checked(piece, values)
                    yield own_name, start + part.start, values
                start += stream.sizes.get(piece, 0)


def _keep_freed_memory() -> None:
    """Make the allocator keep the memory that one block of a tensor frees, for the next block.

    glibc returns freed arrays of a block's size to the system and maps every new one page by page, which took as long
    as the arithmetic (8.7 instead of 14 ns per entry of TIES). Freeing one larger array raises its limit. The array is
    never touched, so it takes no memory.
    """
    np.empty(24 << 20, np.uint8)


def merge_tensors(
    base: Mapping[str, Any] | None,
    experts: Mapping[str, Mapping[str, Any]],
    method: str | MergeMethod = "task-arithmetic",
    schedule: Schedule | Sequence[float] | str | None = None,
    threads: int | None = None,
    blocks: Sequence[str] = (),
    **parameters: Any,
) -> Iterator[tuple[str, np.ndarray]]:
    """Merge tensor by tensor, with only a few tensors of each model (and the method's statistics) in memory.

    Names, shapes and dtypes are checked in the call, before the first tensor. Values are checked when they are read, so
    an error can come after some tensors have been delivered. Write them where half a result is discarded, as
    ``checkpoints.write_safetensors`` does.

    Args:
        base: name -> numpy array or torch tensor, or a Checkpoint. None for a method that needs no base.
        experts: Expert name -> the same, fine-tuned from ``base``. On-disk and in-memory names may be mixed.
        method: A name from `available`, or a method.
        schedule: Factors over the depth for the merged task vector; see `as_schedule`.
        threads: The number of threads, by default all cores. The result does not depend on it.
        blocks: Names of the modules that are the encoder's blocks, in order, for an encoder that declares them. By
            default the blocks are found in the names of the tensors.
        **parameters: The method's parameters, if it is given by name.

    Yields:
        ``(name, array)`` for every tensor of the base, in its order and under its name. Float tensors are merged, in
        float32, and the running statistics of batch norms averaged; all others are copied from the base as stored.

    Raises:
        InputError: What `get_method` and `check_models` raise, or a value that is not finite.

    Warns:
        UserWarning: An expert is equal to the base, or has other values in tensors that are not floats.

    Example:
        >>> dict(merge_tensors({"w": np.zeros(1)}, {"a": {"w": np.ones(1)}}, "task-arithmetic", scale=0.5))
        {'w': array([0.5], dtype=float32)}
    """
    merged = Merged(_with(method, parameters), base, experts, schedule, threads, blocks)
    warn_of_other_tensors(base, experts)
    return _in_order(merged, threads)


def _in_order(merged: Merged, threads: int | None) -> Iterator[tuple[str, np.ndarray]]:
    merged.prepare()
    yield from ordered_map(lambda name: (name, merged[name]), merged, threads)
    merged.warn_of_unchanged()


def merge_state_dicts(
    base: Mapping[str, Any] | None,
    experts: Mapping[str, Mapping[str, Any]],
    method: str | MergeMethod = "task-arithmetic",
    schedule: Schedule | Sequence[float] | str | None = None,
    threads: int | None = None,
    blocks: Sequence[str] = (),
    **parameters: Any,
) -> dict[str, Any]:
    """Merge state dicts into one, without any model class.

    Like `merge_tensors`, but all at once. Every tensor has the base's name, kind (numpy or torch), dtype and device.
    The arithmetic is in float32 whatever the dtype. With ``base=None``, the first expert by name takes the base's role.

    Args:
        base, experts, method, schedule, threads, blocks, **parameters: See `merge_tensors`.

    Returns:
        name -> merged tensor, which shares no memory with the inputs. A Checkpoint as base gives float32 arrays.

    Raises:
        InputError: See `merge_tensors`; also a merged value that is too large for the dtype.

    Example:
        >>> merge_state_dicts({"w": np.zeros(1, np.float16)}, {"a": {"w": np.ones(1)}}, scale=0.5)
        {'w': array([0.5], dtype=float16)}
    """
    merged = Merged(_with(method, parameters), base, experts, schedule, threads, blocks)
    warn_of_other_tensors(base, experts)
    return merged.state_dict()


def _with(method: str | MergeMethod, parameters: Mapping[str, Any]) -> MergeMethod:
    """The method, which has parameters here only if it is given by name."""
    if isinstance(method, str):
        return get_method(method, **parameters)
    if parameters:
        raise TypeError("parameters go with a method given by name; a method object has its own")
    return method


def like(array: np.ndarray, original: Any, name: str) -> Any:
    """An array with the kind, dtype and device of the original. Raises InputError if a value is too large for it."""
    if (dtype := value_info(original, name).dtype) in ("F16", "BF16"):
        encode(array, dtype, name)
    if hasattr(original, "new_tensor"):
        return original.new_tensor(array)
    return array.astype(original.dtype, copy=False)
