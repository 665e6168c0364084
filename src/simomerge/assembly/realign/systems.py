"""The linear systems of a fold: their inputs, their outputs, and how they are solved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from simomerge.assembly.realign.normal_equations import NormalEquations
from simomerge.models.encoders import Features
from simomerge.models.heads.projections import Projection
from simomerge.models.heads.resize import resize


class System(NamedTuple):
    """The inputs of one system: patches of some taps and CLS tokens of some taps, on the grid of one tap.

    ``source`` names the features, if the encoder is a tree: `Encoder.source`.
    """

    maps: tuple[int, ...]
    cls: tuple[int, ...]
    grid: int
    source: str = ""

    def widths(self, channels: Sequence[int]) -> list[int]:
        """Number of inputs per tap: first of the patches, then of the CLS tokens."""
        return [channels[tap] for tap in (*self.maps, *self.cls)]

    def patches(self, channels: Sequence[int]) -> int:
        return sum(channels[tap] for tap in self.maps)

    def inputs(self, features: Features) -> tuple[Tensor, Tensor]:
        """The patches (B, n, D_z) and the CLS tokens (B, D_c)."""
        features = features.of(self.source)
        size = (features.maps[self.grid].shape[-2], features.maps[self.grid].shape[-1])
        patches = [tokens(resize(features.maps[tap].float(), size)) for tap in self.maps]
        cls = [features.cls[tap].float() for tap in self.cls]
        blank = features.maps[self.grid].new_zeros(len(features), 0, dtype=torch.float32)
        places = blank[:, None].expand(-1, size[0] * size[1], -1)
        return torch.cat([places, *patches], 2), torch.cat([blank, *cls], 1)


@dataclass(frozen=True)
class Part:
    """One regression target: a projection of a head, or the part of it that reads one tap."""

    task: str
    index: int
    projection: Projection  # before the fold
    system: System
    columns: slice  # the part's outputs among those of the system


def tokens(maps: Tensor) -> Tensor:
    """(B, C, h, w) to (B, n, C)."""
    return maps.flatten(2).transpose(1, 2)


class Solver:
    """Solves one system for any ridge, in coordinates of the directions in which its CLS tokens vary."""

    def __init__(self, sums: NormalEquations, system: System, channels: Sequence[int]) -> None:
        self.patches = system.patches(channels)
        self.basis = sums.cls_basis(self.patches) if system.cls else None
        self.sums = self.in_coordinates(sums)
        self.unit = sums.unit
        # The CLS token of an image is repeated for its n patches, but it is one observation, not n.
        self.penalties = torch.ones_like(self.sums.x)
        self.penalties[self.patches :] = sums.tokens / max(sums.images, 1.0)

    def in_coordinates(self, sums: NormalEquations) -> NormalEquations:
        """Sums in the coordinates that `solve` works in."""
        return sums.in_basis(self.patches, self.basis)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Changes of weights (in these coordinates) and biases; zero for an infinite ridge."""
        if math.isinf(ridge):
            return torch.zeros_like(self.sums.xr.T), torch.zeros_like(self.sums.r)
        return self.sums.solve(ridge, self.penalties, self.unit)

    def expanded(self, weights: Tensor) -> Tensor:
        """Weights in the coordinates of the inputs."""
        if self.basis is None:
            return weights
        return torch.cat([weights[:, : self.patches], weights[:, self.patches :] @ self.basis.T], 1)


def moved(part: Part, weights: Tensor, bias: Tensor, channels: Sequence[int]) -> Projection:
    """The part's projection with a solution added to it."""
    system = part.system
    wide = part.projection.widened(channels)
    pieces = weights.split(system.widths(channels), 1)
    maps = {t: (wide.maps[t].to(piece) + piece).to(wide.bias) for t, piece in zip(system.maps, pieces, strict=False)}
    tokens = zip(system.cls, pieces[len(system.maps) :], strict=True)
    cls = {tap: (wide.cls[tap].to(piece) + piece).to(wide.bias) for tap, piece in tokens}
    return Projection(maps, cls, (wide.bias.to(bias) + bias).to(wide.bias), wide.grid)
