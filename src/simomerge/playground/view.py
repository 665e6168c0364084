"""What the page shows for one photo, as plain data: pictures, values under the pointer, legends, sentences."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from simomerge.datasets.colours import colour_range, colourise
from simomerge.datasets.legend import Legend, legend_of
from simomerge.datasets.tasks import Task
from simomerge.playground.workshop import EXPERTS, MERGED, MODEL, REPAIRED, Look

PHOTO = "photo"
LABELS = {
    PHOTO: "photo",
    EXPERTS: "experts",
    MERGED: "merged",
    REPAIRED: "merged, heads repaired",
    MODEL: "finished model",
}
"""The columns in words."""

GRID = 128
"""Longest side of the grids of values that the page reads from, in cells."""

_NONE = 65535
"""Stands for "no value" in a grid."""


def view_of(look: Look) -> dict[str, Any]:
    """The content of the viewer, as JSON.

    Example:
        >>> task = Task("depth")
        >>> maps = {"depth": np.full((2, 4), 3.0, np.float32)}
        >>> view = view_of(Look(np.zeros((2, 4, 3), np.uint8), {"depth": task}, {"experts": maps}))
        >>> view["grid"], [column["label"] for column in view["columns"]]
        ([4, 2], ['photo', 'experts'])
    """
    height, width = look.photo.shape[:2]
    shrink = min(1.0, GRID / max(height, width))
    grid = max(1, round(width * shrink)), max(1, round(height * shrink))
    columns = [PHOTO, *look.columns]
    return {
        "size": [width, height],
        "grid": list(grid),
        "photo": _picture(look.photo, "webp"),
        "columns": [{"key": key, "label": LABELS[key]} for key in columns],
        "tasks": [_task(look, task, grid) for task in look.tasks.values()],
    }


def _task(look: Look, task: Task, grid: tuple[int, int]) -> dict[str, Any]:
    maps = {column: found[task.name] for column, found in look.columns.items() if task.name in found}
    first = next(iter(maps.values()))
    one_channel = task.kind != "segmentation" and first.ndim == 2
    limits = colour_range(task, first) if one_channel else None  # the same colours in all columns
    legend = legend_of(task, np.stack(list(maps.values())) if task.kind == "segmentation" else first, limits)
    exact = task.kind == "segmentation"
    return {
        "name": task.name,
        "kind": task.kind,
        "unit": legend.high.partition(" ")[2],
        "legend": _legend(legend),
        "classes": list(task.classes),
        "pictures": {
            column: _picture(colourise(task, values, limits), "png" if exact else "webp")
            for column, values in maps.items()
        },
        "values": {column: _values(task, values, grid) for column, values in maps.items()},
        "distances": {
            column: _distance(task, found[task.name]) for column, found in look.distances.items() if task.name in found
        },
        "solid": task.kind == "depth",
    }


def _range(values: np.ndarray) -> tuple[float, float]:
    """The smallest and largest finite value; 0 and 1 if there is none."""
    known = values[np.isfinite(values)]
    return (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)


def _legend(legend: Legend) -> dict[str, Any]:
    if legend.bar is not None:
        stops = legend.bar[np.linspace(0, len(legend.bar) - 1, 9).round().astype(int)]
        return {"ramp": [_hex(colour) for colour in stops], "low": legend.low, "high": legend.high}
    return {"names": [{"name": name, "colour": _hex(colour)} for name, colour in legend.entries]}


def _distance(task: Task, value: float) -> str:
    """How far a prediction is from the expert's, in words.

    Example:
        >>> _distance(Task("depth"), 0.2134), _distance(Task("normals"), 12.34)
        ('0.213 m from the expert', '12.3° from the expert')
    """
    if not math.isfinite(value):
        return ""
    if task.higher_is_better:
        return f"{value:.0f} {task.unit} {task.metric.replace('miou', 'mIoU')} with the expert"
    unit = task.unit.replace("deg", "°")
    return f"{_number(value)}{'' if unit == '°' else ' '}{unit} from the expert".replace("  ", " ")


def _values(task: Task, values: np.ndarray, grid: tuple[int, int]) -> dict[str, Any]:
    """Values at the cells of a grid (width, height): 16-bit numbers, channel by channel, and how to scale them."""
    planes = values[None] if values.ndim == 2 else values
    height, width = planes.shape[-2:]
    rows = ((np.arange(grid[1]) + 0.5) * height / grid[1]).astype(int)
    columns = ((np.arange(grid[0]) + 0.5) * width / grid[0]).astype(int)
    sampled = planes[:, rows][:, :, columns]
    if task.kind == "segmentation":
        low, step, stored = 0.0, 1.0, np.where(sampled < 0, _NONE, sampled)
    else:
        low, high = _range(sampled)
        step = max(high - low, 1e-9) / (_NONE - 1)
        scaled = (np.where(np.isfinite(sampled), sampled, low).astype(np.float64) - low) / step
        stored = np.where(np.isfinite(sampled), np.rint(scaled), _NONE)
    content = base64.b64encode(stored.clip(0, _NONE).astype("<u2").tobytes()).decode("ascii")
    return {"data": content, "planes": len(planes), "low": low, "step": step}


def _picture(pixels: np.ndarray, kind: str) -> str:
    """Pixels as a data URL; labels without loss, photos and smooth maps nearly so."""
    from PIL import Image

    target = io.BytesIO()
    Image.fromarray(pixels).save(target, kind.upper(), **({"quality": 90} if kind == "webp" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(target.getvalue()).decode('ascii')}"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _hex(colour: Sequence[int]) -> str:
    return "#" + "".join(f"{int(channel):02x}" for channel in colour)
