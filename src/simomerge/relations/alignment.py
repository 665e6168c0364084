"""How far merged features are from each expert's, tap by tap, and how much of that a linear map undoes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simomerge.datasets.pictures import as_images, readable
from simomerge.devices import autocast
from simomerge.errors import InputError
from simomerge.model import SimoModel
from simomerge.progress import Progress, silent
from simomerge.realignment import HELD_OUT, RIDGES
from simomerge.realignment.experts import evaluating, matching_experts, observe


@dataclass(frozen=True)
class TapAlignment:
    """One task's features at one tap, merged against the expert's, on held-out images.

    Attributes:
        task: the expert's.
        tap: the block of the encoder, counted from 1.
        r2_before, r2_after: R^2 of the merged features as the expert's, as they are and after the best linear map of
            this tap's patches; what is missing to 1 afterwards is not linear, or needs more images to be found.
        cka_before, cka_after: linear centred kernel alignment (Kornblith et al., arXiv 1905.00414) of the same pairs;
            it does not see rotations.
    """

    task: str
    tap: int
    r2_before: float
    r2_after: float
    cka_before: float
    cka_after: float


@torch.no_grad()
def alignment(
    model: SimoModel, experts: Mapping[str, SimoModel], images: Any, count: int | None = 64, progress: Progress = silent
) -> list[TapAlignment]:
    """Compare a merged encoder's patch tokens with each expert's, before and after a per-tap linear map.

    The map is the fold's (ridge regression shrunk towards the identity), solved on three of four images and judged on
    the fourth. Only sums are kept: memory does not depend on the number of images.

    Args:
        model: a merged model.
        experts: by task.
        images: a folder of pictures, a sequence of images, or a dataset whose labels are not read.
        count: of the images.

    Raises:
        InputError: fewer than four images, or experts that do not fit.

    Example:
        >>> for row in alignment(model, experts, "photos/"):                      # doctest: +SKIP
        ...     print(row.task, row.tap, row.r2_before, row.r2_after)
    """
    experts = matching_experts(model, experts)
    source = readable(as_images(images, count))
    if len(source) < HELD_OUT:
        raise InputError(f"{len(source)} images: every fourth is held out; give at least {HELD_OUT}.")
    taps = model.encoder.taps
    pairs = {
        (task, tap): [_Pair.empty(width) for _ in range(2)]
        for task in experts
        for tap, width in zip(taps, model.encoder.channels, strict=True)
    }
    for batch in observe(experts, source, progress=progress):
        with evaluating(model), autocast(batch.images.device):
            merged = model.encode(batch.images)
        held_out = torch.tensor([index % HELD_OUT == HELD_OUT - 1 for index in batch.indices])
        for task, features in batch.features.items():
            for tap, ours, theirs in zip(taps, merged.maps, features.maps, strict=True):
                for pair, chosen in zip(pairs[task, tap], (~held_out, held_out), strict=True):
                    pair.add(ours[chosen], theirs[chosen])
    return [_measure(task, tap, *found) for (task, tap), found in pairs.items()]


@dataclass
class _Pair:
    """Sums over tokens of merged (x) and expert (z) features, float64: first C, then C channels."""

    tokens: int
    total: Tensor
    products: Tensor

    @classmethod
    def empty(cls, width: int) -> _Pair:
        return cls(
            0, torch.zeros(2 * width, dtype=torch.float64), torch.zeros(2 * width, 2 * width, dtype=torch.float64)
        )

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        rows = torch.cat([ours, theirs], 1).permute(0, 2, 3, 1).flatten(0, 2).double().cpu()
        self.tokens += len(rows)
        self.total += rows.sum(0)
        self.products += rows.T @ rows

    def covariance(self, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of (x, x), (z, x) and (z, z), about a mean (2 C,)."""
        own = self.total / self.tokens
        full = self.products / self.tokens - torch.outer(own, own) + torch.outer(own - mean, own - mean)
        width = len(mean) // 2
        return full[:width, :width], full[width:, :width], full[width:, width:]


def _measure(task: str, tap: int, train: _Pair, held_out: _Pair) -> TapAlignment:
    mean = train.total / train.tokens
    xx, zx, _ = train.covariance(mean)
    unit = float(xx.diagonal().mean())
    eye = torch.eye(len(xx), dtype=torch.float64)
    # Judged about the means of the images the map was solved on, as the map's bias is theirs.
    seen = held_out.covariance(mean)
    spread = float(held_out.covariance(held_out.total / held_out.tokens)[2].trace())

    def r2(mapping: Tensor) -> float:
        x, cross, z = seen
        left = float((z - mapping @ cross.T - cross @ mapping.T + mapping @ x @ mapping.T).trace())
        return 1 - left / spread if spread > 0 else float("nan")

    before = _plain_r2(held_out, spread)
    maps = [torch.linalg.solve(xx + ridge * unit * eye, (zx + ridge * unit * eye).T).T for ridge in RIDGES[:-1] if unit]
    best = max([*maps, eye], key=r2)
    own = held_out.covariance(held_out.total / held_out.tokens)  # CKA is about the sample's own mean
    return TapAlignment(task, tap, before, max(r2(best), before), _cka(eye, *own), _cka(best, *own))


def _plain_r2(pair: _Pair, spread: float) -> float:
    """Of x as z, biases not repaired."""
    width = len(pair.total) // 2
    xx, zx, zz = pair.products[:width, :width], pair.products[width:, :width], pair.products[width:, width:]
    left = float((zz - zx - zx.T + xx).trace()) / pair.tokens
    return 1 - left / spread if spread > 0 else float("nan")


def _cka(mapping: Tensor, xx: Tensor, zx: Tensor, zz: Tensor) -> float:
    ours, between = mapping @ xx @ mapping.T, zx @ mapping.T
    size = float(torch.linalg.norm(ours) * torch.linalg.norm(zz))
    return float(torch.linalg.norm(between)) ** 2 / size if size > 0 else float("nan")
