"""Read JSON and YAML that others wrote: one reader, with limits, and one clear error for whatever is wrong.

A file is read whole, so its size is limited. So are the depth of what it contains and, because a YAML file of a few
bytes can stand for any number of values, how many values there are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from simomerge.core.errors import InputError
from simomerge.core.regular import check_regular
from simomerge.core.text import shown

MOST_BYTES = 100_000_000
"""The index of the shards of a model with a million tensors."""
MOST_YAML_BYTES = 20_000_000
"""A manifest of 200,000 images; reading one takes minutes already, and CSV files are read at once."""
DEEPEST = 50
MOST_VALUES = 5_000_000
_LARGEST = 2**64

Schema = Any
"""What a value must be: a type or a tuple of types; ``{"key": Schema}`` for a mapping with these keys, among others;
``{str: Schema}`` for a mapping with any keys; ``[Schema]`` for a list. A key that ends in ``?`` may be left out."""

_NAMES: dict[type, str] = {dict: "a mapping", list: "a list", str: "text", int: "a whole number", float: "a number"}
_NAMES[bool] = "true or false"


def read_json(path: Path, remedy: str, schema: Schema = dict) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        remedy: What to do if it cannot be read, appended to the error messages.
        schema: What it must contain; see `Schema`.

    Raises:
        InputError: The file is missing or too large, is not JSON, contains a key twice, a number that is not finite or
            half a character, or its values have other types.

    Example:
        >>> _ = Path("a.json").write_text('{"taps": [2, "4"]}')
        >>> read_json(Path("a.json"), "write it again.", {"taps": [int]})
        Traceback (most recent call last):
        simomerge.core.errors.InputError: a.json: cannot be read (taps[1] is '4', not a whole number); write it again.
    """
    text = read_text(path, remedy)
    try:
        content = json.loads(text, object_pairs_hook=_once, parse_constant=_finite)
        _check_values(content)
        check(content, schema)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{path}: cannot be read ({reason}); {remedy}") from error
    return content


def read_yaml(path: Path, hint: str) -> dict[str, Any]:
    """Read a YAML file that contains a mapping; as `read_yaml_value`. Raises InputError for another value, too."""
    content = read_yaml_value(path, hint)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no mapping; {hint}")
    return content


def read_yaml_value(path: Path, hint: str) -> Any:
    """Read a YAML file that contains any value; None if it is empty.

    Args:
        path: The file.
        hint: What to give instead, appended to the error messages.

    Raises:
        InputError: The file is missing or too large, is not YAML, contains a key twice, too many values or values that
            are neither text nor numbers.

    Example:
        >>> _ = Path("a.yaml").write_text("[2, depth]")
        >>> read_yaml_value(Path("a.yaml"), "give another file.")
        [2, 'depth']
    """
    import yaml

    from simomerge.core.yaml_loader import StrictLoader

    text = read_text(path, hint, MOST_YAML_BYTES)
    try:
        content = yaml.load(text, StrictLoader)
        _check_values(content)
    except RecursionError as error:
        raise InputError(f"{path}: not YAML (it is nested too deeply).") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:  # ValueError: an impossible date or number
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())}).") from error
    return content


def read_text(path: Path, hint: str, most: int = MOST_BYTES) -> str:
    """The text of a file in UTF-8 of at most ``most`` bytes. Raises InputError."""
    try:
        return read_bytes(path, hint, most).decode("utf-8")
    except UnicodeError as error:
        raise InputError(f"{path}: not text in UTF-8 ({error}); {hint}") from error


def read_bytes(path: Path, hint: str, most: int, smaller: str = "") -> bytes:
    """The content of a file of at most ``most`` bytes. Raises InputError; ``smaller`` is the hint for a larger one."""
    check_regular(path, hint)
    if not path.is_file():
        raise InputError(f"{path}: no such file; {hint}")
    try:
        size = path.stat().st_size
        if size > most:
            raise InputError(f"{path}: {size:,} bytes, but a file of this kind has at most {most:,}; {smaller or hint}")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); {hint}") from error


def check(value: Any, schema: Schema, place: str = "") -> None:
    """Raise ValueError if a value is not what a schema says; the message names its place.

    Example:
        >>> check({"taps": [2, 4]}, {"taps": [int], "mean?": [float]})
    """
    kind = type(schema) if isinstance(schema, (dict, list)) else schema
    if not _is_a(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(_NAMES.get(one, "null") for one in kinds)
        raise ValueError(f"{place or 'the content'} is {shown(value)}, not {wanted}")
    if isinstance(schema, list):
        for index, item in enumerate(value):
            check(item, schema[0], f"{place}[{index}]")
    elif isinstance(schema, dict):
        for key, inner in schema.items():
            if key is str:
                for name, item in value.items():
                    check(item, inner, f"{place}.{name}"[-200:].removeprefix("."))
                continue
            name = key.removesuffix("?")
            if name in value:
                check(value[name], inner, f"{place}.{name}".removeprefix("."))
            elif name == key:
                raise ValueError(f"entry {f'{place}.{name}'.removeprefix('.')!r} is missing")


def _is_a(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):  # Python counts it as a whole number
        return kind is bool or (isinstance(kind, tuple) and bool in kind)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


def _check_values(content: Any) -> None:
    """Raise ValueError if there are too many values or too deep ones, or some that are neither text nor numbers."""
    level: list[Any] = [content]
    count = 0
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, (dict, list)):
                inner.extend(value)
                inner.extend(value.values() if isinstance(value, dict) else ())
            elif isinstance(value, str):
                _check_text(value)
            elif isinstance(value, int) and abs(value) >= _LARGEST:
                raise ValueError("it contains a whole number of more than 64 bits")
            elif isinstance(value, float) and not math.isfinite(value):  # also 1e999
                raise ValueError(f"{value} is not a finite number")
            elif value is not None and not isinstance(value, (bool, int, float)):
                raise ValueError(f"{shown(value)} is a {type(value).__name__}: put it in quotes if it is meant as text")
            if count + len(inner) > MOST_VALUES:
                raise ValueError(f"it stands for more than {MOST_VALUES:,} values")
        if not inner:
            return
        level, count = inner, count + len(inner)
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")


def _check_text(text: str) -> None:
    if not text.isascii() and any("\ud800" <= sign <= "\udfff" for sign in text):
        raise ValueError(f"{shown(text)} contains half a character")


def _once(pairs: Iterable[tuple[str, Any]]) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} is given twice")
        found[key] = value
    return found


def _finite(constant: str) -> float:
    raise ValueError(f"{constant} is not a number in JSON")
