"""Which images are held out: whole groups of neighbours, because neighbouring frames of a video are nearly the same.

If single frames were held out, their neighbours in training would show what is in them. A fit would then look better
than it is, and a ridge would come out too small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

SHARE = 0.25
"""Share of the images that is held out, unless it is given."""

LEAST_IMAGES = 8
"""With fewer images, no choice by held-out images is made."""

RUN = 4
"""Runs that are shorter than this are joined, so that fewer neighbours are on both sides."""


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` of some items, spread evenly over them; the first and the last are among them.

    Example:
        >>> evenly(range(100), 4)
        [0, 33, 66, 99]
    """
    places = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[place] for place in places]


def held_out(images: Any, share: float = SHARE) -> list[int]:
    """Indices of the images that are held out, in ascending order.

    Folders are kept together where the images come from several of them; otherwise the images are split into runs of
    neighbours. About two groups, spread over all images, are held out, and never more than ``share`` of the images.

    Args:
        images: A dataset. ``images.group(index)``, if it exists, names the folder that an image is from.
        share: Share of the images to hold out, from 0 to 0.5.

    Returns:
        No index if there are fewer than ``1 / share`` images. At least two for the default share of
        `LEAST_IMAGES` images or more, because predictions for two images are compared.

    Example:
        >>> held_out([None] * 32)
        [12, 13, 14, 15, 28, 29, 30, 31]
        >>> held_out([None] * 8)
        [6, 7]
    """
    count = len(images)
    if share * count < 1 - 1e-9:
        return []
    by_folder = _every_nth(_folders(images), share)
    return by_folder if len(by_folder) > share * count / 2 else _every_nth(_runs(count, share), share)


def training_images(images: Any, share: float) -> list[int]:
    """Indices of the images that `held_out` leaves."""
    out = set(held_out(images, share))
    return [index for index in range(len(images)) if index not in out]


def _folders(images: Any) -> list[Sequence[int]]:
    """The images by folder, in the order of the images; none if the dataset names no folders."""
    found: dict[str, list[int]] = {}
    for index in range(len(images) if hasattr(images, "group") else 0):
        found.setdefault(images.group(index), []).append(index)
    return list(found.values())


def _runs(count: int, share: float) -> list[Sequence[int]]:
    few, several = (math.ceil(number / share - 1e-9) for number in (1, 2))
    runs = several if count >= RUN * several else few
    return [run.tolist() for run in np.array_split(np.arange(count), runs)]


def _every_nth(groups: list[Sequence[int]], share: float) -> list[int]:
    """Images of every group that keeps the held-out images at most at their share of the images so far."""
    seen, found = 0, list[int]()
    for group in groups:
        seen += len(group)
        if len(found) + len(group) <= share * seen + 1e-9:
            found += group
    return sorted(found)
