"""What the page offers for download: predictions and models, as ZIP files in a folder of the server."""

from __future__ import annotations

import io
import json
import math
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.core.files import temporary_folder
from simomerge.datasets.colours import colourise
from simomerge.exporting.export import export
from simomerge.models.model import SimoModel
from simomerge.playground.workshop import Choice, Look, has_scale


def results_file(look: Look, choice: Choice, folder: Path) -> Path:
    """A ZIP file with the photo and, per column and task, a coloured picture and the values (.npy); and the choice.

    Example:
        >>> from simomerge.datasets.tasks import Task
        >>> photo, depth = np.zeros((2, 4, 3), np.uint8), np.ones((2, 4), np.float32)
        >>> look = Look(photo, {"depth": Task("depth")}, {"experts": {"depth": depth}})
        >>> sorted(zipfile.ZipFile(results_file(look, Choice(), Path())).namelist())
        ['choice.json', 'experts/depth.npy', 'experts/depth.png', 'photo.png']
    """
    path = folder / "predictions.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("choice.json", json.dumps(_described(look, choice), indent=2, allow_nan=False))
        archive.writestr("photo.png", _png(look.photo))
        for column, maps in look.columns.items():
            for task, values in maps.items():
                content = io.BytesIO()
                np.save(content, values, allow_pickle=False)
                archive.writestr(f"{column}/{task}.npy", content.getvalue())
                archive.writestr(f"{column}/{task}.png", _png(colourise(look.tasks[task], values)))
    return path


def model_file(model: SimoModel, folder: Path) -> Path:
    """A ZIP file with a model folder, for `simomerge predict`, `simomerge export` and `simomerge.load`."""
    path = folder / "model.zip"
    with temporary_folder(folder / "model") as written, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        model.save_pretrained(written / "scene")
        for file in sorted((written / "scene").rglob("*")):
            if file.is_file():
                archive.write(file, Path("scene") / file.relative_to(written / "scene"))
    return path


def onnx_file(model: SimoModel, size: tuple[int, int], folder: Path) -> Path:
    """A ZIP file with an exported model for images of one (height, width), and the frame that checks it on a device.

    Raises:
        InputError: The model cannot be exported; the message says why.
    """
    path = folder / "scene-onnx.zip"
    written = export(model, folder / "scene.onnx", size)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in written["files"]:
            archive.write(file, Path(file).name)
    return path


def _described(look: Look, choice: Choice) -> dict[str, Any]:
    """The choice, without a scale for methods that have none, and the distances, with None for those that are NaN."""
    distances = {
        column: {task: value if math.isfinite(value) else None for task, value in values.items()}
        for column, values in look.distances.items()
    }
    found = {**asdict(choice), "distances": distances}
    if not has_scale(choice.method):
        del found["scale"]
    return found


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()
