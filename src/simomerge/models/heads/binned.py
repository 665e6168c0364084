"""DINOv2's linear depth head: a linear map of the tokens to weights of depth bins."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simomerge.core.errors import InputError
from simomerge.models.encoders import Features
from simomerge.models.heads.projections import Moments, Projection
from simomerge.models.heads.resize import resize


class BinnedDepthHead(nn.Module):
    """Tapped patch tokens, each concatenated with its CLS token, to the weights of depth bins; depth is their mean.

    Source: "DINOv2" (arXiv 2304.07193), depth estimation, the ``lin.`` and ``lin. 4`` heads: weights are
    ``relu(logits) + 0.1``, normalised; the logits are made four times as large before.

    Args:
        in_channels: of each tap.
        out_channels: 1.
        cls: read the CLS tokens too.
        bins: how many, evenly from ``min_depth`` to ``max_depth`` (metres).
        upsample: places per side that one token gives.

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
            raise InputError(f"a binned depth head gives one channel, the task has {out_channels}.")
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
        # As in DINOv2's files: per tap the patch's channels, then the CLS token's.
        self.output = nn.Conv2d(sum(in_channels) * (2 if cls else 1), bins, 1)

    def projections(self) -> list[Projection]:
        """One, of all taps."""
        assert self.output.bias is not None
        parts = list(self.output.weight.flatten(1).split(self._widths(), 1))
        step = 2 if self.cls else 1
        maps, cls = parts[::step], parts[1::2] if self.cls else []
        return [Projection(dict(enumerate(maps)), dict(enumerate(cls)), self.output.bias)]

    @torch.no_grad()
    def with_projections(self, projections: list[Projection], moments: Moments) -> BinnedDepthHead:
        """A copy that computes this one."""
        (projection,) = projections
        head = copy.deepcopy(self)
        taps = range(len(self.in_channels))
        parts = [of[tap] for tap in taps for of in (projection.maps, projection.cls)[: 2 if self.cls else 1]]
        assert head.output.bias is not None
        head.output.weight.copy_(torch.cat(parts, 1)[..., None, None])
        head.output.bias.copy_(projection.bias)
        return head

    def forward(self, features: Features) -> Tensor:
        """Features -> depth (B, 1, H, W) in metres at the padded size."""
        logits = self.projections()[0](features)
        height, width = logits.shape[-2:]
        # The linear map and the enlargement commute; this order does not enlarge the features.
        weights = resize(logits, (height * self.upsample, width * self.upsample)).relu() + 0.1
        low, high = self.limits
        bins = torch.linspace(low, high, weights.shape[1], device=weights.device)
        depth = torch.einsum("bkhw,k->bhw", weights, bins) / weights.sum(1)
        return resize(depth[:, None].clamp(low, high), features.padded_size)

    def _widths(self) -> list[int]:
        return [width for channels in self.in_channels for width in [channels] * (2 if self.cls else 1)]
