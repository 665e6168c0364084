"""The dense prediction transformer (DPT) head."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simomerge.core.errors import InputError
from simomerge.models.encoders import Features
from simomerge.models.heads.projections import Foldable, InputLayer, Moments, Projection
from simomerge.models.heads.resize import resize


class DPTHead(Foldable, nn.Module):
    """Four taps, reassembled at strides p/4, p/2, p and 2p (p: patch size), then fused from coarse to fine.

    Taps of a pyramid, each at half the resolution of the previous one, are fused without resizing.

    Source: "Vision Transformers for Dense Prediction" (arXiv 2103.13413); CLS readout 'add' and 128 fusion
    channels as in "Single-Input Multi-Output Model Merging" (arXiv 2504.11268).

    Args:
        in_channels: Channels of each of the four taps.
        out_channels: Channels of the task.
        fusion_channels: Width of the fusion path.
        cls: Add each tap's projected CLS token to its projected patches.
        cross_tap: Every projection reads all taps, as after a cross-tap fold, instead of one tap each.
        pyramid: The taps are those of a pyramid.

    Raises:
        InputError: Not four taps.

    Example:
        >>> import torch
        >>> taps = tuple(torch.rand(2, 32, 8, 10) for _ in range(4))
        >>> features = Features(taps, tuple(torch.rand(2, 32) for _ in taps), (60, 80), (64, 80))
        >>> DPTHead([32] * 4, 1, fusion_channels=16)(features).shape
        torch.Size([2, 1, 64, 80])
    """

    widens = True  # a cross-tap fold may replace its projections by projections of all taps

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        fusion_channels: int = 128,
        cls: bool = True,
        cross_tap: bool = False,
        pyramid: bool = False,
    ) -> None:
        super().__init__()
        if len(in_channels) != 4:
            raise InputError(f"a DPT head reads four taps, not {len(in_channels)}; use four taps or a linear head.")
        self.settings: dict[str, Any] = {"fusion_channels": fusion_channels, "cls": cls}
        self.settings |= {"cross_tap": True} if cross_tap else {}
        self.settings |= {"pyramid": True} if pyramid else {}
        self.in_channels = tuple(in_channels)
        width = fusion_channels
        self.cls = cls
        self.cross_tap = cross_tap
        self._add_projections(width)
        self.resizes = nn.ModuleList(
            [nn.Identity() for _ in range(4)]
            if pyramid
            else [
                nn.ConvTranspose2d(width, width, 4, stride=4),
                nn.ConvTranspose2d(width, width, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(width, width, 3, stride=2, padding=1),
            ]
        )
        self.fusions = nn.ModuleList(_Fusion(width, skip=stage < 3) for stage in range(4))
        self.smooth = nn.Conv2d(width, width // 2, 3, padding=1)
        self.refine = nn.Conv2d(width // 2, 32, 3, padding=1)
        self.output: Any = nn.Conv2d(32, out_channels, 1)

    def _add_projections(self, width: int) -> None:
        """Fresh 1x1 projections of the patches and the CLS tokens."""
        widths = [sum(self.in_channels)] * 4 if self.cross_tap else self.in_channels
        self.projects = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in widths)
        self.readouts = nn.ModuleList(nn.Linear(channels, width, bias=False) for channels in widths if self.cls)

    def input_layers(self) -> list[InputLayer]:
        """One per stage."""
        readouts = list(self.readouts) if self.cls else [None] * 4
        return [
            InputLayer(self.projects[tap], self._read_by(tap), readouts[tap], grid=tap, channels=self.in_channels)
            for tap in range(4)
        ]

    def with_projections(self, projections: list[Projection], moments: Moments) -> DPTHead:
        """A copy that computes these projections. It becomes a cross-tap head if one of them reads several taps."""
        if self.cross_tap or all(len(projection.taps) == 1 for projection in projections):
            same: DPTHead = super().with_projections(projections, moments)
            return same
        wide = [projection.widened(self.in_channels) for projection in projections]
        head = copy.deepcopy(self)
        head.cross_tap = head.settings["cross_tap"] = True
        head._add_projections(len(wide[0].bias))
        head.projects.to(wide[0].bias)
        head.readouts.to(wide[0].bias)
        return head.with_projections(wide, moments)

    def _read_by(self, tap: int) -> tuple[int, ...]:
        """The taps that the projection of one stage reads."""
        return (0, 1, 2, 3) if self.cross_tap else (tap,)

    def _project(self, features: Features, tap: int) -> Tensor:
        """The input of one stage: the projected patches, with the projected CLS tokens added."""
        size = features.grid(tap)
        read = self._read_by(tap)
        maps = [resize(features.maps[index], size) for index in read]
        x = self.projects[tap](torch.cat(maps, 1) if len(maps) > 1 else maps[0])
        if self.cls:
            tokens = torch.cat([features.cls[index] for index in read], 1)
            x = x + self.readouts[tap](tokens)[..., None, None]
        return x

    @torch.no_grad()
    def start_at(self, values: Tensor) -> None:
        """Set the bias so that a fresh head predicts these values (C,)."""
        self.output.bias.copy_(values)

    def forward(self, features: Features) -> Tensor:
        """Features -> logits (B, C, H, W) at the padded size."""
        stages = [resize_stage(self._project(features, tap)) for tap, resize_stage in enumerate(self.resizes)]
        fused = self.fusions[3](stages[3], None, stages[2].shape[-2:])
        fused = self.fusions[2](fused, stages[2], stages[1].shape[-2:])
        fused = self.fusions[1](fused, stages[1], stages[0].shape[-2:])
        fused = self.fusions[0](fused, stages[0], stages[0].shape[-2:])
        fused = resize(self.smooth(fused), features.padded_size)
        logits: Tensor = self.output(F.relu(self.refine(fused)))
        return logits


class _ResidualUnit(nn.Module):
    """Two 3x3 convolutions, each after a ReLU, plus the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))


class _Fusion(nn.Module):
    """Adds the finer stage to the path from the coarser stages, then refines, projects and resizes the sum."""

    def __init__(self, width: int, skip: bool) -> None:
        super().__init__()
        self.skip = _ResidualUnit(width) if skip else None
        self.refine = _ResidualUnit(width)
        self.project = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, finer: Tensor | None, size: tuple[int, int]) -> Tensor:
        if self.skip is not None and finer is not None:
            x = x + self.skip(finer)
        return resize(self.project(self.refine(x)), size)
