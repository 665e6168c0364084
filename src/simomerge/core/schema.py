"""Values that users write: suggestions for misspelt names, plain values, and what pydantic finds wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from numbers import Integral
from typing import Any

from simomerge.core.errors import InputError
from simomerge.core.text import shown


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most similar to a misspelt one, or "" if none is similar.

    Example:
        >>> nearest("step", ["steps", "lr"])
        'steps'
    """
    return next(iter(difflib.get_close_matches(name, list(known), 1)), "")


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Check a whole number, such as ``count``. Raises InputError that names it, unless it is ``least`` or more.

    Example:
        >>> check_whole("count", 8)
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} is {shown(value)}; give a whole number of {least} or more.")


def plain_value(value: Any) -> Any:
    """A YAML value of unknown type: text with a number becomes the number (YAML reads 1e-3 as text), lists tuples.

    Example:
        >>> plain_value("1e-3"), plain_value("16"), plain_value([1, "a"]), plain_value("true")
        (0.001, 16, (1, 'a'), True)
    """
    if isinstance(value, dict):
        return {key: plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(map(plain_value, value))
    if not isinstance(value, str):
        return value
    if value in ("true", "false"):
        return value == "true"
    if re.fullmatch(r"[+-]?\d+", value):
        return int(value)
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value):
        return float(value)
    return value


_MOST_PROBLEMS = 20
_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "bool": "true or false",
    "dict": "a mapping",
    "tuple": "a list",
    "list": "a list",
    "dataclass": "a mapping",
}


def validation_problems(error: Any, known: Any) -> list[str]:
    """What a pydantic ValidationError says, a sentence each without its full stop, with the nearest known key.

    Args:
        error: The `pydantic.ValidationError`.
        known: A function from the place of an unknown key (a tuple of keys) to the keys that are known there.
    """
    found = []
    for one in error.errors()[:_MOST_PROBLEMS]:
        place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in one["loc"]).removeprefix(".")
        kind = one["type"]
        if kind in ("unexpected_keyword_argument", "extra_forbidden"):
            *parents, key = one["loc"]
            near = nearest(str(key), known(tuple(parents)))
            where = f"{'.'.join(map(str, parents))}: " if parents else ""
            found.append(f"{where}unknown key {shown(key)}" + (f" (did you mean {near!r}?)" if near else ""))
        elif kind == "value_error":
            message = str(one["ctx"]["error"]).rstrip(".")
            found.append(f"{place}: {message}" if place else message)
        else:
            wanted = _WANTED.get(kind.split("_")[0])
            remedy = f"give {wanted}" if wanted and kind.endswith(("_type", "_parsing", "_from_float")) else one["msg"]
            remedy = f"use at least {one['ctx']['ge']}" if kind == "greater_than_equal" else remedy
            remedy = f"use {one['ctx']['expected']}" if kind == "literal_error" else remedy
            found.append(f"{place} is {shown(one['input'])}; {remedy}")
    return found
