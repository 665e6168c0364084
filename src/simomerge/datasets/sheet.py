"""Sheets of titled pictures, and the contact sheet of a dataset: images with their targets in colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from simomerge.core.errors import InputError
from simomerge.datasets.colours import colourise
from simomerge.datasets.legend import LINE, draw_lines, legend_of, lines_of
from simomerge.datasets.rows import Manifest, Row

GAP = 6
"""Pixels between pictures."""


@dataclass(frozen=True)
class _Cell:
    """A picture of the sheet: the image ("image") or a target, with the range of a one-channel map's values."""

    name: str
    picture: np.ndarray
    limits: tuple[float, float] | None = None


def contact_sheet(manifest: Manifest, images: int = 6, height: int = 120) -> Any:
    """A PIL image: a row per image that can be read, from all splits in turn, with its targets in colour.

    Above each picture stands the name of the task and, for maps, the lowest and the highest value. Below the rows,
    segmentations have a legend of their classes.

    Raises:
        InputError: no image can be read.
    """
    splits = [rows for rows in manifest.rows.values() if rows]
    spread = ([rows[i * len(rows) // images % len(rows)] for i in range(images)] for rows in splits)
    in_turn = {row.image: row for turn in zip(*spread, strict=True) for row in turn}
    readable = (cells for row in in_turn.values() if (cells := _cells(manifest, row)))
    shown = list(islice(readable, images))
    if not shown:
        raise InputError(f"{manifest.path}: no image can be shown with its targets; fix what is reported first.")
    tasks = [stored.task for stored in manifest.stored.values()]
    legends = [legend_of(task, None) for task in tasks if task.kind == "segmentation"]
    return sheet([[(_title(cell), cell.picture) for cell in cells] for cells in shown], height, legends)


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
            draw.text((left, number * step + 2), _fitting(title, picture.width, draw), fill="black")
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


def _title(cell: _Cell) -> str:
    return cell.name if cell.limits is None else f"{cell.name} {cell.limits[0]:.3g} to {cell.limits[1]:.3g}"


def _fitting(text: str, width: int, draw: Any) -> str:
    while text and draw.textlength(text) > width:
        text = text[:-1]
    return text


def _cells(manifest: Manifest, row: Row) -> Sequence[_Cell]:
    """An image and those of its targets that can be read; nothing if the image cannot be read."""
    try:
        image = manifest.image(row.image)
    except InputError:
        return []
    if image.dtype != np.uint8:
        image = (np.nan_to_num(image).clip(0, 1) * 255).round().astype(np.uint8)
    cells = [_Cell("image", image)]
    for name, path in row.targets.items():
        stored = manifest.stored[name]
        try:
            target = stored.read(path, image=row.image)
        except InputError:  # `check` reports it
            continue
        limits = None
        if stored.task.kind != "segmentation" and len(target) == 1:
            values = target[stored.task.valid(target[None])[0]]
            limits = (float(values.min()), float(values.max())) if len(values) else None
        cells.append(_Cell(name, colourise(stored.task, target.numpy()), limits))
    return cells
