"""Which block of the encoder a tensor belongs to, from its name alone."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBERED = re.compile(r"(?:^|\.)(?:layers?|blocks?|stages?|resblocks|h)\.(\d+)(?=\.)")


class Depth:
    """The encoder's blocks in order, found from the names of its tensors.

    A block is what the first two numbers in a name count (stage and block of a hierarchical encoder; a plain
    one has one number). What a stage holds beside its blocks, as its downsampling, goes with its last block.

    Args:
        names: canonical names of all tensors.

    Attributes:
        blocks: how many there are.

    Example:
        >>> depth = Depth(["embeddings.cls_token", "encoder.layer.0.norm1.bias", "encoder.layer.1.norm1.bias"])
        >>> depth.blocks, depth.index("encoder.layer.1.norm1.bias"), depth.index("embeddings.cls_token")
        (2, 1, None)
    """

    def __init__(self, names: Iterable[str]) -> None:
        keys = sorted({key for name in names if (key := _key(name))})
        longest = max(map(len, keys), default=0)
        whole = [key for key in keys if len(key) == longest]
        self.blocks = len(whole)
        self._index = {key: place for place, key in enumerate(whole)}
        for key in keys:
            inside = [self._index[block] for block in whole if block[: len(key)] == key]
            self._index.setdefault(key, max(inside, default=0))

    def index(self, name: str) -> int | None:
        """0 to ``blocks - 1``, or None for a tensor outside all blocks (embeddings, final norm)."""
        return self._index.get(_key(name))

    def position(self, name: str) -> int:
        """As :meth:`index`, but embeddings count to the first block and all else outside to the last."""
        index = self.index(name)
        if index is None:
            index = 0 if any(word in name for word in ("embed", "stem", "token", "pre_l")) else self.blocks - 1
        return max(index, 0)


def _key(name: str) -> tuple[int, ...]:
    return tuple(int(number) for number in _NUMBERED.findall(name)[:2])
