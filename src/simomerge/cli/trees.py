"""Trees of shared blocks, as `--share` takes them, and how their weights are stored."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simomerge.core.errors import InputError

_REMEDY = "give a tree, such as '6: all | each' (docs/sharing.md)."


def stored_dtype(checkpoints: Iterable[Any]) -> str | None:
    """The dtype, by its name in torch, in which all floats of some checkpoints are stored; None if they differ."""
    from simomerge.checkpoints.tensors import common_float

    return common_float(weights.info(name) for weights in checkpoints for name in weights)


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
