"""Find the block of the encoder that a tensor belongs to, from its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from simomerge.core.errors import InputError

_NUMBERED = re.compile(r"(?:^|\.)(?:layers?|blocks?|stages?|resblocks|h)\.(\d+)(?=\.)")


class Depth:
    """The encoder's blocks in order, found from the names of its tensors, or as the encoder declares them.

    In names, a block is identified by the first two numbers: the stage and the block of a hierarchical encoder, or the
    block alone. Other tensors of a stage, such as its downsampling, belong to the last block of the stage.

    Args:
        names: Canonical names of all tensors.
        declared: Names of the modules that are the blocks, in order, for an encoder that declares them.
        own: Canonical name -> name in the encoder, which says its block; by default both are the same.

    Attributes:
        blocks: The number of blocks.

    Raises:
        InputError: No tensor is in a declared block.

    Example:
        >>> depth = Depth(["embeddings.cls_token", "encoder.layer.0.norm1.bias", "encoder.layer.1.norm1.bias"])
        >>> depth.blocks, depth.index("encoder.layer.1.norm1.bias"), depth.index("embeddings.cls_token")
        (2, 1, None)
        >>> depth = Depth(["stem.weight", "down.weight"], declared=("stem", "down"))
        >>> depth.blocks, depth.index("down.weight")
        (2, 1)
    """

    def __init__(
        self, names: Iterable[str], declared: Sequence[str] = (), own: Mapping[str, str] | None = None
    ) -> None:
        self._declared, self._own = tuple(declared), own or {}
        keys = sorted({key for name in names if (key := self._key(name))})
        if declared and not keys:
            raise InputError(
                f"no tensor is in a block that the encoder declares ({', '.join(declared[:3])}); give weights with the"
                " names of this encoder."
            )
        longest = max(map(len, keys), default=0)
        blocks: list[tuple[int, ...]] = [(place,) for place in range(len(declared))]
        blocks = blocks or [key for key in keys if len(key) == longest]
        self.blocks = len(blocks)
        self._index = {key: index for index, key in enumerate(blocks)}
        for key in keys:
            inside = [self._index[block] for block in blocks if block[: len(key)] == key]
            self._index.setdefault(key, max(inside, default=0))

    def index(self, name: str) -> int | None:
        """0 to ``blocks - 1``, or None for a tensor outside all blocks (embeddings, final norm)."""
        return self._index.get(self._key(name))

    def position(self, name: str) -> int:
        """Like `index`, but embeddings count as the first block and other tensors outside the blocks as the last."""
        index = self.index(name)
        if index is None:
            index = 0 if comes_first(name) else self.blocks - 1
        return max(index, 0)

    def _key(self, name: str) -> tuple[int, ...]:
        """What identifies a tensor's block: its place among the declared ones, or the numbers in the name."""
        own = self._own.get(name, name)
        if self._declared:
            return tuple(place for place, block in enumerate(self._declared) if own.startswith(f"{block}."))
        return tuple(int(number) for number in _NUMBERED.findall(own)[:2])


def comes_first(name: str) -> bool:
    """Whether a tensor outside all blocks belongs before the first one, judged by its name.

    A table of relative positions that all blocks share does, too.
    """
    return any(word in name for word in ("embed", "stem", "token", "pre_l", "position_bias"))
