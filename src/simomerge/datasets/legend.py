"""What the colours of a task mean: named colours, or a bar from the lowest to the highest value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simomerge.datasets.colours import class_colours, colour_range, colour_scale, colourise
from simomerge.datasets.tasks import Task

LINE, SWATCH, BAR, NARROWEST = 16, 9, 96, 220
"""Pixels of drawn legends: height of a line, side of a square of colour, width of a colour bar and of a legend."""
READABLE = 640
"""Pixels: a legend is drawn twice as large where the picture is twice as wide as this, and so on."""

_DIRECTIONS = {"right": (1, 0), "down": (0, 1), "left": (-1, 0), "up": (0, -1)}
_NORMALS = {"+x": (1, 0, 0), "-x": (-1, 0, 0), "+y": (0, 1, 0), "-y": (0, -1, 0), "+z": (0, 0, 1)}
"""Where x, y and z point is a convention of the dataset."""
_VALUE_UNITS = {"depth": "m"}


@dataclass(frozen=True)
class Legend:
    """The meaning of the colours of one task.

    Attributes:
        title: The name of the task.
        entries: Names and their colours, uint8 RGB: classes, or directions.
        bar: The colours from the lowest to the highest value, uint8 (N, 3); None if there is no such scale.
        low, high: The two values, with the unit.
    """

    title: str
    entries: tuple[tuple[str, tuple[int, int, int]], ...] = ()
    bar: np.ndarray | None = None
    low: str = ""
    high: str = ""

    def __bool__(self) -> bool:
        """Whether there is something to show; pictures, such as albedo, explain themselves."""
        return bool(self.entries) or self.bar is not None


def legend_of(task: Task, values: np.ndarray | None, limits: Sequence[float] | None = None) -> Legend:
    """The legend of a picture that `colourise` made of the same arguments.

    Only the classes that occur in ``values`` are listed if there are more than twelve.

    Example:
        >>> found = legend_of(Task("depth"), np.array([[1.0, 4.0]], np.float32))
        >>> found.low, found.high, found.bar.shape
        ('1', '4 m', (96, 3))
        >>> [name for name, _ in legend_of(Task("parts", "segmentation", classes=("head", "arm")), None).entries]
        ['head', 'arm']
    """
    if task.kind == "segmentation":
        colours = task.colours or tuple(map(tuple, class_colours(len(task.classes)).tolist()))
        entries = tuple(zip(task.classes, colours, strict=True))
        if len(entries) > 12 and values is not None:
            present = set(np.unique(values).tolist())
            entries = tuple(entry for label, entry in enumerate(entries) if label in present)
        return Legend(task.name, entries)
    assert values is not None
    if task.kind == "normals" or (values.ndim == 3 and len(values) == 2):
        directions: Mapping[str, tuple[int, ...]] = _NORMALS if task.kind == "normals" else _DIRECTIONS
        return Legend(task.name, tuple((name, _colour(task, vector)) for name, vector in directions.items()))
    if values.ndim == 3 and len(values) == 3:
        return Legend(task.name)
    low, high = colour_range(task, values, limits)
    unit = task.unit if task.kind == "regression" else _VALUE_UNITS.get(task.kind, "")
    return Legend(
        task.name, (), colour_scale(task, np.linspace(0, 1, BAR)), f"{low:.3g}", f"{high:.3g} {unit}".rstrip()
    )


def _colour(task: Task, vector: tuple[int, ...]) -> tuple[int, int, int]:
    red, green, blue = colourise(task, np.array(vector, np.float32)[:, None, None], (0, 1))[0, 0].tolist()
    return red, green, blue


def lines_of(legend: Legend, width: int) -> list[list[tuple[int, str, Any]]]:
    """The parts of a drawn legend in lines: (left, text, colour or bar); each line is at most ``width`` pixels wide."""
    parts: list[tuple[str, Any]] = [(f"{legend.title}:", None)]
    if legend.bar is not None:
        parts += [(legend.low, None), (legend.high, legend.bar)]
    parts += list(legend.entries)
    lines: list[list[tuple[int, str, Any]]] = [[]]
    left = 4
    for text, colour in parts:
        room = 7 * len(text) + 12  # the built-in font is about six pixels wide
        room += 0 if colour is None else BAR + 6 if isinstance(colour, np.ndarray) else SWATCH + 5
        if lines[-1] and left + room > width:
            lines.append([])
            left = 4
        lines[-1].append((left, text, colour))
        left += room
    return lines


def draw_lines(draw: Any, lines: Sequence[Sequence[tuple[int, str, Any]]], top: int) -> None:
    """Draw the lines of a legend on a PIL drawing, from a height downwards."""
    for number, line in enumerate(lines):
        y = top + number * LINE
        for left, text, colour in line:
            shift = 0
            if isinstance(colour, np.ndarray):
                for x, each in enumerate(colour.tolist()):
                    draw.line((left + x, y + 3, left + x, y + 12), fill=tuple(each))
                shift = BAR + 6
            elif colour is not None:
                draw.rectangle((left, y + 3, left + SWATCH, y + 3 + SWATCH), fill=tuple(colour), outline="black")
                shift = SWATCH + 5
            draw.text((left + shift, y + 2), text, fill="black")


def with_legend(picture: np.ndarray, legend: Legend) -> np.ndarray:
    """A picture (H, W, 3) with its legend below, on white, uint8 (H', W', 3).

    A narrow picture becomes wider, and the legend of a wide one has larger letters.

    Example:
        >>> depth = np.array([[1.0, 4.0]], np.float32)
        >>> with_legend(colourise(Task("depth"), depth), legend_of(Task("depth"), depth)).shape
        (25, 220, 3)
    """
    from PIL import Image, ImageDraw

    if not legend:
        return picture
    height, width = picture.shape[:2]
    room = max(width, NARROWEST)
    zoom = max(1, room // READABLE)  # a line of 16 pixels is not readable below a photograph that is 4,000 wide
    lines = lines_of(legend, room // zoom)
    drawn = Image.new("RGB", (room // zoom, LINE * len(lines) + 8), "white")
    draw_lines(ImageDraw.Draw(drawn), lines, 4)
    drawn = drawn.resize((drawn.width * zoom, drawn.height * zoom), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (room, height + drawn.height), "white")
    sheet.paste(Image.fromarray(picture), (0, 0))
    sheet.paste(drawn, (0, height))
    return np.asarray(sheet)
