"""Augmentation: what is done to an image is done to its targets, and to those of their values that change with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simomerge.core.images import resized
from simomerge.datasets.base import random_flip
from simomerge.datasets.stored import resize_target
from simomerge.datasets.tasks import LOG_DEPTH_RANGE, Task

SCALES = (1.0, 1.2, 1.5)
"""Source: the reference code of arXiv 2504.11268, as in github.com/lorenmt/auto-lambda."""


def augment(
    tasks: Mapping[str, Task], sample: dict[str, Any], generator: np.random.Generator, scales: Sequence[float] = SCALES
) -> dict[str, Any]:
    """A random scale with a random crop, then a mirror image with probability one half: the paper's augmentation.

    Args:
        tasks: of the sample.
        sample: image and targets.
        generator: decides.
        scales: one is drawn; 1 or more.

    Returns:
        A sample of the same size.
    """
    return random_flip(tasks, random_scale_crop(tasks, sample, generator, scales), generator)


def random_scale_crop(
    tasks: Mapping[str, Task], sample: dict[str, Any], generator: np.random.Generator, scales: Sequence[float] = SCALES
) -> dict[str, Any]:
    """Enlarge a sample by one of the scales and cut a window of its former size out of it. Arguments as `augment`.

    It is what a camera of ``scale`` times the focal length sees. Depth is divided by the scale, as if it were seen by
    the camera of all other images: so size in the image and depth keep the relation that a model learns. Disparity and
    optical flow are proportional to the focal length: they are multiplied. Normals are the scene's own and stay.
    """
    scale = float(generator.choice(np.asarray(scales)))
    height, width = sample["image"].shape[-2:]
    size = (round(height * scale), round(width * scale))
    top, left = (int(generator.integers(new - old + 1)) for new, old in zip(size, (height, width), strict=True))
    return scale_crop(tasks, sample, size, (top, left))


def scale_crop(
    tasks: Mapping[str, Task], sample: dict[str, Any], size: tuple[int, int], corner: tuple[int, int]
) -> dict[str, Any]:
    """Resize a sample to ``size`` and cut a window of its former size out, whose upper left pixel is ``corner``."""
    height, width = sample["image"].shape[-2:]
    (top, left), scale = corner, size[1] / width
    changed = {}
    for name, value in sample.items():
        whole = resize_target(tasks[name], value, size) if name in tasks else resized(value[None], size)[0]
        cut = whole[..., top : top + height, left : left + width].clone()
        changed[name] = _scaled(tasks[name].kind, cut, scale) if name in tasks else cut
    return changed


def _scaled(kind: str, target: Tensor, scale: float) -> Tensor:
    """The values of a target in an image that was enlarged; those that do not count stay so."""
    if kind == "depth":
        return target / scale
    if kind in ("disparity", "flow"):
        return target * scale
    if kind == "log_depth":
        return torch.log1p(torch.expm1(target * LOG_DEPTH_RANGE) / scale) / LOG_DEPTH_RANGE
    return target
