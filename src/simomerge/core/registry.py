"""Methods by name: frozen dataclasses whose fields are typed parameters with ranges.

Merge methods and re-alignments are both registered here. The command line, the recipe schema and the tables in the
documentation are generated from the dataclasses, so a method is known by its registry entry and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, field, fields
from numbers import Integral, Real
from typing import Any, Generic, TypeVar

from simomerge.core.errors import InputError
from simomerge.core.schema import nearest


def parameter(
    default: Any,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    kind: type | None = None,
    words: tuple[str, ...] = (),
    when: Mapping[str, tuple[str, ...]] | None = None,
    per_expert: bool = False,
    per_block: bool = False,
    many: bool = False,
    help: str,
) -> Any:
    """A dataclass field with a range: the default, what is allowed, and one line of help.

    Args:
        default: The value when none is given. Its type (float, int, str) is the parameter's type unless ``kind`` says
            otherwise.
        low, above, high: The value must be >= low, > above, <= high.
        choices: The values allowed for a str.
        kind: The type where the default is None or one of ``words``. None then is allowed as a value.
        words: Text that is allowed in the place of a number, such as "auto".
        when: The parameter has an effect only where another parameter has one of these values.
        per_expert: Also allow one value per expert, as a sequence in the experts' order or by expert name.
        per_block: By expert name, also allow a sequence of one value per block of the encoder.
        many: Also allow a sequence of values.
        help: What it does, in one line.
    """
    limits = {"low": low, "above": above, "high": high, "choices": choices, "words": words}
    shapes = {"per_expert": per_expert, "per_block": per_block, "many": many}
    wanted = kind or type(default)
    return field(default=default, metadata={**limits, **shapes, "kind": wanted, "when": dict(when or {}), "help": help})


def settings(method: Any) -> tuple[Field[Any], ...]:
    """The parameters of a method, or of its class, that a user types: the fields made by `parameter`."""
    return tuple(spec for spec in fields(method) if "kind" in spec.metadata)


def check_parameters(name: str, method: Any) -> None:
    """Check every parameter of a method.

    Raises:
        InputError: A value out of range; the message names the parameter, what is allowed, and the value.
    """
    for spec in settings(method):
        for value in _single_values(getattr(method, spec.name), spec):
            if not _is_valid(spec, value):
                allowed = _allowed(spec)
                about = spec.metadata["help"].rstrip(".")
                raise InputError(f"{name}: {spec.name} must be {allowed}, got {value!r} ({about}).")


def _single_values(value: Any, spec: Field[Any]) -> list[Any]:
    """The single values in a parameter: one, several, one per expert, or one per expert and block."""
    if spec.metadata["many"] and isinstance(value, (list, tuple)):
        return list(value)
    if not spec.metadata["per_expert"] or isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        nested = spec.metadata["per_block"]
        each = (given if nested and isinstance(given, (list, tuple)) else (given,) for given in value.values())
        return [single for given in each for single in given]
    return list(value) if isinstance(value, Sequence) else [value]


def _is_valid(spec: Field[Any], value: Any) -> bool:
    limits = spec.metadata
    if (value is None and spec.default is None) or (isinstance(value, str) and value in limits["words"]):
        return True
    if limits["kind"] is bool:
        return isinstance(value, bool)
    if limits["kind"] is str:
        return isinstance(value, str) and (limits["choices"] is None or value in limits["choices"])
    if not isinstance(value, Integral if limits["kind"] is int else Real) or isinstance(value, bool):
        return False
    low, above, high = limits["low"], limits["above"], limits["high"]
    fits = (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)
    return math.isfinite(value) and fits


def _allowed(spec: Field[Any]) -> str:
    limits = spec.metadata
    if limits["kind"] is bool:
        return "true or false"
    if limits["kind"] is str:
        return f"one of {', '.join(limits['choices'] or ())}" if limits["choices"] else "text"
    bounds = ((limits["low"], "at least"), (limits["above"], "above"), (limits["high"], "at most"))
    words = " and ".join(f"{word} {bound:g}" for bound, word in bounds if bound is not None)
    return " or ".join([f"a number {words}".strip(), *map(repr, limits["words"])])


def range_text(spec: Field[Any]) -> str:
    """Default and range of a parameter, for tables: ``0.2; > 0, ≤ 1``."""
    limits = spec.metadata
    text = f"{spec.default!r}" if isinstance(spec.default, str) else f"{spec.default}"
    if limits["choices"]:
        return f"{text}; {' or '.join(limits['choices'])}"
    if limits["kind"] in (str, bool):
        return text
    signs = ((limits["low"], "≥"), (limits["above"], ">"), (limits["high"], "≤"))
    bounds = ", ".join(f"{sign} {limit:g}" for limit, sign in signs if limit is not None)
    words = "".join(f", or {word}" for word in limits["words"])
    return f"{text}; {bounds or 'any'}{words}{', one or per expert' if limits['per_expert'] else ''}"


def summary(method: type) -> str:
    """The first paragraph of a class's docstring, in one line."""
    return " ".join((method.__doc__ or "").partition("\n\n")[0].split())


_T = TypeVar("_T")


class Registry(Generic[_T]):
    """Classes by their ``name``.

    Args:
        what: What the classes are, for messages: "merge method".

    Example:
        >>> registry = Registry("animal")
        >>> @registry.register
        ... class Cat:
        ...     name = "cat"
        >>> registry.available()
        {'cat': <class 'simomerge.core.registry.Cat'>}
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._classes: dict[str, type[_T]] = {}

    def register(self, method: Any) -> Any:
        """Class decorator: make a class available under its ``name``. Raises ValueError if the name is taken."""
        if method.name in self._classes:
            raise ValueError(f"A {self.what} named '{method.name}' is already registered.")
        self._classes[method.name] = method
        return method

    def available(self) -> dict[str, type[_T]]:
        """All classes, name -> class, sorted by name."""
        return dict(sorted(self._classes.items()))

    def find(self, name: str) -> type[_T]:
        """The class ``name``. Raises InputError, with the nearest name, where there is none."""
        if name not in self._classes:
            raise InputError(f"There is no {self.what} '{name}'{suggestion(name, self.available())}.")
        return self._classes[name]

    def make(self, name: str, **parameters: Any) -> _T:
        """The method ``name`` with its parameters checked.

        Raises:
            InputError: An unknown method or parameter (the nearest name is suggested), or a value out of range.
        """
        method: Any = self.find(name)
        known = [spec.name for spec in fields(method)]
        for given in parameters:
            if given not in known:
                takes = suggestion(given, known) if known else ": it takes no parameters"
                raise InputError(f"The {self.what} '{name}' has no parameter '{given}'{takes}.")
        made: _T = method(**parameters)
        return made


def suggestion(given: str, known: Collection[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, or all of them."""
    close = nearest(given, known)
    return f": did you mean '{close}'?" if close else f": choose from {', '.join(known)}"
