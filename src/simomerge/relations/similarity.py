"""How similar the experts' features are, tap by tap: linear CKA, which ignores rotations and scale.

Only sums over tokens are kept, so memory does not depend on the number of images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simomerge.assembly.experts import with_merged_encoder
from simomerge.assembly.realign.teacher import observe
from simomerge.core.errors import InputError
from simomerge.core.machine import autocast
from simomerge.datasets.pictures import as_images, readable
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
    source = readable(as_images(images, count))
    unmerged = with_merged_encoder(base, experts, ZeroShot())  # the base with the experts' taps and normalisation
    first = next(iter(experts.values())).encoder
    names = [BASE, *experts]
    sums = [TokenSums.empty(*[width] * len(names)) for width in first.channels]
    done = 0
    for batch in observe(experts, source, label="CKA"):
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
