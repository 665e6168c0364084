"""A strip of pictures: an image and the predictions of every task, each with a title, and what the colours mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from simomerge.core.files import atomic_file
from simomerge.core.images import to_tensor
from simomerge.datasets.colours import colourise
from simomerge.datasets.legend import LINE, draw_lines, legend_of, lines_of
from simomerge.datasets.tasks import Task

GAP, HEIGHT = 6, 240
"""Pixels between pictures, and the height of a picture."""


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


def sheet(rows: Sequence[Sequence[tuple[str, np.ndarray]]], height: int, legends: Sequence[Any] = ()) -> Any:
    """Rows of titled pictures uint8 (H, W, 3) above each other, with legends below, as a PIL image."""
    from PIL import Image, ImageDraw

    sized = [[(title, _at_height(picture, height)) for title, picture in row] for row in rows]
    width = max(sum(picture.width + GAP for _, picture in row) for row in sized) - GAP
    lines = [line for legend in legends if legend for line in lines_of(legend, width)]
    step = height + LINE + GAP
    made = Image.new("RGB", (width, step * len(sized) + LINE * len(lines)), "white")
    draw = ImageDraw.Draw(made)
    for number, row in enumerate(sized):
        left = 0
        for title, picture in row:
            draw.text((left, number * step + 2), title, fill="black")
            made.paste(picture, (left, number * step + LINE))
            left += picture.width + GAP
    draw_lines(draw, lines, step * len(sized))
    return made


def _at_height(picture: np.ndarray, height: int) -> Any:
    from PIL import Image

    image = Image.fromarray(picture)
    width = max(1, round(image.width * height / image.height))
    # Small pictures keep their pixels; interpolation would invent detail and colours that are in no legend.
    return image.resize((width, height), Image.Resampling.NEAREST if height > image.height else Image.Resampling.BOX)
