"""Augmentation of an image together with its targets, whose values change where the geometry requires it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simomerge.core.errors import InputError
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
        tasks: tasks of the sample.
        sample: image and targets.
        generator: source of the randomness.
        scales: factors of 1 or more, one of which is drawn.

    Returns:
        A sample of the same size.
    """
    return random_flip(tasks, random_scale_crop(tasks, sample, generator, scales), generator)


def random_scale_crop(
    tasks: Mapping[str, Task], sample: dict[str, Any], generator: np.random.Generator, scales: Sequence[float] = SCALES
) -> dict[str, Any]:
    """Enlarge a sample by one of the scales and crop a window of its former size. Arguments as in `augment`.

    The result is the image of a camera with ``scale`` times the focal length. Depth is divided by the scale, so that
    size in the image and depth keep the relation that a model learns from other images. Disparity is proportional to
    the focal length, so it is multiplied by the scale. Normals do not change.
    """
    scale = float(generator.choice(np.asarray(scales)))
    height, width = sample["image"].shape[-2:]
    size = (round(height * scale), round(width * scale))
    top, left = (int(generator.integers(new - old + 1)) for new, old in zip(size, (height, width), strict=True))
    return scale_crop(tasks, sample, size, (top, left))


def scale_crop(
    tasks: Mapping[str, Task], sample: dict[str, Any], size: tuple[int, int], corner: tuple[int, int]
) -> dict[str, Any]:
    """Resize a sample to ``size`` and crop a window of its former size, with ``corner`` as its upper left pixel."""
    height, width = sample["image"].shape[-2:]
    (top, left), scale = corner, size[1] / width
    changed = {}
    for name, value in sample.items():
        enlarged = resize_target(tasks[name], value, size) if name in tasks else resized(value[None], size)[0]
        crop = enlarged[..., top : top + height, left : left + width].clone()
        changed[name] = _scaled(tasks[name].kind, crop, scale) if name in tasks else crop
    return changed


def _scaled(kind: str, target: Tensor, scale: float) -> Tensor:
    """The values of a target in an enlarged image; invalid values stay invalid."""
    if kind == "depth":
        return target / scale
    if kind == "disparity":
        return target * scale
    if kind == "log_depth":
        return torch.log1p(torch.expm1(target * LOG_DEPTH_RANGE) / scale) / LOG_DEPTH_RANGE
    return target


AUGMENTATIONS: dict[str, Callable[..., dict[str, Any]] | None] = {
    "none": None,
    "flip": random_flip,
    "scale-crop-flip": augment,
}
"""Augmentations by name; the last one is the paper's."""


def augmentation(name: str, tasks: Mapping[str, Task]) -> Any:
    """An augmentation by name, as a transform for `simomerge.datasets.batches.training_batches`; None for "none".

    Raises:
        InputError: the name is unknown.

    Example:
        >>> augmentation("none", {}) is None
        True
    """
    if name not in AUGMENTATIONS:
        raise InputError(f"unknown augmentation {name!r}; choose one of: {', '.join(AUGMENTATIONS)}.")
    function = AUGMENTATIONS[name]
    return partial(function, tasks) if function else None
