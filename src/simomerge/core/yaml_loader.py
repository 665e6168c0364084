"""YAML's safe loader, in addition strict and bounded. Importing this imports yaml."""

from __future__ import annotations

from typing import Any

import yaml

_MOST_MERGED = 10_000
"""Keys that ``<<`` may bring into one mapping. Each use copies the keys of a mapping, so nested ones multiply."""


_DEEPEST = 100


class StrictLoader(yaml.SafeLoader):
    """The loader. It rejects keys that are given twice, merges that multiply, and values that are nested too deeply."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > _DEEPEST:  # each level costs more than the one before
            raise yaml.YAMLError("it is nested too deeply")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def flatten_mapping(self, node: Any) -> None:
        before = len(node.value)
        super().flatten_mapping(node)
        if before < len(node.value) > _MOST_MERGED:
            raise yaml.YAMLError("'<<' brings too many keys into one mapping")

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(keys) > len(set(keys)):
            twice = next(key for place, key in enumerate(keys) if key in keys[:place])
            raise yaml.YAMLError(f"the key {twice!r} is given twice, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)
