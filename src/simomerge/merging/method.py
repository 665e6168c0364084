"""What a merge method is, and the registry of methods.

A method is a frozen dataclass: its fields are its parameters, its class attributes say where it comes from
and what it needs, and ``merge_tensor`` is the arithmetic. The command line, the recipe schema and the table
in the documentation are generated from it. A new method is one class with ``@register`` in front.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import numpy as np

from simomerge.core.errors import InputError
from simomerge.core.registry import Registry, check_parameters, settings
from simomerge.merging.engine.stream import TaskVectorStream


@dataclass(frozen=True)
class MergeMethod:
    """Base of all merge methods; see the module ``linear`` for the shortest ones.

    Class attributes: ``name`` (what the user types), ``paper`` and ``link`` (its source), ``needs_base``,
    ``minimum_experts``, ``needs_data`` (images), ``needs_labels``, ``needs_statistics`` (a first pass over
    all tensors, :meth:`prepare`), ``elementwise`` (``merge_tensor`` treats every entry by itself and is given
    flat blocks of a tensor, which stay in a core's cache).
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
        """Check every parameter. Raises InputError that names the parameter, its range and the value."""
        check_parameters(self.name, self)

    def for_experts(self, experts: Sequence[str]) -> MergeMethod:
        """The same method with every per-expert sequence or mapping turned into a dict by expert name.

        Raises:
            InputError: a sequence of another length than ``experts``, or a mapping with other names.
        """
        resolved = {}
        for spec in settings(self):
            value = getattr(self, spec.name)
            if isinstance(value, Mapping) or (isinstance(value, Sequence) and not isinstance(value, str)):
                resolved[spec.name] = _by_expert(spec.name, value, experts)
        return replace(self, **resolved) if resolved else self

    def prepare(self, stream: TaskVectorStream) -> Any:
        """First pass over all tensors: the global statistics that ``merge_tensor`` is then given."""
        return None

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: Mapping[str, np.ndarray], statistics: Any
    ) -> np.ndarray:
        """Merge one tensor; pure, and independent of the other tensors but for ``statistics``.

        Args:
            name: canonical (on-disk) name of the tensor.
            base: float32, any shape, or (``elementwise``) a flat block of it; not to be written to.
            task_vectors: expert name -> expert minus base, float32, the shape of ``base``; sorted by name. The
                method may overwrite them.
            statistics: what :meth:`prepare` returned.

        Returns:
            The merged tensor, float32, the shape of ``base``.
        """
        raise NotImplementedError


def of_expert(value: float | Mapping[str, float], expert: str) -> float:
    """The value of a per-expert parameter for one expert.

    Example:
        >>> of_expert(0.3, "depth"), of_expert({"depth": 0.5}, "depth")
        (0.3, 0.5)
    """
    return value[expert] if isinstance(value, Mapping) else value


_Given = TypeVar("_Given", bound=MergeMethod)


def restricted(method: _Given, experts: Collection[str]) -> _Given:
    """The same method with every per-expert mapping cut to these experts.

    Example:
        >>> from simomerge.merging import TaskArithmetic
        >>> restricted(TaskArithmetic(scale={"depth": 0.5, "edges": 0.2}), ["depth"])
        TaskArithmetic(scale={'depth': 0.5})
    """
    values = {spec.name: getattr(method, spec.name) for spec in settings(method)}
    mappings = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    return replace(method, **{n: {e: v for e, v in given.items() if e in experts} for n, given in mappings.items()})


_REGISTRY: Registry[MergeMethod] = Registry("merge method")
_Method = TypeVar("_Method", bound=type[MergeMethod])


def register(method: _Method) -> _Method:
    """Class decorator: make a merge method available under its ``name``. Raises ValueError if the name is taken."""
    registered: _Method = _REGISTRY.register(method)
    return registered


def available() -> dict[str, type[MergeMethod]]:
    """All merge methods, name -> dataclass, sorted by name.

    Example:
        >>> "ties" in available()
        True
    """
    return _REGISTRY.available()


def get_method(name: str, **parameters: Any) -> MergeMethod:
    """The merge method ``name`` with its parameters checked.

    Raises:
        InputError: An unknown method or parameter (the nearest name is suggested), or a value out of range.

    Example:
        >>> get_method("ties", density=0.1)
        Ties(density=0.1, scale=1.0, trim='global')
    """
    return _REGISTRY.make(name, **parameters)


def _by_expert(name: str, value: Mapping[str, float] | Sequence[float], experts: Sequence[str]) -> dict[str, float]:
    listed = ", ".join(experts)
    if isinstance(value, Mapping):
        if set(value) != set(experts):
            raise InputError(
                f"{name} is given for {', '.join(map(str, value))}, but the experts are {listed}: "
                "give one value for each."
            )
        return {expert: value[expert] for expert in experts}
    if len(value) != len(experts):
        raise InputError(
            f"{name} has {len(value)} values for {len(experts)} experts ({listed}): give one value for each."
        )
    return dict(zip(experts, value, strict=True))
