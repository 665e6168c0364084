"""The dense prediction transformer (DPT) head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simomerge.encoders import Features
from simomerge.errors import InputError
from simomerge.heads.resize import resize


class DPTHead(nn.Module):
    """Four taps, reassembled at strides p/4, p/2, p and 2p (p: the patch), then fused from coarse to fine.

    Source: "Vision Transformers for Dense Prediction" (arXiv 2103.13413); CLS readout 'add' and 128 fusion
    channels as in "Single-Input Multi-Output Model Merging" (arXiv 2504.11268).

    Args:
        in_channels: channels of each of the four taps.
        out_channels: channels of the task.
        fusion_channels: width of the fusion path.
        cls: add each tap's projected CLS token to its projected patches.

    Example:
        >>> import torch
        >>> taps = tuple(torch.rand(2, 32, 8, 10) for _ in range(4))
        >>> features = Features(taps, tuple(torch.rand(2, 32) for _ in taps), (60, 80), (64, 80))
        >>> DPTHead([32] * 4, 1, fusion_channels=16)(features).shape
        torch.Size([2, 1, 64, 80])
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: int, fusion_channels: int = 128, cls: bool = True
    ) -> None:
        super().__init__()
        if len(in_channels) != 4:
            raise InputError(f"a DPT head reads four taps, not {len(in_channels)}; use a linear head or four taps.")
        self.settings: dict[str, Any] = {"fusion_channels": fusion_channels, "cls": cls}
        width = fusion_channels
        self.cls = cls
        self.projects = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in in_channels)
        self.readouts = nn.ModuleList(nn.Linear(channels, width, bias=False) for channels in in_channels if cls)
        self.resizes = nn.ModuleList(
            [
                nn.ConvTranspose2d(width, width, 4, stride=4),
                nn.ConvTranspose2d(width, width, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(width, width, 3, stride=2, padding=1),
            ]
        )
        self.fusions = nn.ModuleList(_Fusion(width, skip=stage < 3) for stage in range(4))
        self.smooth = nn.Conv2d(width, width // 2, 3, padding=1)
        self.refine = nn.Conv2d(width // 2, 32, 3, padding=1)
        self.output = nn.Conv2d(32, out_channels, 1)

    @torch.no_grad()
    def start_at(self, values: Tensor) -> None:
        """Make these (C,) the output of a fresh head, by its bias."""
        assert self.output.bias is not None
        self.output.bias.copy_(values)

    def forward(self, features: Features) -> Tensor:
        """Features -> logits (B, C, H, W) at the padded size."""
        stages = []
        for index, feature_map in enumerate(features.maps):
            x = self.projects[index](feature_map)
            if self.cls:
                x = x + self.readouts[index](features.cls[index])[..., None, None]
            stages.append(self.resizes[index](x))
        fused = self.fusions[3](stages[3], None, stages[2].shape[-2:])
        fused = self.fusions[2](fused, stages[2], stages[1].shape[-2:])
        fused = self.fusions[1](fused, stages[1], stages[0].shape[-2:])
        fused = self.fusions[0](fused, stages[0], stages[0].shape[-2:])
        fused = resize(self.smooth(fused), features.padded_size)
        return self.output(F.relu(self.refine(fused)))


class _ResidualUnit(nn.Module):
    """Two 3x3 convolutions before which a ReLU stands, beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))


class _Fusion(nn.Module):
    """Adds the finer stage to the path from the coarser ones, refines, resizes, projects."""

    def __init__(self, width: int, skip: bool) -> None:
        super().__init__()
        self.skip = _ResidualUnit(width) if skip else None
        self.refine = _ResidualUnit(width)
        self.project = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, finer: Tensor | None, size: tuple[int, int]) -> Tensor:
        if self.skip is not None and finer is not None:
            x = x + self.skip(finer)
        return resize(self.project(self.refine(x)), size)
