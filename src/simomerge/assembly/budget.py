"""Distillation within a time budget: a few steps measure the speed, then all steps that fit are made."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simomerge.assembly.realign import get_realignment, realign
from simomerge.core import distributed
from simomerge.core.progress import progress
from simomerge.models.model import SimoModel

TIMED_STEPS = 4
LEAST_STEPS = 50
"""With fewer steps, distillation ends about where the fold does."""

MOST_STEPS = 2000
MARGIN = 0.85
"""Share of the remaining time that is planned; the rest covers validation and slower steps."""


def distil_until(ends: float, model: SimoModel, experts: Mapping[str, SimoModel], images: Any) -> SimoModel:
    """Distil the whole model on the experts' predictions until about a point in time.

    The result is the given model if the time does not suffice for `LEAST_STEPS` steps, or if no state of the training
    is closer to the experts on held-out images.

    Args:
        ends: On the clock of ``time.monotonic``.
        model: A merged model with folded heads.
        experts: By task.
        images: As `simomerge.datasets.pictures.as_images` gives them, all of one size.

    Returns:
        A model whose provenance records the choice under ``auto``.
    """
    with distributed.temporary_folder() as folder:
        seconds = _seconds_per_step(model, experts, images, folder)
        left = ends - time.monotonic()
        steps = min(MOST_STEPS, int(distributed.from_first(MARGIN * left / seconds)))
        choice = {"seconds_per_step": round(seconds, 3), "seconds_left": round(left, 1)}
        if steps < LEAST_STEPS:
            progress("auto", 1, 1, f"the fold: {left:.0f} s are left, and {LEAST_STEPS} steps take more")
            return _with_choice(model, {"chosen": "fold-cross", **choice})
        progress("auto", 0, 1, f"distill-encoder: {steps} steps fit into {left:.0f} s")
        method = get_realignment("distill-encoder", steps=steps)
        distilled = realign(model, experts, images, method=method, work_folder=folder)
    kept = distilled.provenance["realign"].get("best_step") == 0
    if kept:
        return _with_choice(model, {"chosen": "fold-cross", **choice})
    return _with_choice(distilled, {"chosen": "distill-encoder", "steps": steps, **choice})


def _seconds_per_step(model: SimoModel, experts: Mapping[str, SimoModel], images: Any, folder: Path) -> float:
    """Seconds of one step of training; the experts' predictions stay in the folder for the training itself."""
    method = get_realignment("distill-encoder", steps=TIMED_STEPS, hold_out=0)
    timed = realign(model, experts, images, method=method, work_folder=folder / "timing")
    if (folder / "timing" / "predictions").exists():
        (folder / "timing" / "predictions").rename(folder / "predictions")
    shutil.rmtree(folder / "timing", ignore_errors=True)
    return float(timed.provenance["realign"]["seconds"]) / TIMED_STEPS


def _with_choice(model: SimoModel, choice: Mapping[str, Any]) -> SimoModel:
    model.provenance = {**model.provenance, "auto": dict(choice)}
    return model
