"""DINOv2's linear depth head: a linear map of the tokens to weights of depth bins."""

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


class BinnedDepthHead(Foldable, nn.Module):
    """Maps tapped patch tokens, each concatenated with its CLS token, to weights of depth bins. Depth is their mean.

    Source: "DINOv2" (arXiv 2304.07193), depth estimation, the heads ``lin.`` and ``lin. 4``. The logits are upsampled
    four times, and the weights are ``relu(logits) + 0.1``, normalised.

    Args:
        in_channels: Channels of each tap.
        out_channels: Must be 1.
        cls: Also read the CLS tokens.
        bins: Number of bins, spaced evenly from ``min_depth`` to ``max_depth`` (metres).
        upsample: Factor by which the logits are upsampled.

    Raises:
        InputError: More than one output channel.

    Example:
        >>> features = Features((torch.rand(2, 32, 8, 10),), (torch.rand(2, 32),), (60, 80), (64, 80))
        >>> BinnedDepthHead([32], bins=16)(features).shape
        torch.Size([2, 1, 64, 80])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 1,
        cls: bool = True,
        bins: int = 256,
        min_depth: float = 0.001,
        max_depth: float = 10.0,
        upsample: int = 4,
    ) -> None:
        super().__init__()
        if out_channels != 1:
            raise InputError(f"a binned depth head gives one channel, but the task has {out_channels}.")
        self.settings: dict[str, Any] = {
            "cls": cls,
            "bins": bins,
            "min_depth": min_depth,
            "max_depth": max_depth,
            "upsample": upsample,
        }
        self.in_channels = tuple(in_channels)
        self.cls, self.upsample = cls, upsample
        self.limits = (min_depth, max_depth)
        # The order of the columns is that of DINOv2's files: per tap the patch's channels, then the CLS token's.
        self.output = nn.Conv2d(sum(in_channels) * (2 if cls else 1), bins, 1)

    def input_layers(self) -> list[InputLayer]:
        """The one layer, which reads all taps."""
        taps = range(len(self.in_channels))
        return [InputLayer(self.output, taps, channels=self.in_channels, paired=self.cls)]

    def forward(self, features: Features) -> Tensor:
        """Features -> depth (B, 1, H, W) in metres at the padded size."""
        (projection,) = self.projections()
        logits = projection(features)
        height, width = logits.shape[-2:]
        # The linear map and the upsampling commute; in this order the features are not upsampled.
        weights = resize(logits, (height * self.upsample, width * self.upsample)).relu() + 0.1
        low, high = self.limits
        bins = torch.linspace(low, high, weights.shape[1], device=weights.device)
        depth = F.conv2d(weights, bins.view(1, -1, 1, 1)) / weights.sum(1, keepdim=True)
        return resize(depth.clamp(low, high), features.padded_size)
