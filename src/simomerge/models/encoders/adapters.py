"""Low-rank adapters in parallel to the blocks of an encoder: ``block'(x) = block(x) + B A x``.

Source: "Single-Input Multi-Output Model Merging" (arXiv 2504.11268), representation re-alignment. The paper
writes ``B A x``; its reference code puts a ReLU between A and B. ``activation`` chooses between the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simomerge.core.errors import InputError
from simomerge.models.encoders.layout import BlockShape


class Adapter(nn.Module):
    """One low-rank map ``B f(A x)`` of tokens (B, N, C) or maps (B, C, h, w). B starts at zero, so the map does too.

    Next to a block that halves the size of its input, for example, the adapter reads means over 2 x 2 places.
    """

    def __init__(self, shape: BlockShape, rank: int, activation: str) -> None:
        super().__init__()
        self.down = nn.Linear(shape.before, rank, bias=False)
        self.up = nn.Linear(rank, shape.after, bias=False)
        self.stride = shape.stride
        self.relu = activation == "relu"
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, self.stride) if self.stride > 1 else x
        hidden = self.down(x.movedim(1, -1) if x.ndim == 4 else x)
        output: Tensor = self.up(torch.relu(hidden) if self.relu else hidden)
        return output.movedim(-1, 1) if x.ndim == 4 else output


class Adapters(nn.ModuleList):
    """One `Adapter` per block, or only for the last blocks.

    Args:
        shapes: What each block does to the shape of its input.
        rank: Inner width; the paper uses 16.
        activation: "none" (the paper's text) or "relu" (its reference code).
        last: Number of blocks at the end of the encoder that get an adapter; 0 means all. With adapters in the last
            blocks only, no gradient is needed before them.

    Raises:
        InputError: An invalid rank or activation, ``last`` exceeds the number of blocks, or a block whose output has a
            size that does not divide that of its input.

    Example:
        >>> adapters = Adapters([BlockShape(128, 128)] * 8, rank=16)
        >>> sum(p.numel() for p in adapters.parameters())
        32768
    """

    def __init__(self, shapes: Sequence[BlockShape], rank: int = 16, activation: str = "none", last: int = 0) -> None:
        if rank < 1:
            raise InputError(f"adapter rank {rank}: use a whole number of at least 1 (the paper uses 16).")
        if activation not in ("none", "relu"):
            raise InputError(f"adapter activation {activation!r}: use 'none' or 'relu'.")
        if not 0 <= last <= len(shapes):
            raise InputError(f"adapters in the last {last} blocks: the encoder has {len(shapes)} blocks.")
        self.first = len(shapes) - last if last else 0
        if wrong := [block for block in range(self.first, len(shapes)) if not shapes[block].stride]:
            raise InputError(
                f"block {wrong[0] + 1} has an output whose size does not divide that of its input, so it cannot get an"
                " adapter; use other blocks, or another method."
            )
        super().__init__(Adapter(shape, rank, activation) for shape in shapes[self.first :])
        self.settings: dict[str, Any] = {"rank": rank, "activation": activation}
        self.settings |= {"last": last} if last else {}

    def of_block(self, block: int) -> Any:
        """The `Adapter` of a block (counted from 0), or None."""
        return self[block - self.first] if block >= self.first else None


class TreeAdapters(nn.ModuleList):
    """The adapters of a tree of shared blocks: one per block, which all tasks that share the block share too.

    Args:
        own: For each path, the adapters that belong to it, by block (counted from 0). The adapter of a shared block
            belongs to the first path with the block.
        settings: Those of `Adapters`.

    Attributes:
        paths: For each path, what stands for its `Adapters`.
    """

    def __init__(self, own: Sequence[Mapping[int, Adapter]], settings: Mapping[str, Any]) -> None:
        super().__init__(adapter for adapters in own for adapter in adapters.values())
        self.settings = dict(settings)
        self.paths = [PathAdapters(dict(adapters)) for adapters in own]


class PathAdapters:
    """The adapters that belong to one path of a tree, by block (counted from 0)."""

    def __init__(self, adapters: dict[int, Adapter]) -> None:
        self.adapters = adapters

    def of_block(self, block: int) -> Any:
        """As `Adapters.of_block`. The adapter of a shared block belongs to its first path: a block gets it once."""
        return self.adapters.get(block)
