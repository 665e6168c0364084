"""The base and the experts as one stream of tensors and their task vectors, read on demand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

import numpy as np

from simomerge.checkpoints import as_numpy, canonicalise, flat_values, tensor_info
from simomerge.checkpoints.names import is_running_statistic
from simomerge.checkpoints.parts import separated
from simomerge.core.errors import InputError
from simomerge.core.parallel import ordered_map
from simomerge.merging.engine.depth import Depth

BLOCK = 1 << 17
"""Number of entries processed at once by methods that need no whole tensors. They stay in the cache of a core."""

TaskVectors: TypeAlias = Mapping[str, np.ndarray]
"""Expert name -> expert minus base, float32, sorted by name."""

_Result = TypeVar("_Result")


class TaskVectorStream:
    """Read task vectors, tau = expert - base, one tensor or one block at a time, in float32.

    Nothing is cached: to read a tensor twice is to load it twice. The models must agree in names and shapes (see
    `checks.check_models`). Several threads may read at the same time.

    Args:
        base: name -> array or tensor, or a Checkpoint.
        experts: Expert name -> the same kind of mapping. If an expert has a method ``task_vector(name)`` (an adapter of
            low-rank factors), it is used, because it is more exact than adding to the base and subtracting again.
        threads: The number of threads of `map`; all cores by default.
        blocks: Names of the modules that are the encoder's blocks, if it declares them; see `Depth`.

    Attributes:
        experts: Expert names, sorted, so that no result depends on the order in which they were given.
        names: Canonical names of the float tensors, which are the ones to merge, in the base's order. A tensor that is
            one on disk and several in memory appears by its parts (see `simomerge.checkpoints.parts`).
        averaged: Canonical names of the running statistics of batch norms, which are not among ``names``.
        shapes: Canonical name -> shape, of ``names`` and ``averaged``.
        sizes: Canonical name -> number of entries, of ``names``.
        changed: The experts found so far to differ from the base.
        checked: True once every value has been read and is known to be finite. Later passes skip the check.

    Example:
        >>> stream = TaskVectorStream({"w": np.zeros(2)}, {"depth": {"w": np.ones(2)}})
        >>> stream.task_vector("depth", "w")
        array([1., 1.], dtype=float32)
    """

    def __init__(
        self,
        base: Mapping[str, Any],
        experts: Mapping[str, Mapping[str, Any]],
        threads: int | None = None,
        blocks: Sequence[str] = (),
    ) -> None:
        self._given_base, self._base, self._threads, self._blocks = base, separated(base), threads, blocks
        self._experts = {expert: separated(tensors) for expert, tensors in experts.items()}
        self._base_names = canonicalise(self._base)
        self._expert_names = {expert: canonicalise(tensors) for expert, tensors in self._experts.items()}
        infos = {name: tensor_info(self._base, own) for name, own in self._base_names.items()}
        floats = [name for name, info in infos.items() if info.is_float]
        self.experts = tuple(sorted(experts))
        self.names = tuple(name for name in floats if not is_running_statistic(name))
        self.averaged = tuple(name for name in floats if is_running_statistic(name))
        self.shapes = {name: infos[name].shape for name in floats}
        self.sizes = {name: infos[name].size for name in self.names}
        self.changed: set[str] = set()
        self.checked = False

    @cached_property
    def depth(self) -> Depth:
        """The encoder's blocks. Raises InputError if no tensor is in one that it declares."""
        return Depth(self.names, self._blocks, self._base_names)

    def base(self, name: str, part: slice | None = None) -> np.ndarray:
        """The base's tensor, float32; with ``part``, that part of the flattened tensor.

        Raises:
            InputError: The tensor contains NaN or infinite values.
        """
        values = _values(self._base, self._base_names[name], part)
        if not all_finite(values):
            raise InputError(
                f"'{name}' of the base{_place(self._base)} holds NaN or infinite values: the checkpoint is damaged."
            )
        return values

    def task_vector(
        self, expert: str, name: str, base: np.ndarray | None = None, part: slice | None = None
    ) -> np.ndarray:
        """The expert's tensor minus the base's, float32; with ``part``, that part of the flattened tensor.

        Args:
            base: The base's tensor (or that part of it), if it has been read already.

        Raises:
            InputError: The expert's tensor contains NaN or infinite values.
        """
        base = self.base(name, part) if base is None else base
        tau = self._difference(expert, name, base, part)
        if not all_finite(tau):
            raise InputError(
                f"'{name}' of the expert '{expert}'{_place(self._experts[expert])} holds NaN or infinite values: "
                "its training diverged or the checkpoint is damaged."
            )
        self._note_change(expert, tau)
        return tau

    def _difference(
        self, expert: str, name: str, base: np.ndarray, part: slice | None, out: np.ndarray | None = None
    ) -> np.ndarray:
        source, own = self._experts[expert], self._expert_names[expert][name]
        # Low-rank factors are relative to the base of the adapter, which need not be the base of this stream.
        low_rank = getattr(source, "task_vector", None) if getattr(source, "base", None) is self._given_base else None
        tau = low_rank(own) if callable(low_rank) else None
        if tau is None:
            return np.subtract(_values(source, own, part), base, out=np.empty_like(base) if out is None else out)
        return tau if part is None else np.ascontiguousarray(tau.reshape(-1)[part])  # A view would keep all of it.

    def _note_change(self, expert: str, tau: np.ndarray) -> None:
        if expert not in self.changed and tau.any():
            self.changed.add(expert)

    def read(self, name: str, part: slice | None = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The base's tensor and the task vector of every expert, sorted by name; with ``part``, parts of them, flat."""
        base = self.base(name, part)
        return base, {expert: self.task_vector(expert, name, base, part) for expert in self.experts}

    def average(self, name: str, shares: Mapping[str, float]) -> np.ndarray:
        """A running statistic averaged over the experts, float32; the base's if there are no shares.

        Args:
            shares: Expert -> its share. They add up to 1.

        Raises:
            InputError: A value is not finite.
        """
        base, _ = self.read(name)  # raises for values that are not finite
        if not shares:
            return base.copy()
        # From the values themselves: a sum of rounded differences could make a variance negative.
        values = [
            share * _values(self._experts[expert], self._expert_names[expert][name], None).astype(np.float64)
            for expert, share in shares.items()
        ]
        return np.asarray(np.sum(values, axis=0), np.float32)

    def read_blocks(self, name: str) -> Iterator[tuple[slice, np.ndarray, dict[str, np.ndarray]]]:
        """Read a flattened tensor block by block: the part, the base and the task vectors, sorted by expert name.

        The task vectors are valid until the next block is read, because all blocks use the same memory. New arrays for
        every block would cost more than the arithmetic.

        Example:
            >>> stream = TaskVectorStream({"w": np.zeros(300_000)}, {})
            >>> [part.stop for part, _, _ in stream.read_blocks("w")]
            [131072, 262144, 300000]
        """
        size = self.sizes[name]
        # Low-rank factors are multiplied for the whole tensor. In blocks, they would be multiplied for every block.
        step = size if any(hasattr(e, "task_vector") for e in self._experts.values()) else min(BLOCK, size)
        workspace = np.empty((len(self.experts), step), np.float32)
        for start in range(0, size, max(step, 1)):
            part = slice(start, min(start + step, size))
            yield part, *self._read_into(workspace, name, part)

    def _read_into(self, workspace: np.ndarray, name: str, part: slice) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        # Threads hand over the interpreter lock between calls of numpy, so a few long calls are faster than many short
        # ones. One check covers all models: if a value of the base or an expert is not finite, nor is the difference.
        base = _values(self._base, self._base_names[name], part)
        rows = workspace[:, : base.size]
        taus = {e: self._difference(e, name, base, part, row) for e, row in zip(self.experts, rows, strict=True)}
        # Task vectors of low-rank factors are not computed from the base, so the base is then checked as well.
        in_workspace = all(tau.base is workspace for tau in taus.values())
        to_check = [rows] if in_workspace else [base, *taus.values()]
        if not (self.checked or all(map(all_finite, to_check))):
            return self.read(name, part)  # Raises the error for the tensor at fault.
        for expert, tau in taus.items():
            self._note_change(expert, tau)
        return base, taus

    def map(self, function: Callable[[str], _Result]) -> Iterator[tuple[str, _Result]]:
        """``(name, function(name))`` for every tensor, in order, computed on all cores and only a few ahead."""

        def quiet(name: str) -> _Result:
            with np.errstate(over="ignore", invalid="ignore"):  # The check for finite values may overflow.
                return function(name)

        return zip(self.names, ordered_map(quiet, self.names, self._threads), strict=True)


def stacked(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays of one shape as one array (T, ...), without a copy if they are the rows that `read_blocks` filled.

    Example:
        >>> stacked([np.zeros(2), np.ones(2)]).shape
        (2, 2)
    """
    workspace = arrays[0].base
    if isinstance(workspace, np.ndarray) and workspace.ndim == 2 and len(workspace) == len(arrays):
        begin, (row, entry) = workspace.__array_interface__["data"][0], workspace.strides
        places = (begin + row * number for number in range(len(arrays)))
        if all(
            array.base is workspace and array.strides == (entry,) and array.__array_interface__["data"][0] == place
            for array, place in zip(arrays, places, strict=True)
        ):
            return workspace[:, : arrays[0].size]
    return np.stack(arrays)


def _values(source: Mapping[str, Any], name: str, part: slice | None) -> np.ndarray:
    # At least 1-D: numpy's arithmetic turns an array without axes into a number, which cannot be written to.
    return np.atleast_1d(as_numpy(source[name], name)) if part is None else flat_values(source, name, part)


def _place(source: Mapping[str, Any]) -> str:
    path = getattr(source, "path", None)
    return f" ({path})" if path is not None else ""


def all_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite."""
    # The dot product with itself is finite only if every entry is, and costs a fraction of testing each entry. It may
    # overflow for large finite values, so a failure is tested entry by entry.
    if values.ndim > 1 and not values.flags.c_contiguous:
        return all(map(all_finite, values))
    flat = values.reshape(-1)
    return math.isfinite(np.dot(flat, flat)) or bool(np.isfinite(flat).all())
