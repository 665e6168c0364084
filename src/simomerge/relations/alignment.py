"""How far merged features are from each expert's, tap by tap, and how much of the difference a linear map removes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simomerge.assembly.realign import HELD_OUT, RIDGES
from simomerge.assembly.realign.teacher import evaluating, matching_experts, observe
from simomerge.core.errors import InputError
from simomerge.core.machine import autocast
from simomerge.datasets.pictures import as_images, readable
from simomerge.models.model import SimoModel
from simomerge.relations.similarity import TokenSums, cka


@dataclass(frozen=True)
class TapAlignment:
    """One task's features at one tap: the merged encoder's against the expert's, on held-out images.

    Attributes:
        task: the expert's task.
        tap: block of the encoder, counted from 1.
        r2_before, r2_after: R^2 of the merged features as a prediction of the expert's, unchanged and after the best
            linear map of this tap's patches. What is missing to 1 afterwards is not linear, or needs more images.
        cka_before, cka_after: linear centred kernel alignment (Kornblith et al., arXiv 1905.00414) of the same
            features; it ignores rotations.
    """

    task: str
    tap: int
    r2_before: float
    r2_after: float
    cka_before: float
    cka_after: float


@torch.no_grad()
def alignment(
    model: SimoModel, experts: Mapping[str, SimoModel], images: Any, count: int | None = 64
) -> list[TapAlignment]:
    """Compare a merged encoder's patch tokens with each expert's, before and after a linear map per tap.

    The map is the fold's: ridge regression that shrinks towards the identity. It is solved on three of four images and
    evaluated on the fourth. Only sums are kept, so memory does not depend on the number of images.

    Args:
        model: a merged model.
        experts: experts by task.
        images: a folder of pictures, a sequence of images, or a dataset whose labels are not read.
        count: number of images to use.

    Raises:
        InputError: fewer than four images, or experts that do not fit the model.

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
        (task, tap): [TokenSums.empty(width, width) for _ in range(2)]
        for task in experts
        for tap, width in zip(taps, model.encoder.channels, strict=True)
    }
    for batch in observe(experts, source):
        with evaluating(model), autocast(batch.images.device):
            merged = model.encode(batch.images)
        held_out = torch.tensor([index % HELD_OUT == HELD_OUT - 1 for index in batch.indices])
        for task, features in batch.features.items():
            for tap, ours, theirs in zip(taps, merged.maps, features.maps, strict=True):
                for sums, chosen in zip(pairs[task, tap], (~held_out, held_out), strict=True):
                    sums.add([ours[chosen], theirs[chosen]])
    return [_measure(task, tap, *sums) for (task, tap), sums in pairs.items()]


def _measure(task: str, tap: int, train: TokenSums, held_out: TokenSums) -> TapAlignment:
    """The alignment of merged features x and expert features z."""
    (xx, _), (zx, _) = train.covariance()
    unit = float(xx.diagonal().mean())
    eye = torch.eye(len(xx), dtype=torch.float64)
    (own_xx, _), (own_zx, own_zz) = held_out.covariance()  # CKA is centred on the held-out images themselves
    # The bias of the map comes from the training images, so R^2 after the map is centred on their means.
    (map_xx, _), (map_zx, map_zz) = held_out.covariance(train.mean)
    (raw_xx, _), (raw_zx, raw_zz) = held_out.covariance(torch.zeros_like(held_out.total))

    def r2(mapping: Tensor, xx: Tensor, zx: Tensor, zz: Tensor) -> float:
        between = mapping @ zx.T
        error, spread = float((zz - between - between.T + mapping @ xx @ mapping.T).trace()), float(own_zz.trace())
        return 1 - error / spread if spread > 0 else float("nan")

    before = r2(eye, raw_xx, raw_zx, raw_zz)  # unchanged features have no bias correction
    maps = [torch.linalg.solve(xx + ridge * unit * eye, (zx + ridge * unit * eye).T).T for ridge in RIDGES[:-1] if unit]
    best = max([*maps, eye], key=lambda mapping: r2(mapping, map_xx, map_zx, map_zz))
    after = max(r2(best, map_xx, map_zx, map_zz), before)
    mapped = cka(best @ own_xx @ best.T, own_zx @ best.T, own_zz)
    return TapAlignment(task, tap, before, after, cka(own_xx, own_zx, own_zz), mapped)
