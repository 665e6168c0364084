"""The base class of merge methods, and the registry that holds them.

A method is a frozen dataclass. Its fields are its parameters, its class attributes say where it comes from and what it
needs, and ``merge_tensor`` does the arithmetic. The command line, the recipe schema and the table in the documentation
are generated from it, so that a new method is one class with ``@register`` in front.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np

from simomerge.core.errors import InputError
from simomerge.core.registry import Registry, check_parameters, settings
from simomerge.merging.engine.stream import TaskVectors, TaskVectorStream

PerExpert: TypeAlias = float | Sequence[float] | Mapping[str, float]
"""One value for all experts, or one per expert: in the order of the experts, or by expert name."""

_Method = TypeVar("_Method", bound="MergeMethod")


class Provisional(ABC):
    """A merge that finds its last statistics while it merges: one pass fewer. See `MergeMethod.provisional`.

    Several threads may merge at the same time.
    """

    @abstractmethod
    def merge(self, base: np.ndarray, task_vectors: TaskVectors) -> tuple[np.ndarray, slice | None]:
        """Merge one block, once.

        Args:
            base, task_vectors: See `MergeMethod.merge_tensor`.

        Returns:
            The merged block, and the part of it that depends on blocks which were not merged yet (None if nothing
            does). In this part, entries may have the base's value.
        """

    @abstractmethod
    def statistics(self) -> Any:
        """What `MergeMethod.prepare` would have returned. Call it when every block has been merged."""


@dataclass(frozen=True)
class MergeMethod(ABC):
    """Base class of all merge methods. The module ``linear`` has the shortest ones.

    Class attributes: ``name``, ``paper`` and ``link`` (set by `register`), ``needs_base``, ``minimum_experts``,
    ``needs_data`` (images), ``needs_labels``, ``needs_statistics`` (a first pass over all tensors, see `prepare`), and
    ``elementwise``: each entry is merged independently of the others, so ``merge_tensor`` may receive flat blocks of a
    tensor, which stay in the cache of a core.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    link: ClassVar[str]
    needs_base: ClassVar[bool] = True
    minimum_experts: ClassVar[int] = 1
    needs_data: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    needs_statistics: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check every parameter. Raises InputError with the parameter, its range and the value."""
        check_parameters(self.name, self)

    def for_experts(self, experts: Sequence[str]) -> MergeMethod:
        """The same method, with every per-expert sequence or mapping turned into a dict by expert name.

        Raises:
            InputError: A sequence has another length than ``experts``, or a mapping has other names.
        """
        resolved = {name: _by_expert(name, value, experts) for name, value in _per_expert_values(self).items()}
        return replace(self, **resolved) if resolved else self

    def prepare(self, stream: TaskVectorStream) -> Any:
        """Compute the statistics of whole models that ``merge_tensor`` then receives, in a pass over all tensors."""
        return None

    def provisional(self, stream: TaskVectorStream) -> Provisional | None:
        """Prepare a merge that completes its own statistics, or None if that is impossible or would take longer.

        The engine merges every block with it, then merges the parts that it named again with the complete statistics.
        Only for methods that are ``elementwise``.
        """
        return None

    def shares(self, name: str, experts: Collection[str], statistics: Any) -> dict[str, float]:
        """The share of each expert in the running statistics of batch norms, which are averaged and not merged.

        Args:
            name: Canonical name of the running mean or variance.
            experts: Expert names, sorted.
            statistics: The result of `prepare`.

        Returns:
            Expert -> its share, 1 in total; empty if the result is the base's.
        """
        return dict.fromkeys(experts, 1 / len(experts))

    @abstractmethod
    def merge_tensor(self, name: str, base: np.ndarray, task_vectors: TaskVectors, statistics: Any) -> np.ndarray:
        """Merge one tensor. A pure function, which depends on other tensors only through ``statistics``.

        Args:
            name: Canonical (on-disk) name of the tensor.
            base: The base's tensor, float32, any shape; a flat block of it if the method is ``elementwise``. Read only.
            task_vectors: Expert name -> expert minus base, float32, with the shape of ``base``, sorted by name. The
                method may overwrite them.
            statistics: The result of `prepare`.

        Returns:
            The merged tensor, float32, with the shape of ``base``.
        """


def of_expert(value: Any, expert: str) -> Any:
    """The value of a per-expert parameter for one expert.

    Example:
        >>> of_expert(0.3, "depth"), of_expert({"depth": 0.5}, "depth")
        (0.3, 0.5)
    """
    return value[expert] if isinstance(value, Mapping) else value


def restricted(method: _Method, experts: Collection[str]) -> _Method:
    """The same method, with every per-expert mapping reduced to these experts.

    Example:
        >>> from simomerge.merging import TaskArithmetic
        >>> restricted(TaskArithmetic(scale={"depth": 0.5, "edges": 0.2}), ["depth"])
        TaskArithmetic(scale={'depth': 0.5})
    """
    mappings = {name: value for name, value in _per_expert_values(method).items() if isinstance(value, Mapping)}
    return replace(method, **{n: {e: v for e, v in given.items() if e in experts} for n, given in mappings.items()})


def _per_expert_values(method: MergeMethod) -> dict[str, Mapping[str, Any] | Sequence[Any]]:
    """The parameters that hold one value per expert, by parameter name."""
    values = {spec.name: getattr(method, spec.name) for spec in settings(method)}
    return {n: v for n, v in values.items() if isinstance(v, (Mapping, Sequence)) and not isinstance(v, str)}


def _by_expert(name: str, value: Mapping[str, Any] | Sequence[Any], experts: Sequence[str]) -> dict[str, Any]:
    listed = ", ".join(experts)
    if isinstance(value, Mapping):
        if set(value) != set(experts):
            given = ", ".join(map(str, value))
            raise InputError(f"{name} is given for {given}, but the experts are {listed}: give one value for each.")
        return {expert: value[expert] for expert in experts}
    if len(value) != len(experts):
        raise InputError(
            f"{name} has {len(value)} values for {len(experts)} experts ({listed}): give one value for each."
        )
    return dict(zip(experts, value, strict=True))


_REGISTRY: Registry[MergeMethod] = Registry("merge method")
register = _REGISTRY.register


def available() -> dict[str, type[MergeMethod]]:
    """The classes of all merge methods by name, sorted by name.

    Example:
        >>> "ties" in available()
        True
    """
    return _REGISTRY.available()


def get_method(name: str, **parameters: Any) -> MergeMethod:
    """The merge method with this name. Its parameters are checked.

    Raises:
        InputError: An unknown method or parameter (the nearest name is suggested), or a value out of range.

    Example:
        >>> get_method("ties", density=0.1)
        Ties(density=0.1, scale=1.0, trim='global')
    """
    return _REGISTRY.make(name, **parameters)
