"""YAML files that users write: strict reading, and suggestions for misspelt names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from simomerge.core.errors import InputError


def read_yaml(path: Path, hint: str) -> dict[str, Any]:
    """Read a YAML file that contains a mapping.

    Args:
        path: The file.
        hint: What to give instead, appended to the error messages.

    Raises:
        InputError: The file is missing, is not YAML, contains a key twice, or does not contain a mapping.
    """
    import yaml

    if not path.is_file():
        raise InputError(f"{path}: no such file; {hint}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _strict_loader())
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are not UTF-8, or an impossible date
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no mapping; {hint}")
    return content


def _strict_loader() -> type:
    """YAML's safe loader, which in addition rejects duplicate keys."""
    import yaml

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise yaml.YAMLError(f"the key {twice[0]!r} is given twice, line {node.start_mark.line + 1}")
            return super().construct_mapping(node, deep)

    return Strict


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most similar to a misspelt one, or "" if none is similar.

    Example:
        >>> nearest("step", ["steps", "lr"])
        'steps'
    """
    return next(iter(difflib.get_close_matches(name, list(known), 1)), "")


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
    for one in error.errors():
        place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in one["loc"]).removeprefix(".")
        kind = one["type"]
        if kind in ("unexpected_keyword_argument", "extra_forbidden"):
            *parents, key = one["loc"]
            near = nearest(str(key), known(tuple(parents)))
            where = f"{'.'.join(map(str, parents))}: " if parents else ""
            found.append(f"{where}unknown key {key!r}" + (f" (did you mean {near!r}?)" if near else ""))
        elif kind == "value_error":
            message = str(one["ctx"]["error"]).rstrip(".")
            found.append(f"{place}: {message}" if place else message)
        else:
            wanted = _WANTED.get(kind.split("_")[0])
            remedy = f"give {wanted}" if wanted and kind.endswith(("_type", "_parsing", "_from_float")) else one["msg"]
            remedy = f"use at least {one['ctx']['ge']}" if kind == "greater_than_equal" else remedy
            remedy = f"use {one['ctx']['expected']}" if kind == "literal_error" else remedy
            found.append(f"{place} is {one['input']!r}; {remedy}")
    return found
