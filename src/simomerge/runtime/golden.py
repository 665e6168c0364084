"""The golden frame of an export, predicted on the device and compared with what torch predicted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from simomerge.core.errors import InputError
from simomerge.runtime.scene import Maps, Scene

MEASURES = {
    "labels": "% other labels",
    "angle": "deg, mean",
    "relative": "%, mean relative",
    "range": "% of range, mean",
    "spread": "% of largest - smallest, mean",
    "largest": "largest / range",
}
"""How two predictions are compared, and the unit of the result. 0 means equal."""


def difference(measure: str, found: np.ndarray, wanted: np.ndarray) -> float:
    """How far a prediction is from the wanted one, in one of the `MEASURES`; infinite where it is not finite.

    Example:
        >>> difference("labels", np.array([0, 1, 2, 2]), np.array([0, 1, 2, 3]))
        25.0
    """
    if measure == "labels":
        return float((found != wanted).mean() * 100)
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    if not np.isfinite(a).all():
        return float("inf")
    if measure == "angle":
        a, b = (each / np.maximum(np.linalg.norm(each, axis=-3, keepdims=True), 1e-12) for each in (a, b))
        chord = np.linalg.norm(a - b, axis=-3)  # exact for small angles, where the arc cosine is not
        return float(np.rad2deg(2 * np.arcsin((chord / 2).clip(0, 1))).mean())
    if measure == "relative":
        return float((np.abs(a - b) / np.maximum(np.abs(b), 1e-6)).mean() * 100)
    if measure == "range":
        return float(np.abs(a - b).mean() * 100)
    apart = np.abs(a - b) / max(float(np.ptp(b)), 1e-12)
    return float(apart.mean() * 100 if measure == "spread" else apart.max())


def compare(outputs: dict[str, Any], found: Maps, wanted: Maps) -> list[dict[str, Any]]:
    """One row per output: its difference from what is wanted, and whether that is within the limit."""
    rows = []
    for name, about in outputs.items():
        value = difference(about["measure"], found[name], wanted[name])
        row = {"output": name, "difference": value, "limit": about["limit"], "ok": value <= about["limit"]}
        rows.append({**row, "measure": MEASURES[about["measure"]]})
    return rows


def check(file: str | Path, providers: str | Sequence[str] | None = None, threads: int | None = None) -> dict[str, Any]:
    """Run the golden frame next to an exported file, and compare with what torch predicted at the export.

    Returns:
        ``rows`` as of `compare`, ``ok``, and ``milliseconds``, the median time of a prediction.

    Raises:
        InputError: As of `Scene`; or there is no golden file, or it belongs to another export.
    """
    scene = Scene(file, providers, threads)
    kept = _stored(scene)
    frame, seconds = kept.pop("image"), []
    found = scene.predict(frame)
    for _ in range(5):
        start = time.perf_counter()
        scene.predict(frame)
        seconds.append(time.perf_counter() - start)
    rows = compare(scene.outputs, found, kept)
    return {"rows": rows, "ok": all(row["ok"] for row in rows), "milliseconds": 1000 * sorted(seconds)[2]}


def golden_file(file: Path) -> Path:
    """The path of the golden frame and its predictions of an exported file.

    Example:
        >>> golden_file(Path("scene.onnx")).name
        'scene.onnx.golden.npz'
    """
    return file.with_name(f"{file.name}.golden.npz")


def _stored(scene: Scene) -> Maps:
    """The golden frame (``image``) of an exported file, and its predictions. Raises InputError."""
    golden = golden_file(scene.file)
    # Earlier versions had one golden file for all formats of a name.
    earlier = golden.with_name(f"{scene.file.stem.removesuffix('.encoder')}.golden.npz")
    if not golden.exists() and earlier.exists():
        kept = _read(earlier, scene)
        if str(kept.pop("export")) == scene.info["export"]:
            return kept
    kept = _read(golden, scene)
    if str(kept.pop("export")) != scene.info["export"]:
        raise InputError(f"{golden}: belongs to another export than {scene.file.name}; copy both again.")
    return kept


def _read(golden: Path, scene: Scene) -> Maps:
    try:
        with np.load(golden, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, BadZipFile) as error:  # what numpy raises for damaged files
        raise InputError(
            f"{golden}: cannot be read ({error}); copy it next to {scene.file.name}, or export the model again."
        ) from error
