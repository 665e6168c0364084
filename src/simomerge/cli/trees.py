"""Trees of shared blocks, as `--share` takes them, and how their weights are stored."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simomerge.core.errors import InputError

_REMEDY = "give a tree, such as '6: all | each' (docs/sharing.md)."

HALVES = {"F16": "float16", "BF16": "bfloat16"}
"""The half precisions of stored weights, and their names in torch."""


def half_precision_of(models: Iterable[Any]) -> str | None:
    """The half precision in which all floats of some checkpoints are stored; None if there is no such one."""
    infos = (weights.info(name) for weights in models for name in weights)
    found = {info.dtype for info in infos if info.is_float}
    return HALVES.get(found.pop()) if len(found) == 1 else None


def read_share(given: str) -> tuple[str, Any]:
    """Where the tree is that ``--share`` gives, and the tree as `simomerge.merge` takes it.

    Raises:
        InputError: It is neither a text with groups or a number nor a YAML file, or the file is missing or empty.

    Example:
        >>> read_share("6: all | each")
        ('--share', '6: all | each')
    """
    from simomerge.core.documents import read_yaml_value

    if Path(given).suffix.lower() in (".yaml", ".yml"):
        content = read_yaml_value(Path(given), _REMEDY)
        if content is None:
            raise InputError(f"{given}: empty; {_REMEDY}")
        return given, content
    if not re.search(r"[:|,+]|^\s*(all|each|-?\d+)\s*$", given):
        raise InputError(f"--share {given!r} is neither a tree nor a YAML file (.yaml or .yml); {_REMEDY}")
    return "--share", given


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Say where the tree is given in the messages about it."""
    from simomerge.merging.tree import TreeError

    try:
        yield
    except TreeError as error:
        raise InputError(f"{place}: {error}") from error
