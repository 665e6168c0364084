"""Distillation within a time budget: a few steps measure the speed, then all steps that fit are made."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from simomerge.assembly.realign import get_realignment, prepared
from simomerge.assembly.realign.held_out import VALIDATIONS
from simomerge.core import distributed
from simomerge.core.caution import Caution, warn
from simomerge.core.errors import InputError
from simomerge.core.pixels import OWN_SIZE
from simomerge.core.progress import progress
from simomerge.models.model import SimoModel

TIMED_STEPS = (2, 8)
"""Steps of the two trainings whose difference in time gives the time of a step."""

LEAST_STEPS = 50
"""Fewer steps are not worth it: a one-cycle schedule first leads away from the fold."""

LEAST_SECONDS = 2e-3
"""No step is planned to be faster: differences of short times are uncertain."""

MOST_STEPS = 2000
MARGIN = 0.9
"""Share of the remaining time that is planned."""


def distil_until(
    ends: float, folded: SimoModel, merged: SimoModel, experts: Mapping[str, SimoModel], images: Any
) -> SimoModel:
    """Distil a merged model on the experts' predictions until about a point in time.

    The result is the folded model if the time does not suffice for `LEAST_STEPS` steps, if no state of the training is
    closer to the experts on held-out images, or if the training fails; a warning then says why.

    Args:
        ends: On the clock of ``time.monotonic``.
        folded: The merged model with folded heads.
        merged: The same without a fold. Distillation folds it on the images that it does not hold out.
        experts: By task.
        images: As `simomerge.datasets.pictures.as_images` gives them, all of one size.

    Returns:
        A model whose provenance records the choice, and the reason for it, under ``auto``.
    """
    try:
        with distributed.temporary_folder() as folder:
            distilled = _distilled(ends, merged, experts, images, folder)
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        if distributed.processes() > 1:  # the others would wait for this process
            raise
        warn(f"auto keeps the fold, because distillation failed: {error}")
        return _with_choice(folded, {"chosen": "fold-cross", "reason": f"distillation failed: {error}"})
    if distilled is None:
        return _with_choice(folded, {"chosen": "fold-cross", "reason": "the time does not suffice for distillation"})
    record = distilled.provenance["realign"]
    if record.get("best_step") == 0:
        return _with_choice(folded, {"chosen": "fold-cross", "reason": "distillation came no closer to the experts"})
    return _with_choice(distilled, {"chosen": "distill-encoder", "steps": record["steps"]})


def _distilled(
    ends: float, model: SimoModel, experts: Mapping[str, SimoModel], images: Any, folder: Path
) -> SimoModel | None:
    """The distilled model; None if the time does not suffice."""

    def timed(steps: int, validate_every: int) -> float:
        began = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Caution)  # so few steps improve nothing; the real training warns again
            _distil(model, experts, images, folder, steps=steps, validate_every=validate_every)
        _forget(folder)
        return time.monotonic() - began

    first = timed(1, 1)  # the experts' predictions are stored, and the device is warm
    if distributed.from_first(ends - time.monotonic() < len(TIMED_STEPS) * first):
        return None
    few, more = (timed(steps, steps) for steps in TIMED_STEPS)  # both validate once
    validation = max(timed(TIMED_STEPS[0], 1) - few, 0.0) / (TIMED_STEPS[0] - 1)
    step = max((more - few) / (TIMED_STEPS[1] - TIMED_STEPS[0]), LEAST_SECONDS)
    left = MARGIN * (ends - time.monotonic()) - few - VALIDATIONS * validation
    steps = min(MOST_STEPS, int(distributed.from_first(left / step)))
    if steps < LEAST_STEPS:
        progress("auto", 1, 1, f"the fold: {max(left, 0):.0f} s are left, and {LEAST_STEPS} steps take more")
        return None
    progress("auto", 0, 1, f"distill-encoder: {steps} steps fit into {left:.0f} s")
    return _distil(model, experts, images, folder, steps=steps)


def _distil(
    model: SimoModel, experts: Mapping[str, SimoModel], images: Any, folder: Path, **settings: Any
) -> SimoModel:
    method = get_realignment("distill-encoder", retry=False, **settings)  # the time is for one training
    with warnings.catch_warnings():  # the choice records why the fold is kept, and a user gives no learning rate here
        warnings.filterwarnings("ignore", message=".*the weights at the start are kept", category=Caution)
        return method.apply(model, prepared(method, model, folder, OWN_SIZE, experts=experts, images=images))


def _forget(folder: Path) -> None:
    """Remove the state of a training, so that the next one starts at the beginning. The predictions stay."""
    if distributed.is_first():
        (folder / "state.safetensors").unlink(missing_ok=True)
    distributed.wait()


def _with_choice(model: SimoModel, choice: Mapping[str, Any]) -> SimoModel:
    model.provenance = {**model.provenance, "auto": dict(choice)}
    return model
