"""Rendering a range of scenes of a split with all labels."""

from __future__ import annotations

from typing import Any

import numpy as np

from simomerge.core.errors import InputError
from simomerge.datasets.rooms.labels import MODALITIES, dense_labels
from simomerge.datasets.rooms.render import render
from simomerge.datasets.rooms.scenes import sample_scenes

SPLITS = ("train", "val", "test", "pool")
CLASS_COLOURS = np.array(
    [
        (140, 170, 120),
        (70, 120, 180),
        (240, 200, 120),
        (150, 90, 70),
        (230, 110, 170),
        (130, 130, 140),
        (150, 100, 190),
        (200, 50, 45),
        (120, 215, 235),
        (250, 240, 90),
        (40, 160, 140),
    ],
    dtype=np.uint8,
)
_BATCH_RAYS = 20_000
"""Rays per batch: the arrays of one batch should stay in a core's second-level cache."""


def check_request(split: str, height: int, width: int, seed: int) -> None:
    """Raise InputError unless rooms of this kind can be rendered."""
    if split not in SPLITS:
        raise InputError(f"Unknown split {split!r} of the rooms: choose one of {', '.join(SPLITS)}.")
    for name, value in (("height", height), ("width", width)):
        if not 8 <= value <= 4096:
            raise InputError(f"The {name} of a room picture is {value}: give 8 to 4096 pixels.")
    if seed < 0:
        raise InputError(f"The seed of the rooms is {seed}: give 0 or more.")


def render_rooms(
    seed: int, split: str, start: int, stop: int, height: int = 64, width: int = 80, xp: Any = np
) -> dict[str, Any]:
    """Render scenes ``start`` to ``stop - 1`` of a split with all their labels.

    A scene depends only on ``(seed, split, its number)``, and its layout does not depend on the size of the image.

    Args:
        seed: Seed of the data set, 0 or more.
        split: One of ``SPLITS``.
        start, stop: The range of scene numbers.
        height, width: Size of the images in pixels.
        xp: The array namespace to compute with, NumPy or CuPy.

    Returns:
        One array per name in ``MODALITIES``, scenes first; see ``dense_labels`` for shapes and units.

    Raises:
        InputError: If the split is unknown or a number is out of range.

    Example:
        >>> render_rooms(0, "val", 0, 2)["normals"].shape
        (2, 64, 80, 3)
    """
    check_request(split, height, width, seed)
    if not 0 <= start < stop:
        raise InputError(f"Rooms {start} to {stop} are not a range: give 0 <= start < stop.")
    scenes = sample_scenes(seed, SPLITS.index(split), range(start, stop))
    # The cost of a batch depends on the largest number of things in any of its scenes, so scenes with similar numbers
    # of things are rendered together.
    order = np.lexsort((scenes.used[:, 3], scenes.used[:, 1]))
    step = max(1, _BATCH_RAYS // (height * width))
    batches = []
    for first in range(0, len(order), step):
        buffers = render(scenes.select(order[first : first + step]), height, width, xp)
        batches.append(dense_labels(buffers, xp))
    original_order = xp.asarray(np.argsort(order))
    return {name: xp.concatenate([batch[name] for batch in batches])[original_order] for name in MODALITIES}
