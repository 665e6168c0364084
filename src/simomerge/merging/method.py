"""What a merge method is, and the registry of methods.

A method is a frozen dataclass: its fields are its parameters, its class attributes say where it comes from
and what it needs, and ``merge_tensor`` is the arithmetic. The command line, the recipe schema and the table
in the documentation are generated from it. A new method is one class with ``@register`` in front.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import numpy as np

from simomerge.core.errors import InputError
from simomerge.core.schema import nearest
from simomerge.merging.engine.stream import TaskVectorStream


def parameter(
    default: Any,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    per_expert: bool = False,
    per_block: bool = False,
    help: str,
) -> Any:
    """A dataclass field with a range: the default, what is allowed, and one line of help.

    Args:
        default: the value when none is given; its type (float, int, str) is the parameter's type.
        low, above, high: the value must be >= low, > above, <= high.
        choices: for a str, the values allowed.
        per_expert: also allow one value per expert, as a sequence in the experts' order or by expert name.
        per_block: by expert name, also allow a sequence of one value per block of the encoder.
        help: what it does, in one line.
    """
    limits = {"low": low, "above": above, "high": high, "choices": choices}
    shapes = {"per_expert": per_expert, "per_block": per_block}
    return field(default=default, metadata={**limits, **shapes, "help": help})


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
        for spec in settings(self):
            for value in _each(getattr(self, spec.name), spec):
                _check_value(self.name, spec, value)

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


def settings(method: MergeMethod | type[MergeMethod]) -> tuple[Field[Any], ...]:
    """The parameters of a method that a user types: all but given statistics (arrays by expert and tensor)."""
    return tuple(spec for spec in fields(method) if not spec.metadata.get("statistics"))


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


_METHODS: dict[str, type[MergeMethod]] = {}
_Method = TypeVar("_Method", bound=type[MergeMethod])


def register(method: _Method) -> _Method:
    """Class decorator: make a merge method available under its ``name``. Raises ValueError if it is taken."""
    if method.name in _METHODS:
        raise ValueError(f"A merge method named '{method.name}' is already registered.")
    _METHODS[method.name] = method
    return method


def available() -> dict[str, type[MergeMethod]]:
    """All merge methods, name -> dataclass, sorted by name.

    Example:
        >>> "ties" in available()
        True
    """
    return dict(sorted(_METHODS.items()))


def get_method(name: str, **parameters: Any) -> MergeMethod:
    """The merge method ``name`` with its parameters checked.

    Raises:
        InputError: an unknown method or parameter (the nearest name is suggested), or a value out of range.

    Example:
        >>> get_method("ties", density=0.1)
        Ties(density=0.1, scale=1.0, trim='global')
    """
    if name not in _METHODS:
        raise InputError(f"There is no merge method '{name}'{_suggest(name, available())}.")
    method = _METHODS[name]
    known = [spec.name for spec in fields(method)]
    for given in parameters:
        if given not in known:
            takes = _suggest(given, known) if known else ": it takes no parameters"
            raise InputError(f"The merge method '{name}' has no parameter '{given}'{takes}.")
    return method(**parameters)


def _suggest(given: str, known: Collection[str]) -> str:
    close = nearest(given, known)
    return f": did you mean '{close}'?" if close else f": choose from {', '.join(known)}"


def _each(value: Any, spec: Field[Any]) -> list[Any]:
    """The single values in a parameter: one, or one per expert."""
    if spec.metadata["per_expert"] and isinstance(value, Mapping):
        nested = spec.metadata.get("per_block", False)
        return [
            single
            for given in value.values()
            for single in (given if nested and isinstance(given, (list, tuple)) else (given,))
        ]
    if spec.metadata["per_expert"] and isinstance(value, Sequence) and not isinstance(value, str):
        return list(value)
    return [value]


def _check_value(method: str, spec: Field[Any], value: Any) -> None:
    low, above, high, choices = (spec.metadata[key] for key in ("low", "above", "high", "choices"))
    if isinstance(spec.default, str):
        valid = isinstance(value, str) and (choices is None or value in choices)
        allowed = f"one of {', '.join(choices or ())}"
    else:
        kinds = (int, np.integer) if isinstance(spec.default, int) else (int, float, np.integer, np.floating)
        valid = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
        valid = valid and (low is None or value >= low) and (above is None or value > above)
        valid = valid and (high is None or value <= high)
        bounds = ((low, "at least"), (above, "above"), (high, "at most"))
        limits = " and ".join(f"{word} {bound:g}" for bound, word in bounds if bound is not None)
        allowed = f"a number {limits}".strip()
    if not valid:
        raise InputError(f"{method}: {spec.name} must be {allowed}, got {value!r} ({spec.metadata['help']}).")


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
