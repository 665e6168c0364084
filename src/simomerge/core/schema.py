"""YAML files that users write: strict reading, and suggestions for misspelt names."""

from __future__ import annotations

import difflib
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
