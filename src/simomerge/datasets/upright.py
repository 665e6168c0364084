"""Targets of images with an EXIF orientation: images are turned upright, and their targets with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.core.errors import InputError
from simomerge.core.orientation import orientation, turned


def turned_like(stored: np.ndarray, path: Any, image: Any) -> tuple[np.ndarray, int]:
    """A target turned as its image is, and the orientation of its file.

    A target with a tag of its own was turned by it when it was read. Without one, its size shows whether it was made
    for the pixels as the file of the image stores them, or for the upright image.

    Args:
        stored: the target (H, W, ...) as it was read.
        path: its file.
        image: the file of its image, or None.

    Returns:
        The target, and the tag by which its file is turned: 1 if it is not.

    Raises:
        InputError: the size does not show it.
    """
    own = orientation(path) if isinstance(path, Path) else None
    tag = (orientation(image) if isinstance(image, Path) else None) or 1
    if own is not None or tag == 1:
        return stored, own or 1
    lying = tag >= 5  # stored with rows and columns exchanged
    height, width = _upright_size(image, lying)
    like_upright = _alike(stored.shape[:2], (height, width))
    like_stored = _alike(stored.shape[:2], (width, height) if lying else (height, width))
    if like_upright != like_stored:
        return (turned(stored, tag), tag) if like_stored else (stored, 1)
    raise InputError(
        f"{path} has no EXIF orientation, but its image {image} has (orientation {tag}), and their sizes do not show"
        " whether the target is turned too. Save the image upright without the tag, or give the target a tag as well:"
        " that of the image, or 1 if it is upright."
    )


def turned_vectors(vectors: np.ndarray, tag: int, path: Any) -> np.ndarray:
    """Normals or flow (C, H, W) of a map that was turned by a tag: mirroring changes the sign of x or y.

    Raises:
        InputError: they were turned by a quarter, which would need to know whether y points up or down.
    """
    if tag >= 5:
        raise InputError(
            f"{path}: normals and flow cannot be turned by a quarter (EXIF orientation {tag}), because the file does"
            " not say whether y points up or down. Save the image and its target upright, without the tag."
        )
    signs = {2: (-1, 1, 1), 3: (-1, -1, 1), 4: (1, -1, 1)}.get(tag, (1, 1, 1))
    return vectors * np.array(signs[: len(vectors)], vectors.dtype)[:, None, None]


def _upright_size(image: Path, lying: bool) -> tuple[int, int]:
    from PIL import Image

    with Image.open(image) as picture:
        # Pillow reports the upright size of TIFF files
        width, height = picture.size[::-1] if lying and picture.format != "TIFF" else picture.size
    return height, width


def _alike(shape: Sequence[int], size: tuple[int, int]) -> bool:
    """Whether a shape has the proportions of a size, up to rounding by one pixel."""
    return abs(shape[0] * size[1] - shape[1] * size[0]) <= max(size)
