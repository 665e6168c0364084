"""ReACT's maps from merged to expert features: sums over images, a solution in closed form, and new heads.

For one task and one kind of token (the patches or the CLS token of a tap), with merged tokens z and expert tokens t::

    Q    = argmin  sum || (t - mean t) - Q (z - mean z) ||^2   over orthogonal Q
    A, b = argmin  sum || t - A z - b ||^2 + ridge || A - Q ||^2

A layer of the head that computes ``W t + c`` then becomes ``W A z + (c + W b)``. Source: arXiv 2511.10943.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from simomerge.assembly.realign.normal_equations import NormalEquations
from simomerge.assembly.realign.sums import FALLBACK_RIDGE, Fit
from simomerge.assembly.realign.systems import tokens
from simomerge.assembly.realign.teacher import observe
from simomerge.core.errors import InputError
from simomerge.core.machine import autocast
from simomerge.core.modes import evaluating
from simomerge.models.encoders import Features
from simomerge.models.heads.projections import Moments, Projection, input_projections
from simomerge.models.model import SimoModel

RIDGES: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)
"""Ridges that "auto" tries, in units of the mean diagonal of the Gram matrix. The last ones are nearly a rotation."""

TIE = 1e-9
"""Weight of the identity where the Procrustes map is not unique, as with fewer tokens than channels."""

KINDS = ("maps", "cls")


class TaskMaps:
    """The maps of one task: add the features of images with `add`, then `choose` a ridge and make the `head`.

    Args:
        model: A merged model with the experts' heads. It is not changed.
        task: The name of the task.

    Raises:
        InputError: The head declares no projections.
    """

    def __init__(self, model: SimoModel, task: str) -> None:
        self.original: Any = model.heads[task]
        self.projections = input_projections(self.original, task)
        device = next(model.parameters()).device
        device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        read = {(kind, tap) for each in self.projections for kind in KINDS for tap in getattr(each, kind)}
        widths = {(kind, tap): model.encoder.channels[tap] for kind, tap in sorted(read)}
        self.sums = {  # (kind, tap) -> [solved on, held out]
            key: [NormalEquations.empty(width, width, device) for _ in range(2)] for key, width in widths.items()
        }

    def add(self, merged: Features, expert: Features, held_out: Tensor) -> None:
        """Add a batch of images: the features of both encoders, and which images are held out, bool (B,)."""
        for key, pair in self.sums.items():
            ours, theirs = (_tokens(features, *key) for features in (merged, expert))
            for sums, chosen in zip(pair, (~held_out, held_out), strict=True):
                if chosen.any():
                    z, target = ours[chosen], theirs[chosen]
                    sums.add(z, z[:, 0, :0], target - z, target)

    def gather(self) -> None:
        """Add up the sums of all processes. Raises InputError if features are not finite."""
        for sums in (each for pair in self.sums.values() for each in pair):
            sums.gather()
            if not (torch.isfinite(sums.xx).all() and torch.isfinite(sums.rr).all()):
                raise InputError("the maps have features that are not finite; a model or an image is damaged.")

    @property
    def images(self) -> int:
        """Number of images that were added."""
        return int(sum(sums.images for sums in next(iter(self.sums.values()))))

    def choose(self, ridge: float | str = "auto") -> Fit:
        """The ridge and how well the maps fit: R^2 of the mapped features as a prediction of the expert's.

        R^2 is measured on held-out images, relative to the variance of the expert's tokens in all images, and is the
        mean over the maps. "auto" takes the best of `RIDGES`. Without a held-out image both R^2 are NaN.
        """
        ridges = RIDGES if ridge == "auto" else (float(ridge),)
        if any(sums.images == 0 for pair in self.sums.values() for sums in pair):
            return Fit(ridges[0] if len(ridges) == 1 else FALLBACK_RIDGE, math.nan, math.nan)
        solvers = {key: Solver(train, self._penalty(key)) for key, (train, _) in self.sums.items()}
        r2 = {each: self._r2({key: solver.solve(each) for key, solver in solvers.items()}) for each in ridges}
        best = max(ridges, key=lambda each: r2[each])
        unmapped = {key: (torch.eye(len(train.x)).to(train.x), train.x * 0) for key, (train, _) in self.sums.items()}
        return Fit(best, r2[best], self._r2(unmapped))

    def _r2(self, maps: Mapping[tuple[str, int], tuple[Tensor, Tensor]]) -> float:
        found = []
        for key, (train, held_out) in self.sums.items():
            weights, bias = maps[key]
            total = train + held_out
            variance = float(total.spread().sum()) / total.tokens
            error = float(held_out.error(weights - torch.eye(len(bias)).to(bias), bias).sum()) / held_out.tokens
            found.append(1 - error / variance if variance > 0 else 1.0)
        return sum(found) / len(found)

    def _penalty(self, key: tuple[str, int]) -> float:
        """Factor of the ridge: 1 for patches, their number per image for a CLS token, which is one observation."""
        kind, tap = key
        if kind == "maps" or ("maps", tap) not in self.sums:
            return 1.0
        return sum(sums.tokens for sums in self.sums["maps", tap]) / self.images

    def head(self, ridge: float) -> nn.Module:
        """A copy of the head that has absorbed the maps. They are solved on all images."""
        totals = {key: train + held_out for key, (train, held_out) in self.sums.items()}
        maps = {key: Solver(total, self._penalty(key)).solve(ridge) for key, total in totals.items()}
        moments: dict[str, dict[int, tuple[Tensor, Tensor]]] = {kind: {} for kind in KINDS}
        for (kind, tap), total in totals.items():
            moments[kind][tap] = total.mean, total.variance
        projections = [absorbed(each, maps) for each in self.projections]
        head: nn.Module = self.original.with_projections(projections, Moments(**moments))
        return head.eval()


class Solver:
    """Solves one regression for any ridge.

    Args:
        sums: Of inputs z and residuals t - z, in equal numbers of channels.
        penalty: Factor of the ridge.
    """

    def __init__(self, sums: NormalEquations, penalty: float = 1.0) -> None:
        self.rotation = procrustes(sums)
        change = self.rotation - torch.eye(len(sums.x)).to(sums.x)
        # The residuals of the rotation, t - Q z, are those of the identity minus (Q - I) z.
        self.sums = replace(sums, r=sums.r - change @ sums.x, xr=sums.xr - sums.xx @ change.T)
        self.penalties = torch.full_like(sums.x, penalty)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """The map A (C, C) and its bias b (C,)."""
        weights, bias = self.sums.solve(ridge, self.penalties)
        return self.rotation + weights, bias


def procrustes(sums: NormalEquations) -> Tensor:
    """The orthogonal map (C, C) that brings centred inputs nearest to centred targets; of several, that nearest to I.

    Args:
        sums: Of inputs z and residuals t - z.
    """
    identity = torch.eye(len(sums.x)).to(sums.x)
    if not sums.unit:
        return identity
    centred = sums.xr + sums.xx - torch.outer(sums.mean, sums.r + sums.x)  # sum of (z - mean z) (t - mean t)^T
    left, _, right = torch.linalg.svd(centred + TIE * centred.norm() * identity)
    return right.T @ left.T


def absorbed(projection: Projection, maps: Mapping[tuple[str, int], tuple[Tensor, Tensor]]) -> Projection:
    """The projection of mapped features, as a projection of unmapped ones.

    Args:
        maps: ("maps" or "cls", tap) -> the map (C, C) and its bias (C,).
    """
    bias = projection.bias
    weights: dict[str, dict[int, Tensor]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        for tap, weight in getattr(projection, kind).items():
            matrix, offset = maps[kind, tap]
            weights[kind][tap] = (weight.to(matrix) @ matrix).to(weight)
            bias = bias.to(matrix) + weight.to(matrix) @ offset
    return Projection(weights["maps"], weights["cls"], bias.to(projection.bias), projection.grid)


@torch.no_grad()
def feature_maps(
    model: SimoModel, experts: Mapping[str, SimoModel], images: Any, batch_size: int = 32
) -> dict[str, TaskMaps]:
    """The sums of every task over unlabelled images. Under torchrun each process encodes its share of the images.

    Args:
        model: A merged model with the experts' heads.
        experts: By task.
        images: As `simomerge.datasets.pictures.as_images` gives them.
    """
    maps = {task: TaskMaps(model, task) for task in experts}
    for batch in observe(experts, images, batch_size, "react", shared=True):
        with evaluating(model), autocast(batch.images.device):
            features = model.encode(batch.images)
        for task, each in maps.items():
            each.add(features, batch.features[task], batch.held_out)
    for each in maps.values():
        each.gather()
    return maps


def _tokens(features: Features, kind: str, tap: int) -> Tensor:
    """The tokens (B, n, C) of one kind and tap; n is 1 for the CLS token."""
    return tokens(features.maps[tap].float()) if kind == "maps" else features.cls[tap].float()[:, None]
