"""A head behind low-rank corrections of the features: what the re-alignment by representation surgery leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simomerge.core.classes import settings_of
from simomerge.core.errors import InputError
from simomerge.models.encoders import Features
from simomerge.models.heads.building import build_head, head_kind


class SurgeryHead(nn.Module):
    """Corrects the features for one task, then applies a head of any kind.

    Source: "Representation Surgery for Multi-Task Model Merging" (arXiv 2402.02705), which corrects the one feature
    vector of a classifier. Here every tap has a correction for its patch tokens and one for its CLS token.

    Args:
        in_channels: Channels of each tap.
        out_channels: Channels of the task.
        inner: The head that reads the corrected features: a head, or its kind as in `build_head`.
        inner_settings: Settings of a head that is given by its kind.
        rank: Rank of each correction.
        cls: Also correct the CLS tokens.

    Raises:
        InputError: A rank below 1, or an unknown kind or setting of the inner head.

    Example:
        >>> features = Features((torch.rand(2, 32, 8, 10),), (torch.rand(2, 32),), (60, 80), (64, 80))
        >>> SurgeryHead([32], 3, inner="linear", rank=4)(features).shape
        torch.Size([2, 3, 64, 80])
    """

    wraps_a_head = True  # recipes do not train it from the start

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        inner: str | nn.Module = "linear",
        inner_settings: Mapping[str, Any] | None = None,
        rank: int = 16,
        cls: bool = True,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise InputError(f"the rank of a correction must be at least 1, got {rank}.")
        if isinstance(inner, str):
            inner = build_head(inner, in_channels, out_channels, dict(inner_settings or {}))
        self.inner = inner
        self.settings: dict[str, Any] = {
            "inner": head_kind(self.inner),
            "inner_settings": settings_of(self.inner),
            "rank": rank,
            "cls": cls,
        }
        self.corrections = Corrections(in_channels, rank, cls)

    def forward(self, features: Features) -> Tensor:
        """Features -> logits (B, C, H, W) at the padded size."""
        logits: Tensor = self.inner(self.corrections(features))
        return logits


class Corrections(nn.Module):
    """Features -> corrected Features of the same shapes: one correction per tap, for patches and for CLS tokens.

    Args:
        in_channels: Channels of each tap.
        rank: Rank of each correction.
        cls: Also correct the CLS tokens.
    """

    def __init__(self, in_channels: Sequence[int], rank: int, cls: bool) -> None:
        super().__init__()
        self.maps = nn.ModuleList(_Correction(channels, rank) for channels in in_channels)
        self.cls = nn.ModuleList(_Correction(channels, rank) for channels in in_channels if cls)

    def forward(self, features: Features) -> Features:
        maps = tuple(correct(each) for correct, each in zip(self.maps, features.maps, strict=True))
        cls = tuple(correct(each) for correct, each in zip(self.cls, features.cls, strict=True)) if self.cls else ()
        return Features(maps, cls or features.cls, features.image_size, features.padded_size)


class _Correction(nn.Module):
    """``z - W_up relu(W_down z)`` of every token z; the identity until it is trained."""

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, rank, bias=False)
        self.up = nn.Linear(rank, channels, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, C, ...) -> tokens of the same shape."""
        bias: Tensor = self.up(torch.relu(self.down(tokens.movedim(1, -1))))
        return tokens - bias.movedim(-1, 1)
