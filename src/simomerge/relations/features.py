"""Comparison of encoders' features, tap by tap: the experts with each other, and a merged model with each expert.

Only sums over tokens are kept, so memory does not depend on the number of images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simomerge.assembly.experts import with_merged_encoder
from simomerge.assembly.realign.sums import RIDGES
from simomerge.assembly.realign.teacher import matching_experts, observe
from simomerge.core.errors import InputError
from simomerge.core.machine import autocast
from simomerge.core.modes import evaluating
from simomerge.datasets.groups import held_out
from simomerge.datasets.pictures import as_images
from simomerge.merging import ZeroShot
from simomerge.models.model import SimoModel

BASE = "base"
"""Name of the base encoder among the tasks."""


@dataclass
class TokenSums:
    """Sums over the tokens of several feature maps of the same images, float64 on the CPU.

    Attributes:
        widths: channels of each map.
        tokens: number of tokens.
        total: sum of the tokens, (all channels,).
        products: sum of their outer products, (all channels, all channels).
    """

    widths: tuple[int, ...]
    tokens: int
    total: Tensor
    products: Tensor

    @classmethod
    def empty(cls, *widths: int) -> TokenSums:
        width = sum(widths)
        return cls(widths, 0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64))

    def add(self, maps: Sequence[Tensor]) -> None:
        """Add the tokens of a batch, one map (B, C, h, w) per entry of ``widths``."""
        rows = torch.cat(list(maps), 1).permute(0, 2, 3, 1).flatten(0, 2).double().cpu()
        self.tokens += len(rows)
        self.total += rows.sum(0)
        self.products += rows.T @ rows

    @property
    def mean(self) -> Tensor:
        """Mean token, (all channels,)."""
        return self.total / self.tokens

    def covariance(self, mean: Tensor | None = None) -> list[list[Tensor]]:
        """Covariance about a mean, by default the tokens' own, as one block per pair of maps."""
        own = self.mean
        mean = own if mean is None else mean
        full = self.products / self.tokens - torch.outer(own, own) + torch.outer(own - mean, own - mean)
        return [list(rows.split(self.widths, 1)) for rows in full.split(self.widths)]


def cka(xx: Tensor, zx: Tensor, zz: Tensor) -> float:
    """Linear centred kernel alignment (Kornblith et al., arXiv 1905.00414) of features x and z; NaN if one is constant.

    Args:
        xx, zz: covariance of each set of features, (C, C) and (D, D).
        zx: covariance between the two sets, (D, C).

    Example:
        >>> eye = torch.eye(2)
        >>> round(cka(eye, eye, eye), 6)
        1.0
    """
    size = float(torch.linalg.norm(xx) * torch.linalg.norm(zz))
    return float(torch.linalg.norm(zx)) ** 2 / size if size > 0 else float("nan")


@dataclass(frozen=True)
class Similarity:
    """CKA of the patch tokens of all pairs of encoders, the base's and the experts'.

    Attributes:
        names: the base, then the tasks.
        taps: blocks of the encoder, counted from 1.
        cka: per tap a symmetric matrix over the names; 1 means equal up to a rotation and a scale.
        images: number of images.
    """

    names: list[str]
    taps: list[int]
    cka: list[list[list[float]]]
    images: int


@torch.no_grad()
def similarity(base: SimoModel, experts: Mapping[str, SimoModel], images: Any, count: int | None = 64) -> Similarity:
    """Linear CKA between the base and the experts at every tap.

    Args:
        base: the foundation encoder.
        experts: experts by task, as `simomerge.assembly.experts.check_experts` returns them.
        images: a folder of pictures, a sequence of images, or a dataset whose labels are not read.
        count: number of images to use.

    Raises:
        InputError: no image, a task named "base", or a base without the experts' taps.

    Example:
        >>> similarity(base, experts, "photos/").cka[-1]                                     # doctest: +SKIP
        [[1.0, 0.61, 0.58], [0.61, 1.0, 0.44], [0.58, 0.44, 1.0]]
    """
    check_names(experts)
    source = as_images(images, count).readable()
    unmerged = with_merged_encoder(base, experts, ZeroShot())  # the base with the experts' taps and normalisation
    first = next(iter(experts.values())).encoder
    names = [BASE, *experts]
    sums = [TokenSums.empty(*[width] * len(names)) for width in first.channels]
    done = 0
    for batch in observe(experts, source, label="CKA", check=False):
        with autocast(batch.images.device):
            features = [unmerged.encode(batch.images), *batch.features.values()]
        for tap, total in enumerate(sums):
            total.add([found.maps[tap].float() for found in features])
        done += len(batch.indices)
    return Similarity(names, list(first.taps), [_matrix(total) for total in sums], done)


def check_names(experts: Mapping[str, SimoModel]) -> None:
    """Reject a task that has the base's name. Raises InputError."""
    if BASE in experts:
        raise InputError(f"a task called {BASE!r} has the same name as the base encoder: give it another name.")


def _matrix(sums: TokenSums) -> list[list[float]]:
    blocks = sums.covariance()
    count = len(blocks)
    found = [[1.0] * count for _ in range(count)]
    for i in range(count):
        for j in range(i):
            found[i][j] = found[j][i] = cka(blocks[j][j], blocks[i][j], blocks[i][i])
    return found


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
    evaluated on the fourth.

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
    source = as_images(images, count).readable()
    if not held_out(source):
        raise InputError(f"{len(source)} images: a quarter is held out; give at least 4.")
    taps = model.encoder.taps
    pairs = {
        (task, tap): [TokenSums.empty(width, width) for _ in range(2)]
        for task in experts
        for tap, width in zip(taps, model.encoder.channels, strict=True)
    }
    for batch in observe(experts, source):
        with evaluating(model), autocast(batch.images.device):
            merged = model.encode(batch.images)
        for task, features in batch.features.items():
            for tap, ours, theirs in zip(taps, merged.of(task).maps, features.maps, strict=True):
                for sums, chosen in zip(pairs[task, tap], (~batch.held_out, batch.held_out), strict=True):
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
