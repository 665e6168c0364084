"""The base and the experts seen as one stream of tensors and their task vectors, read on demand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from simomerge.checkpoints import as_numpy, canonicalise, tensor_info
from simomerge.errors import InputError


class TaskVectorStream:
    """Read task vectors, tau = expert - base, one tensor at a time and in float32.

    Nothing is kept: reading a tensor twice reads it twice. The models must agree in names and shapes
    (``checks.check_models``).

    Args:
        base: name -> array or tensor, or a Checkpoint.
        experts: expert name -> the same kind of mapping.

    Attributes:
        experts: expert names, sorted, so that no result depends on the order in which they were given.
        names: canonical names of the float tensors, the ones that take part, in the base's order.
        sizes: canonical name -> number of entries.
        changed: the experts seen so far to differ from the base somewhere.

    Example:
        >>> stream = TaskVectorStream({"w": np.zeros(2)}, {"depth": {"w": np.ones(2)}})
        >>> stream.task_vector("depth", "w")
        array([1., 1.], dtype=float32)
    """

    def __init__(self, base: Mapping[str, Any], experts: Mapping[str, Mapping[str, Any]]) -> None:
        self._base, self._experts = base, experts
        self._base_names = canonicalise(base)
        self._expert_names = {expert: canonicalise(experts[expert]) for expert in experts}
        infos = {name: tensor_info(base, own) for name, own in self._base_names.items()}
        self.experts = tuple(sorted(experts))
        self.names = tuple(name for name, info in infos.items() if info.is_float)
        self.sizes = {name: infos[name].size for name in self.names}
        self.changed: set[str] = set()

    def base(self, name: str) -> np.ndarray:
        """The base's tensor, float32. Raises InputError if it holds a value that is not finite."""
        values = as_numpy(self._base[self._base_names[name]], name)
        if not _all_finite(values):
            raise InputError(f"'{name}' of the base holds NaN or infinite values: the checkpoint is damaged.")
        return values

    def task_vector(self, expert: str, name: str, base: np.ndarray | None = None) -> np.ndarray:
        """The expert's tensor minus the base's, float32.

        Args:
            base: the base's tensor, if it has been read already.

        Raises:
            InputError: the expert's tensor holds a value that is not finite.
        """
        base = self.base(name) if base is None else base
        tau = np.asarray(as_numpy(self._experts[expert][self._expert_names[expert][name]], name) - base)
        if not _all_finite(tau):
            raise InputError(
                f"'{name}' of the expert '{expert}' holds NaN or infinite values: "
                "its training diverged or the checkpoint is damaged."
            )
        if expert not in self.changed and tau.any():
            self.changed.add(expert)
        return tau

    def read(self, name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The base's tensor and every expert's task vector, sorted by expert name."""
        base = self.base(name)
        return base, {expert: self.task_vector(expert, name, base) for expert in self.experts}


def _all_finite(values: np.ndarray) -> bool:
    # The dot product with itself is finite only if every entry is, at a fraction of the cost of testing each;
    # it may overflow on large finite values, so a failure is looked at closely.
    flat = values.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.dot(flat, flat))) or bool(np.isfinite(flat).all())
