"""Labels that are stored as colours: a picture of the classes' colours, or one with a palette."""

from __future__ import annotations

from typing import Any

import numpy as np

from simomerge.core.errors import InputError
from simomerge.datasets.tasks import IGNORE_LABEL, Task


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
