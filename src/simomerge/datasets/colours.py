"""Colours of targets and predictions, and labels that are stored as colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from simomerge.core.errors import InputError
from simomerge.datasets.losses import IGNORE_LABEL
from simomerge.datasets.tasks import Task

_BAND = 1 << 18
"""Pixels that are coloured at once."""


def class_colours(count: int) -> np.ndarray:
    """``count`` colours, well separated up to 20, uint8 (count, 3)."""
    from matplotlib import colormaps

    table = colormaps["tab20"](np.arange(count) % 20)[:, :3]
    return (table * 255).astype(np.uint8)


def colourise(task: Task, values: np.ndarray, limits: Sequence[float] | None = None) -> np.ndarray:
    """Colours for a prediction or target of one image.

    Args:
        task: the task of the values.
        values: labels (H, W), a one-channel map (H, W) or (1, H, W), or vectors (C, H, W).
        limits: (low, high) of the colour range of one-channel maps and of the lengths of flow; by default the range of
            a regression, or the map's own range. Pass the range of the ground truth to make the colours of a prediction
            comparable with it.

    Returns:
        uint8 RGB (H, W, 3); invalid pixels are black. Two channels are shown as directions (hue) and lengths
        (saturation), three as colours, and more as their Euclidean norm.
    """
    values = np.asarray(values)
    limits = colour_range(task, values, limits)
    if values.ndim == 3 and len(values) > 3:
        values = np.linalg.norm(values, axis=0)
    # In bands, because colours are computed with 32 bytes per pixel.
    height, width = values.shape[-2:]
    colours, rows = np.empty((height, width, 3), np.uint8), max(_BAND // max(width, 1), 1)
    for start in range(0, height, rows):
        colours[start : start + rows] = _coloured(task, values[..., start : start + rows, :], limits)
    return colours


def colour_scale(task: Task, shares: np.ndarray) -> np.ndarray:
    """The colours of a one-channel map at shares (...) of its range, from 0 to 1: uint8 (..., 3)."""
    from matplotlib import colormaps

    return (colormaps[task.behaviour.colour_map](shares)[..., :3] * 255).astype(np.uint8)


def colour_range(task: Task, values: np.ndarray, limits: Sequence[float] | None = None) -> tuple[float, float]:
    """The values that have the first and the last colour of a map, for the arguments of `colourise`.

    Example:
        >>> colour_range(Task("depth"), np.array([[0.0, 2.0, 5.0]], np.float32))     # 0 marks an invalid pixel
        (2.0, 5.0)
    """
    channels = len(values) if values.ndim == 3 else 1
    limits = limits or task.range or None
    if limits and channels <= 3:  # lengths of vectors have the range of their picture
        return float(limits[0]), float(limits[1])
    if task.kind in ("segmentation", "normals") or channels == 3:
        return 0.0, 1.0
    if channels == 2:
        x, y = np.where(np.isfinite(values).all(0), values, 0).astype(np.float32)
        return 0.0, float(np.hypot(x, y).max(initial=0))
    values = np.linalg.norm(values, axis=0) if channels > 3 else values
    plane = values.reshape(values.shape[-2:]).astype(np.float32)
    valid = _valid(task, plane)
    return (float(plane[valid].min()), float(plane[valid].max())) if valid.any() else (0.0, 1.0)


def _valid(task: Task, plane: np.ndarray) -> np.ndarray:
    return np.isfinite(plane) & task.valid(torch.from_numpy(plane)).numpy()


def _coloured(task: Task, values: np.ndarray, limits: Sequence[float]) -> np.ndarray:
    """Some rows of `colourise`."""
    if task.kind == "segmentation":
        colours = np.asarray(task.colours, np.uint8) if task.colours else class_colours(len(task.classes))
        return np.where((values >= 0)[..., None], colours[np.clip(values, 0, len(colours) - 1)], 0).astype(np.uint8)
    if task.kind == "normals":
        valid = np.square(values).sum(0) > 0
        return (np.where(valid, values * 0.5 + 0.5, 0).clip(0, 1).transpose(1, 2, 0) * 255).astype(np.uint8)
    low, high = limits
    if values.ndim == 3 and len(values) == 2:
        return _directions(values, max(abs(high), 1e-6))
    if values.ndim == 3 and len(values) == 3:
        low, high = (low, high) if task.kind == "regression" else (0, 1)
        scaled = (np.nan_to_num(values, nan=low) - low) / (high - low)
        return (scaled.clip(0, 1).transpose(1, 2, 0) * 255).astype(np.uint8)
    plane = values.reshape(values.shape[-2:]).astype(np.float32)
    scaled = (np.nan_to_num(plane) - low) / max(high - low, 1e-6)
    return np.where(_valid(task, plane)[..., None], colour_scale(task, scaled.clip(0, 1)), 0).astype(np.uint8)


def _directions(vectors: np.ndarray, longest: float) -> np.ndarray:
    """Vectors (2, H, W) as colours: the hue is the direction (red: right, y points down), the saturation the length."""
    from matplotlib.colors import hsv_to_rgb

    valid = np.isfinite(vectors).all(0)
    x, y = np.where(valid, vectors, 0).astype(np.float32)
    hue = (np.arctan2(y, x) / (2 * np.pi)) % 1
    colours = hsv_to_rgb(np.stack([hue, (np.hypot(x, y) / longest).clip(0, 1), np.ones_like(hue)], -1))
    return (np.where(valid[..., None], colours, 0) * 255).astype(np.uint8)


def labels_of_colours(colours: np.ndarray, task: Task, ignored: tuple[tuple[int, int, int], ...], path: Any) -> Any:
    """The class of every colour (H, W, 3 or 4), int64 (H, W); -1 where the colour is ignored.

    Args:
        colours: uint8, as stored; transparency does not count.
        task: a segmentation with colours.
        ignored: colours of pixels that do not count.
        path: the file, for messages.

    Raises:
        InputError: a colour belongs to no class.
    """
    table = dict.fromkeys(map(_packed, ignored), IGNORE_LABEL)
    table |= {_packed(colour): label for label, colour in enumerate(task.colours)}
    packed = colours[..., :3].astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    found, places = np.unique(packed, return_inverse=True)
    if unknown := [value for value in found.tolist() if value not in table]:
        shown = ", ".join(str([value >> 16, value >> 8 & 255, value & 255]) for value in unknown[:3])
        raise InputError(
            f"{path}: {len(unknown)} colours of {task.name} belong to no class, first {shown}; add them to the classes"
            " and their colours, or to ignore."
        )
    return np.array([table[value] for value in found.tolist()], np.int64)[places].reshape(packed.shape)


def labels_of_palette(
    indices: np.ndarray, colours: np.ndarray, task: Task, ignored: tuple[tuple[int, int, int], ...], path: Any
) -> np.ndarray:
    """The labels of a picture with a palette: its indices, or the classes of its colours.

    Args:
        indices: (H, W).
        colours: what the palette shows, uint8 (H, W, 3).
        task, ignored, path: as in `labels_of_colours`.

    Raises:
        InputError: indices and colours are both labels of the task, and they differ.
    """
    used = set(map(tuple, np.unique(colours.reshape(-1, 3), axis=0).tolist()))
    if not used <= {*task.colours, *ignored}:
        return indices
    labels: np.ndarray = labels_of_colours(colours, task, ignored, path)
    known = labels != IGNORE_LABEL
    if bool((indices < len(task.classes)).all()) and (labels != indices)[known].any():
        raise InputError(
            f"{path}: the indices of its palette are labels of {task.name}, and its colours are those of other classes;"
            " change the colours in the manifest, or save the labels as a grey picture."
        )
    return labels


def is_grey(colours: np.ndarray) -> bool:
    """Whether a picture (H, W, 3 or 4) has three equal channels."""
    return bool((colours[..., :1] == colours[..., :3]).all())


def _packed(colour: tuple[int, int, int]) -> int:
    red, green, blue = colour
    return red << 16 | green << 8 | blue
