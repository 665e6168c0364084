"""Low-rank adapters in parallel to the blocks of an encoder: ``block'(x) = block(x) + B A x``.

Source: "Single-Input Multi-Output Model Merging" (arXiv 2504.11268), representation re-alignment. The paper
writes ``B A x``; its reference code puts a ReLU between A and B. ``activation`` chooses between the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from simomerge.core.errors import InputError


class Adapter(nn.Module):
    """One low-rank map ``B f(A x)`` of tokens (B, N, C) or maps (B, C, h, w). B starts at zero, so the map does too."""

    def __init__(self, channels: int, rank: int, activation: str) -> None:
        super().__init__()
        self.down = nn.Linear(channels, rank, bias=False)
        self.up = nn.Linear(rank, channels, bias=False)
        self.relu = activation == "relu"
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.down(x.movedim(1, -1) if x.ndim == 4 else x)
        output: Tensor = self.up(torch.relu(hidden) if self.relu else hidden)
        return output.movedim(-1, 1) if x.ndim == 4 else output


class Adapters(nn.ModuleList):
    """One `Adapter` per block, or only for the last blocks.

    Args:
        channels: Width of each block's tokens.
        rank: Inner width; the paper uses 16.
        activation: "none" (the paper's text) or "relu" (its reference code).
        last: Number of blocks at the end of the encoder that get an adapter; 0 means all. With adapters in the last
            blocks only, no gradient is needed before them.

    Raises:
        InputError: An invalid rank or activation, or ``last`` exceeds the number of blocks.

    Example:
        >>> adapters = Adapters([128] * 8, rank=16)
        >>> sum(p.numel() for p in adapters.parameters())
        32768
    """

    def __init__(self, channels: list[int], rank: int = 16, activation: str = "none", last: int = 0) -> None:
        if rank < 1:
            raise InputError(f"adapter rank {rank}: use a whole number of at least 1 (the paper uses 16).")
        if activation not in ("none", "relu"):
            raise InputError(f"adapter activation {activation!r}: use 'none' or 'relu'.")
        if not 0 <= last <= len(channels):
            raise InputError(f"adapters in the last {last} blocks: the encoder has {len(channels)} blocks.")
        self.first = len(channels) - last if last else 0
        super().__init__(Adapter(width, rank, activation) for width in channels[self.first :])
        self.settings: dict[str, Any] = {"rank": rank, "activation": activation}
        self.settings |= {"last": last} if last else {}

    def of_block(self, block: int) -> Any:
        """The `Adapter` of a block (counted from 0), or None."""
        return self[block - self.first] if block >= self.first else None
