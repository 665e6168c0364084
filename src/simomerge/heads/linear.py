"""The paper's linear head: batch norm and a 1x1 convolution on the tapped tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simomerge.encoders import Features


class LinearHead(nn.Module):
    """Tapped patch tokens, each concatenated with its CLS token, to logits by one linear map.

    Source: "Single-Input Multi-Output Model Merging" (arXiv 2504.11268), NYUv2 protocol: batch norm, 1x1
    convolution, bilinear upsampling of the logits.

    Args:
        in_channels: channels of each tap.
        out_channels: channels of the task.
        cls: read the CLS tokens too.
        subpixels: logits per side that one token gives. 1 is the paper's head; with s > 1 each token gives
            s x s logits (a pixel shuffle), which small images with large patches need.

    Example:
        >>> features = Features((torch.rand(2, 32, 8, 10),), (torch.rand(2, 32),), (60, 80), (64, 80))
        >>> LinearHead([32], 13)(features).shape
        torch.Size([2, 13, 64, 80])
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, cls: bool = True, subpixels: int = 1) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {"cls": cls, "subpixels": subpixels}
        width = sum(in_channels) * (2 if cls else 1)
        self.norm = nn.BatchNorm2d(width)
        self.output = nn.Conv2d(width, out_channels * subpixels**2, 1)
        self.cls = cls
        self.subpixels = subpixels
        nn.init.normal_(self.output.weight, std=0.01)
        self.start_at(torch.zeros(out_channels))

    @torch.no_grad()
    def start_at(self, values: Tensor) -> None:
        """Make these (C,) the output of a fresh head, by its bias."""
        assert self.output.bias is not None
        self.output.bias.copy_(values.repeat_interleave(self.subpixels**2))

    def forward(self, features: Features) -> Tensor:
        """Features -> logits (B, C, H, W) at the padded size."""
        size = features.maps[0].shape[-2:]
        maps = [m if m.shape[-2:] == size else F.interpolate(m, size, mode="bilinear") for m in features.maps]
        if self.cls:
            maps += [token[..., None, None].expand(-1, -1, *size) for token in features.cls]
        logits = self.output(self.norm(torch.cat(maps, 1)))
        if self.subpixels > 1:
            logits = F.pixel_shuffle(logits, self.subpixels)
        return F.interpolate(logits, features.padded_size, mode="bilinear", align_corners=False)
