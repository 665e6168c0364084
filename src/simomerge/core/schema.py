"""Files of keys and values that people write by hand: reading them, and the nearest name to one that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from simomerge.core.errors import InputError


def read_yaml(path: Path, hint: str) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        InputError: no such file, no YAML, or no mapping; ``hint`` ends the sentence.
    """
    import yaml

    if not path.is_file():
        raise InputError(f"{path}: no such file; {hint}")
    try:
        said = yaml.load(path.read_text(encoding="utf-8"), _strict_loader())
    except (yaml.YAMLError, ValueError) as error:  # the latter: other bytes than UTF-8, the 31st of February
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(said, dict):
        raise InputError(f"{path}: holds no mapping; {hint}")
    return said


def _strict_loader() -> type:
    """YAML's safe loader, but of a key that is given twice it takes neither."""
    import yaml

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise yaml.YAMLError(f"the key {twice[0]!r} is given twice, line {node.start_mark.line + 1}")
            return super().construct_mapping(node, deep)

    return Strict


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like a misspelt one; empty where none is.

    Example:
        >>> nearest("step", ["steps", "lr"])
        'steps'
    """
    return next(iter(difflib.get_close_matches(name, list(known), 1)), "")
