"""What images a model was trained on, in a few numbers, and how far other images are from them.

The features of each image are averaged over its patches and projected onto a few fixed directions. Their means and
standard deviations over the training images are kept with the model, so that later users of the model can be warned of
images that differ, that are nearly all alike, or that have another size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simomerge.core.machine import autocast, in_float64
from simomerge.core.modes import evaluating
from simomerge.datasets.batches import images_within, ordered_batches
from simomerge.datasets.groups import evenly
from simomerge.models.encoders import Features
from simomerge.models.model import SimoModel

DIRECTIONS = 16
"""Number of directions onto which features are projected."""

MOST_IMAGES = 64
"""Images on which the numbers are measured."""


def sketch(features: Features) -> Tensor:
    """Means over the patches of the last tap, projected onto fixed directions: float64 (B, `DIRECTIONS`)."""
    pooled = in_float64(features.maps[-1]).mean((2, 3)).cpu()
    channel = torch.arange(1, pooled.shape[1] + 1, dtype=torch.float64)[:, None]
    direction = torch.arange(1, DIRECTIONS + 1, dtype=torch.float64)[None]
    # Multiples of the golden ratio are spread evenly over the circle, so the directions are nearly orthogonal.
    angles = 2 * math.pi * ((5**0.5 - 1) / 2 * channel * direction.square() % 1)
    return pooled @ (angles.cos() * math.sqrt(2 / pooled.shape[1]))


@torch.no_grad()
def training_images(model: SimoModel, data: Any) -> dict[str, Any]:
    """What the provenance of a trained model records about its images: their number, size and features.

    Args:
        data: The training images, all of one size.

    Returns:
        ``images``, ``size`` (height, width) and ``features``: ``mean`` and ``std``, `DIRECTIONS` numbers each.

    Example:
        >>> training_images(model, load_data("rooms", count=800))["size"]                          # doctest: +SKIP
        [64, 80]
    """
    places = evenly(range(len(data)), MOST_IMAGES)
    device, found, size = next(model.parameters()).device, [], (0, 0)
    with evaluating(model):
        some = data._subset(places).select([])
        for batch in ordered_batches(some, images_within(16, some[0]["image"])):
            size = (batch["image"].shape[-2], batch["image"].shape[-1])
            with autocast(device):
                found.append(sketch(model.encode(model.fit(batch["image"].to(device)))))
    values = torch.cat(found)
    numbers = {"mean": values.mean(0), "std": values.std(0, correction=0)}
    rounded = {key: [float(f"{number:.4g}") for number in each.tolist()] for key, each in numbers.items()}
    return {"images": len(data), "size": list(size), "features": rounded}


@dataclass(frozen=True)
class Familiarity:
    """How images compare with those that a model was trained on.

    Attributes:
        shift: Distance between the mean features, in standard deviations of the training images. Images from the same
            source have about ``sqrt(1 / n + 1 / 64)``.
        spread: Standard deviation of the features, relative to that of the training images.
    """

    shift: float
    spread: float


def familiarity(recorded: Mapping[str, Sequence[float]], sketches: Tensor) -> Familiarity | None:
    """Compare images with recorded features (the entry ``features`` of `training_images`).

    Args:
        sketches: The result of `sketch` for the images, (n, `DIRECTIONS`).

    Returns:
        None if the record does not have the expected form.
    """
    try:
        mean, std = (torch.tensor(recorded[key], dtype=torch.float64) for key in ("mean", "std"))
    except (KeyError, TypeError, ValueError):
        return None
    if mean.shape != std.shape or mean.shape != sketches.shape[1:]:
        return None
    unit = std.clamp(min=1e-9 + 1e-6 * float(std.max()))
    shift = ((sketches.mean(0) - mean) / unit).square().mean().sqrt()
    spread = (sketches.std(0, correction=0) / unit).square().mean().sqrt()
    return Familiarity(float(shift), float(spread))
