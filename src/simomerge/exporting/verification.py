"""Verification: an exported file against torch, on random and on real images, in each task's own measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simomerge.core.errors import InputError
from simomerge.datasets.load import load_data, load_images
from simomerge.datasets.pictures import Images, as_images
from simomerge.runtime import MEASURES, Maps, difference

LIMITS = {
    "fp32": {"labels": 0.1, "angle": 0.01, "relative": 0.01, "range": 0.01, "spread": 0.01, "largest": 1e-4},
    "fp16": {"labels": 1.0, "angle": 0.5, "relative": 1.0, "range": 0.5, "spread": 0.5, "largest": 0.02},
    "int8": {"labels": 10.0, "angle": 5.0, "relative": 10.0, "range": 5.0, "spread": 5.0, "largest": 0.3},
}
"""Precision -> measure -> the largest difference with which a file is written."""

HELD_OUT = 4
"""Images of a folder on which a file is verified; int8 is calibrated on others, if there are enough."""

OTHER_SIZE = "random, other size"
"""The source of frames that have another size than the traced ones."""

_FIXED = "Sizes cannot be free here: leave out --dynamic."

Frames = list[np.ndarray]
"""uint8 RGB (H, W, 3) each."""


def limits_of(outputs: dict[str, dict[str, Any]], precision: str, given: Mapping[str, float]) -> dict[str, float]:
    """Output -> the largest difference; ``given`` has other limits by task. Raises InputError for an unknown task."""
    tasks = {output["task"] for output in outputs.values()}
    for task, limit in given.items():
        if task not in tasks:
            raise InputError(f"a limit for {task!r}, but the export has {', '.join(sorted(tasks))}.")
        if not (isinstance(limit, (int, float)) and limit >= 0):
            raise InputError(f"the limit {limit!r} for {task!r} is no number of at least 0.")
    usual = LIMITS[precision]
    return {name: float(given.get(about["task"], usual[about["measure"]])) for name, about in outputs.items()}


def random_frames(size: tuple[int, int], count: int = 2) -> Frames:
    """Noise: the first of pixels, the others of larger and larger patches."""
    generator = np.random.default_rng(0)
    frames = []
    for index in range(count):
        step = 8**index
        coarse = generator.integers(0, 256, (-(-size[0] // step), -(-size[1] // step), 3), np.uint8)
        frames.append(coarse.repeat(step, 0).repeat(step, 1)[: size[0], : size[1]])
    return frames


def real_frames(images: Any, size: tuple[int, int], count: int) -> tuple[Frames, Frames]:
    """Frames to calibrate on (at most ``count``) and frames to verify on, of a folder or of rendered rooms.

    Raises:
        InputError: There is no such folder, or no image in it can be read.
    """
    if images is None:
        shrink = min(1.0, 128 / max(size))
        small = tuple(max(8, round(side * shrink)) for side in size)
        rooms = load_data("rooms", split="val", count=2, size=small)
        return [], [_bytes(rooms[index]["image"], size) for index in range(2)]
    source = load_images(images) if isinstance(images, (str, Path)) else images
    chosen = as_images(source, count + HELD_OUT, None)
    if not chosen.is_dataset:
        chosen = chosen.resized(size)
    chosen = chosen.readable()
    every = max(1, len(chosen) // HELD_OUT)
    held_out = list(range(0, len(chosen), every))[:HELD_OUT]
    others = [index for index in range(len(chosen)) if index not in held_out] if len(chosen) > HELD_OUT else held_out
    return _frames(chosen, others[:count], size), _frames(chosen, held_out, size)


def _frames(images: Images, indices: list[int], size: tuple[int, int]) -> Frames:
    return [_bytes(images.image(index), size) for index in indices]


def _bytes(image: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    from simomerge.core.images import resized

    bytes_: np.ndarray = (resized(image[None], size)[0] * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return np.ascontiguousarray(bytes_)


def verify(
    predict: Callable[[Frames], list[Maps]], frames: dict[str, Frames], wanted: dict[str, list[Maps]], outputs: Any
) -> list[dict[str, Any]]:
    """Compare a file's predictions with torch's: one row per output and source of frames.

    The frames of a source are predicted as one batch, and the first one also alone.

    Raises:
        InputError: The file does not run.
    """
    rows: list[dict[str, Any]] = []
    for source, given in frames.items():
        try:
            found, alone = predict(given), predict(given[:1])[0]
        except (InputError, RuntimeError, ValueError, AssertionError) as error:  # a program of torch raises any of them
            remedy = _FIXED if OTHER_SIZE in frames else "Choose another --size or another format."
            raise InputError(f"nothing was written, because the result fails: {error} {remedy}") from error
        for name, about in outputs.items():
            values, expected = (np.stack([each[name] for each in of]) for of in (found, wanted[source]))
            value = difference(about["measure"], values, expected)
            value = max(value, difference(about["measure"], alone[name], expected[0]))
            row = {"output": name, "images": source, "count": len(given), "difference": value, "limit": about["limit"]}
            rows.append({**row, "measure": MEASURES[about["measure"]], "ok": value <= about["limit"]})
    return rows


def check_rows(rows: list[dict[str, Any]], file: str) -> None:
    """Raise InputError for the row that is furthest beyond its limit."""
    wrong = [row for row in rows if not row["ok"]]
    if wrong:
        row = max(wrong, key=lambda row: row["difference"] / max(row["limit"], 1e-12))
        fixed = any(each["images"] == OTHER_SIZE for each in wrong)
        remedy = _FIXED if fixed else "Choose a higher precision, or accept it with --limit."
        raise InputError(
            f"{file}: nothing was written, because {row['output']} differs from torch by {row['difference']:.3g}"
            f" ({row['measure']}; limit {row['limit']:g}) on {row['images']} images. {remedy}"
        )
