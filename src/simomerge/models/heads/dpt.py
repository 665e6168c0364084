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
from simomerge.models.heads.projections import Moments, Projection, assign, layer_projection
from simomerge.models.heads.resize import resize


class DPTHead(nn.Module):
    """Four taps, reassembled at strides p/4, p/2, p and 2p (p: the patch), then fused from coarse to fine.

    Taps of a pyramid, each at half the resolution of the one before, are fused as they are.

    Source: "Vision Transformers for Dense Prediction" (arXiv 2103.13413); CLS readout 'add' and 128 fusion
    channels as in "Single-Input Multi-Output Model Merging" (arXiv 2504.11268).

    Args:
        in_channels: channels of each of the four taps.
        out_channels: channels of the task.
        fusion_channels: width of the fusion path.
        cls: add each tap's projected CLS token to its projected patches.
        cross_tap: every projection reads all taps, as the cross-tap fold leaves it; by default its own.
        pyramid: the taps are those of a pyramid.

    Example:
        >>> import torch
        >>> taps = tuple(torch.rand(2, 32, 8, 10) for _ in range(4))
        >>> features = Features(taps, tuple(torch.rand(2, 32) for _ in taps), (60, 80), (64, 80))
        >>> DPTHead([32] * 4, 1, fusion_channels=16)(features).shape
        torch.Size([2, 1, 64, 80])
    """

    widens = True  # a cross-tap fold may make its projections read all taps

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
            raise InputError(f"a DPT head reads four taps, not {len(in_channels)}; use a linear head or four taps.")
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
        self.output = nn.Conv2d(32, out_channels, 1)

    def _add_projections(self, width: int) -> None:
        """Fresh 1x1 projections of the patches and the CLS tokens."""
        widths = [sum(self.in_channels)] * 4 if self.cross_tap else self.in_channels
        self.projects = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in widths)
        self.readouts = nn.ModuleList(nn.Linear(channels, width, bias=False) for channels in widths if self.cls)

    def projections(self) -> list[Projection]:
        """One per tap."""
        return [
            layer_projection(
                self.projects[tap], self._read_by(tap), self.readouts[tap] if self.cls else None, tap, self.in_channels
            )
            for tap in range(4)
        ]

    def with_projections(self, projections: list[Projection], moments: Moments) -> DPTHead:
        """A copy that computes these; it becomes a cross-tap head where one of them reads all taps."""
        head = copy.deepcopy(self)
        if not self.cross_tap and any(len(projection.taps) > 1 for projection in projections):
            projections = [projection.widened(self.in_channels) for projection in projections]
            head.cross_tap = head.settings["cross_tap"] = True
            head._add_projections(len(projections[0].bias))
            head.projects.to(projections[0].bias)
            head.readouts.to(projections[0].bias)
        for tap, projection in enumerate(projections):
            assign(projection, head.projects[tap], head.readouts[tap] if self.cls else None)
        return head

    def _read_by(self, tap: int) -> tuple[int, ...]:
        return (0, 1, 2, 3) if self.cross_tap else (tap,)

    def _project(self, features: Features, tap: int) -> Tensor:
        """The input of one stage: the projected patches, with the projected CLS tokens added."""
        size = (features.maps[tap].shape[-2], features.maps[tap].shape[-1])
        read = self._read_by(tap)
        maps = [resize(features.maps[index], size) for index in read]
        x = self.projects[tap](torch.cat(maps, 1) if len(maps) > 1 else maps[0])
        if self.cls:
            tokens = torch.cat([features.cls[index] for index in read], 1)
            x = x + self.readouts[tap](tokens)[..., None, None]
        return x

    @torch.no_grad()
    def start_at(self, values: Tensor) -> None:
        """Make these (C,) the output of a fresh head, by its bias."""
        assert self.output.bias is not None
        self.output.bias.copy_(values)

    def forward(self, features: Features) -> Tensor:
        """Features -> logits (B, C, H, W) at the padded size."""
        stages = [resize_stage(self._project(features, tap)) for tap, resize_stage in enumerate(self.resizes)]
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
