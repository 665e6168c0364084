"""Registry of methods: frozen dataclasses whose fields are typed parameters with ranges.

Merge methods and re-alignments register here. The command line, the recipe schema and the tables in the documentation
are generated from the dataclasses, so each method is described in one place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import Field, field, fields
from numbers import Integral, Real
from typing import Any, Generic, TypeVar

from simomerge.core.errors import InputError
from simomerge.core.schema import nearest
from simomerge.core.text import plain


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
    resource: bool = False,
    help: str,
) -> Any:
    """A dataclass field with a default, a range and one line of help.

    Args:
        default: The default value. Its type (float, int, str, bool) is the parameter's type unless ``kind`` is given.
        low, above, high: The value must be >= low, > above and <= high.
        choices: The allowed values of a str.
        kind: The parameter's type, where the default is None or one of ``words``. A default of None allows None.
        words: Texts that are allowed instead of a number, such as "auto".
        when: The parameter has an effect only if another parameter has one of these values.
        per_expert: Also allow one value per expert, as a sequence in the order of the experts or by expert name.
        per_block: With values by expert name, also allow a sequence with one value per block of the encoder.
        many: Also allow a sequence of values.
        resource: It decides time, memory or disk space, never a result; records and cache keys leave it out.
        help: What the parameter does, in one line.
    """
    limits = {"low": low, "above": above, "high": high, "choices": choices, "words": words}
    shapes = {"per_expert": per_expert, "per_block": per_block, "many": many, "resource": resource}
    type_ = kind or type(default)
    return field(default=default, metadata={**limits, **shapes, "kind": type_, "when": dict(when or {}), "help": help})


def settings(method: Any) -> tuple[Field[Any], ...]:
    """The fields of a method or its class that were made by `parameter`: the parameters that a user sets."""
    return tuple(spec for spec in fields(method) if "kind" in spec.metadata)


def check_parameters(name: str, method: Any) -> None:
    """Check every parameter of a method.

    Raises:
        InputError: A value is out of range. The message gives the parameter, what is allowed, and the value.
    """
    for spec in settings(method):
        for value in _single_values(getattr(method, spec.name), spec):
            if not _is_valid(spec, value):
                allowed = _allowed(spec)
                about = spec.metadata["help"].rstrip(".")
                raise InputError(f"{name}: {spec.name} must be {allowed}, got {value!r} ({about}).")


def _single_values(value: Any, spec: Field[Any]) -> list[Any]:
    """The single values of a parameter: one, several, one per expert, or one per expert and block."""
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
    """What a parameter may be, as the end of "must be"."""
    limits = spec.metadata
    if limits["kind"] is bool:
        return "true or false"
    if limits["kind"] is str:
        return f"one of {', '.join(limits['choices'] or ())}" if limits["choices"] else "text"
    bounds = ((limits["low"], "at least"), (limits["above"], "above"), (limits["high"], "at most"))
    words = " and ".join(f"{word} {bound:g}" for bound, word in bounds if bound is not None)
    return " or ".join([f"a number {words}".strip(), *map(repr, limits["words"])])


def range_text(spec: Field[Any]) -> str:
    """Default and range of a parameter for tables, such as ``0.2; > 0, <= 1``."""
    limits = spec.metadata
    text = plain(spec.default)
    if limits["choices"]:
        return f"{text}; {' or '.join(limits['choices'])}"
    if limits["kind"] in (str, bool):
        return text
    signs = ((limits["low"], ">="), (limits["above"], ">"), (limits["high"], "<="))
    bounds = ", ".join(f"{sign} {limit:g}" for limit, sign in signs if limit is not None)
    words = "".join(f", or {word}" for word in limits["words"])
    return f"{text}; {bounds or 'any'}{words}{', one or per expert' if limits['per_expert'] else ''}"


def summary(method: type) -> str:
    """The first paragraph of a class's docstring, as one line."""
    return " ".join((method.__doc__ or "").partition("\n\n")[0].split())


_T = TypeVar("_T")
_Class = TypeVar("_Class", bound="type[Any]")


class Registry(Generic[_T]):
    """Classes, found by name.

    Args:
        what: What the classes are, for messages, such as "merge method".

    Example:
        >>> registry = Registry("animal")
        >>> @registry.register("cat", "A book about cats", "https://example.org")
        ... class Cat: ...
        >>> registry.available()
        {'cat': <class 'simomerge.core.registry.Cat'>}
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._classes: dict[str, type[_T]] = {}

    def register(self, name: str, paper: str, link: str) -> Callable[[_Class], _Class]:
        """Class decorator that makes a class available by name; it sets the class attributes of these names.

        Args:
            name: What the user types.
            paper: The source: its title or short name, authors and year.
            link: Where to find the source.

        Raises:
            ValueError: The name is taken.
        """

        def add(method: _Class) -> _Class:
            for attribute, value in {"name": name, "paper": paper, "link": link}.items():
                setattr(method, attribute, value)
            if name in self._classes:
                raise ValueError(f"A {self.what} named '{name}' is already registered.")
            self._classes[name] = method
            return method

        return add

    def available(self) -> dict[str, type[_T]]:
        """All classes by name, sorted by name."""
        return dict(sorted(self._classes.items()))

    def find(self, name: str) -> type[_T]:
        """The class with this name. For an unknown name, raises InputError that suggests the nearest one."""
        if name not in self._classes:
            raise InputError(f"There is no {self.what} '{name}'{suggestion(name, self.available())}")
        return self._classes[name]

    def make(self, name: str, **parameters: Any) -> _T:
        """An instance of the class with this name; its parameters are checked.

        Raises:
            InputError: An unknown method or parameter (the nearest name is suggested), or a value out of range.
        """
        method: Any = self.find(name)
        check_known(f"The {self.what} '{name}'", parameters, [spec.name for spec in fields(method)])
        made: _T = method(**parameters)
        return made


def check_known(owner: str, given: Iterable[str], known: Collection[str], what: str = "parameter") -> None:
    """Check the names of parameters, or of other things that an owner takes.

    Raises:
        InputError: A name is unknown. The message gives the owner, the name and the nearest known one.

    Example:
        >>> check_known("export", ["dynamic"], ["precision", "dynamic"], "option")
    """
    for name in given:
        if name not in known:
            takes = suggestion(name, known) if known else f": it takes no {what}s."
            raise InputError(f"{owner} has no {what} '{name}'{takes}")


def suggestion(given: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name: the nearest known name, or else all of them; with its full stop."""
    close = nearest(given, known)
    return f": did you mean '{close}'?" if close else f": choose from {', '.join(known)}."
