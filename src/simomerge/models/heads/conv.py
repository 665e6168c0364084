"""The head of much training code: one convolution of kernel 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simomerge.core.errors import InputError
from simomerge.models.encoders import Features
from simomerge.models.heads.projections import Foldable, InputLayer
from simomerge.models.heads.resize import resize


class ConvHead(Foldable, nn.Conv2d):  # type: ignore[misc]  # in_channels is a number here
    """Maps tapped patch tokens to logits by one convolution of kernel 1, without a normalisation or CLS tokens.

    It is itself the convolution, so that its tensors are ``weight`` (out, in, 1, 1) and ``bias`` (out).

    Args:
        in_channels: Channels of each tap.
        out_channels: Channels of the task.
        subpixels: With s > 1 each token gives s x s logits (a pixel shuffle).
        taps: Which of the encoder's taps it reads, concatenated; counted from 0. By default all.

    Raises:
        InputError: ``taps`` names a tap that the encoder does not have.

    Example:
        >>> features = Features((torch.rand(2, 32, 8, 10),), (), (60, 80), (64, 80))
        >>> ConvHead([32], 13)(features).shape
        torch.Size([2, 13, 64, 80])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        subpixels: int = 1,
        taps: Sequence[int] | None = None,
    ) -> None:
        self.taps = list(range(len(in_channels))) if taps is None else list(taps)
        if not self.taps or any(tap not in range(len(in_channels)) for tap in self.taps):
            raise InputError(f"taps {self.taps}: the encoder has {len(in_channels)}; give places from 0 on.")
        super().__init__(sum(in_channels[tap] for tap in self.taps), out_channels * subpixels**2, 1)
        self.settings: dict[str, Any] = {"subpixels": subpixels, "taps": None if taps is None else self.taps}
        self.widths = tuple(in_channels)
        self.subpixels = subpixels
        nn.init.normal_(self.weight, std=0.01)
        self.start_at(torch.zeros(out_channels))

    @torch.no_grad()
    def start_at(self, values: Tensor) -> None:
        """Set the bias so that a fresh head predicts these values (C,)."""
        assert self.bias is not None
        self.bias.copy_(values.repeat_interleave(self.subpixels**2))

    def input_layers(self) -> list[InputLayer]:
        return [InputLayer(self, self.taps, grid=self.taps[0], channels=self.widths)]

    def forward(self, features: Features) -> Tensor:  # type: ignore[override]
        """Features -> logits (B, C, H, W) at the padded size."""
        size = features.grid(self.taps[0])
        logits = super().forward(torch.cat([resize(features.maps[tap], size) for tap in self.taps], 1))
        return resize(F.pixel_shuffle(logits, self.subpixels), features.padded_size)
