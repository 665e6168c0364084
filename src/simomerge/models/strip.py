"""A strip of pictures: an image and the predictions of every task, each with a title, and what the colours mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from simomerge.core.files import atomic_file
from simomerge.core.images import to_tensor
from simomerge.datasets.colours import colourise
from simomerge.datasets.legend import legend_of
from simomerge.datasets.sheet import sheet
from simomerge.datasets.tasks import Task

HEIGHT = 240
"""The height of a picture in pixels."""


class Predictor(Protocol):
    """What a strip needs of a `SimoModel`."""

    tasks: dict[str, Task]

    def predict(self, image: Any) -> Any:
        """The maps of an image by task."""


def strip_of(model: Predictor, image: Any) -> Any:
    """The strip of what a model predicts for an image, in any form that `SimoModel.predict` takes, as a PIL image."""
    pixels = (to_tensor(image)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    return strip(pixels, model.predict(image), model.tasks)


def save_strip(model: Predictor, image: Any, path: Path) -> None:
    """Write `strip_of` as a PNG file."""
    with atomic_file(path) as file:
        strip_of(model, image).save(file, "PNG", optimize=True)


def strip(image: np.ndarray, maps: Mapping[str, np.ndarray], tasks: Mapping[str, Task], height: int = HEIGHT) -> Any:
    """The strip as a PIL image.

    Args:
        image: uint8 (H, W, 3).
        maps: Predictions by task, as `SimoModel.predict` gives them.
        tasks: The tasks by name.
        height: Of each picture, in pixels.
    """
    pictures = [("input", image), *((name, colourise(tasks[name], values)) for name, values in maps.items())]
    legends = [legend_of(tasks[name], values) for name, values in maps.items()]
    return sheet([pictures], height, legends)
