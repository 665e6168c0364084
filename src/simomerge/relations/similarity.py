"""How alike the experts' features are, tap by tap: linear CKA, which sees neither rotations nor scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from simomerge.assembly.experts import with_merged_encoder
from simomerge.assembly.realign.teacher import observe
from simomerge.core.errors import InputError
from simomerge.core.machine import autocast
from simomerge.datasets.pictures import as_images
from simomerge.merging import ZeroShot
from simomerge.models.model import SimoModel
from simomerge.relations.sums import TokenSums, cka

BASE = "base"
"""The base's name beside the tasks'."""


@dataclass(frozen=True)
class Similarity:
    """CKA of the patch tokens of every two encoders, the base's and the experts'.

    Attributes:
        names: the base, then the tasks.
        taps: blocks of the encoder, counted from 1.
        cka: per tap a symmetric matrix over the names; 1 means equal up to a rotation and a scale.
        images: how many were looked at.
    """

    names: list[str]
    taps: list[int]
    cka: list[list[list[float]]]
    images: int


@torch.no_grad()
def similarity(base: SimoModel, experts: Mapping[str, SimoModel], images: Any, count: int | None = 64) -> Similarity:
    """Linear CKA (Kornblith et al., arXiv 1905.00414) between base and experts at every tap.

    Only sums are kept, per tap the square of all encoders' channels together: memory does not depend on the number
    of images.

    Args:
        base: the foundation encoder.
        experts: by task, as `simomerge.assembly.experts.check_experts` gives.
        images: a folder of pictures, a sequence of images, or a dataset whose labels are not read.
        count: of the images.

    Raises:
        InputError: no image, a task called "base", or a base that has not the experts' taps.

    Example:
        >>> similarity(base, experts, "photos/").cka[-1]                                     # doctest: +SKIP
        [[1.0, 0.61, 0.58], [0.61, 1.0, 0.44], [0.58, 0.44, 1.0]]
    """
    if BASE in experts:
        raise InputError(f"a task called {BASE!r} cannot be told from the base: give it another name.")
    source = as_images(images, count).readable()
    unmerged = with_merged_encoder(base, experts, ZeroShot())  # the base as the experts tap and normalise it
    first = next(iter(experts.values())).encoder
    names = [BASE, *experts]
    sums = [TokenSums.empty(*[width] * len(names)) for width in first.channels]
    seen = 0
    for batch in observe(experts, source, label="CKA"):
        with autocast(batch.images.device):
            features = [unmerged.encode(batch.images), *batch.features.values()]
        for tap, total in enumerate(sums):
            total.add([found.maps[tap].float() for found in features])
        seen += len(batch.indices)
    return Similarity(names, list(first.taps), [_matrix(total) for total in sums], seen)


def _matrix(sums: TokenSums) -> list[list[float]]:
    blocks = sums.covariance()
    count = len(blocks)
    found = [[1.0] * count for _ in range(count)]
    for i in range(count):
        for j in range(i):
            found[i][j] = found[j][i] = cka(blocks[j][j], blocks[i][j], blocks[i][i])
    return found
