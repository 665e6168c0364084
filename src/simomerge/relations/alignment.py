"""How far merged features are from each expert's, tap by tap, and how much of that a linear map undoes."""

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
from simomerge.datasets.pictures import as_images
from simomerge.models.model import SimoModel
from simomerge.relations.sums import TokenSums, cka


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
    model: SimoModel, experts: Mapping[str, SimoModel], images: Any, count: int | None = 64
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
    source = as_images(images, count).readable()
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
                for pair, chosen in zip(pairs[task, tap], (~held_out, held_out), strict=True):
                    pair.add([ours[chosen], theirs[chosen]])
    return [_measure(task, tap, *found) for (task, tap), found in pairs.items()]


def _measure(task: str, tap: int, train: TokenSums, held_out: TokenSums) -> TapAlignment:
    (xx, _), (zx, _) = train.covariance()
    unit = float(xx.diagonal().mean())
    eye = torch.eye(len(xx), dtype=torch.float64)
    (own_xx, _), (own_zx, own_zz) = held_out.covariance()  # CKA is about the sample's own mean
    spread = float(own_zz.trace())
    # Judged about the means of the images the map was solved on, as the map's bias is theirs.
    (seen_xx, _), (seen_zx, seen_zz) = held_out.covariance(train.mean)

    def r2(mapping: Tensor) -> float:
        between = mapping @ seen_zx.T
        left = float((seen_zz - between - between.T + mapping @ seen_xx @ mapping.T).trace())
        return 1 - left / spread if spread > 0 else float("nan")

    before = _plain_r2(held_out, spread)
    maps = [torch.linalg.solve(xx + ridge * unit * eye, (zx + ridge * unit * eye).T).T for ridge in RIDGES[:-1] if unit]
    best = max([*maps, eye], key=r2)
    mapped = best @ own_xx @ best.T, own_zx @ best.T, own_zz
    return TapAlignment(task, tap, before, max(r2(best), before), cka(own_xx, own_zx, own_zz), cka(*mapped))


def _plain_r2(pair: TokenSums, spread: float) -> float:
    """Of x as z, biases not repaired."""
    (xx, _), (zx, zz) = pair.covariance(torch.zeros_like(pair.total))
    left = float((zz - zx - zx.T + xx).trace())
    return 1 - left / spread if spread > 0 else float("nan")
