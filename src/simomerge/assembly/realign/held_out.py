"""Training of a whole model that keeps the weights that are best on held-out images, those at the start included."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from simomerge.core.caution import warn
from simomerge.core.errors import DivergedError
from simomerge.core.progress import progress
from simomerge.datasets import groups
from simomerge.datasets.base import DenseDataset
from simomerge.models.model import SimoModel
from simomerge.training.loop import HIGHEST_RISE
from simomerge.training.lpft import ModelLosses, finetune, image_losses, trainable_parameters
from simomerge.training.settings import DEFAULT_OPTIONS, TrainSettings, TuneOptions

VALIDATIONS = 8
"""Validations per training, unless the settings say how often."""

RETRY_RATE = 0.25
"""The learning rate of a second training, relative to the first one's.

A start that is close to what is wanted needs a lower rate: a step of AdamW has the same length, however small the
gradient is.
"""

ENOUGH_IMAGES = 4096
"""Of more images, no more are measured or folded than of this number; all of them are for training."""


def train_and_keep_best(
    model: SimoModel,
    data: tuple[DenseDataset, DenseDataset | None],
    settings: TrainSettings,
    state_file: Path,
    label: str,
    losses: ModelLosses = image_losses,
    options: TuneOptions = DEFAULT_OPTIONS,
    retry: bool = False,
) -> dict[str, Any]:
    """Train the parameters of a model that require a gradient, in place; what was measured, for the provenance.

    Args:
        data: The images to train on and those held out, as `split_off` gives them.
        losses: Those of the labels, or distances to the experts.
        retry: Train again at `RETRY_RATE` times the learning rate if no step is better than the start.

    Raises:
        DivergedError: The training diverged before there were weights to keep.

    Warns:
        UserWarning: The weights at the start are kept, or the training diverged or was stopped.
    """
    if data[1]:
        # A one-cycle schedule passes through worse weights before it ends in better ones, so it is not stopped.
        every, patience = settings.validate_every, settings.patience or settings.steps
        settings = replace(settings, validate_every=every or max(1, settings.steps // VALIDATIONS), patience=patience)
    attempt = partial(_train, model, data, losses=losses, options=options)
    cost, message = attempt(settings, state_file, label=label)
    if retry and cost.get("best_step") == 0:
        rate = settings.encoder_lr and RETRY_RATE * settings.encoder_lr
        slower = replace(settings, lr=RETRY_RATE * settings.lr, encoder_lr=rate)
        progress(label, 0, settings.steps, f"no step was better than the start; again at {RETRY_RATE:g} times the rate")
        first = cost
        again = state_file.with_name(f"{state_file.stem}-again{state_file.suffix}")
        cost, message = attempt(slower, again, label=f"{label} again")
        cost["lr_factor"] = RETRY_RATE
        for key in ("steps", "seconds"):
            cost[key] = first.get(key, 0) + cost.get(key, 0)
    if message:
        warn(message)
    keys = {key: getattr(settings, key) for key in ("validate_every", "patience")}
    return {**keys, "held_out_images": len(data[1]) if data[1] else 0, **cost}


def _train(
    model: SimoModel,
    data: tuple[DenseDataset, DenseDataset | None],
    settings: TrainSettings,
    state_file: Path,
    *,
    label: str,
    losses: ModelLosses,
    options: TuneOptions,
) -> tuple[dict[str, Any], str]:
    """One training; what was measured, and what a user should know."""
    train, held_out = data
    cost: dict[str, Any] = {"trained_parameters": trainable_parameters(model)}
    try:
        options = replace(options, keep_start=True)
        log = finetune(model, train, settings, held_out, state_file, label, losses, options)
    except DivergedError as error:
        if not error.kept:
            raise
        message = f"{error} The best weights before that are kept, those of step {error.best_step}."
        return {**cost, "steps": error.step, "best_step": error.best_step, "diverged": True}, message
    cost |= {"steps": log.steps, "seconds": log.seconds}
    if not held_out:
        return cost, ""
    message = ""
    if log.rise > HIGHEST_RISE:
        minimised = "loss" if losses is image_losses else "distance to the experts"
        message = (
            f"{label}: stopped at step {log.steps}, because the {minimised} on held-out images was {log.rise:.1f} times"
            f" that at the start; lower the learning rate. The best weights are kept, those of step {log.best_step}."
        )
    elif not log.best_step:
        message = (
            f"{label}: no step was better than the start on held-out images, so the weights at the start are kept;"
            " lower the learning rate, or give more steps or images."
        )
    return {**cost, "best_step": log.best_step}, message


def split_off(data: DenseDataset, share: float) -> tuple[DenseDataset, DenseDataset | None]:
    """The training images of a dataset, and the held-out images to measure on; None if none are held out.

    Of more than `ENOUGH_IMAGES` images, as many held-out ones are measured as `ENOUGH_IMAGES` have, spread evenly. The
    other held-out images are left out, because their groups must stay apart from those of the training images; see
    `simomerge.datasets.groups`.

    Warns:
        UserWarning: There are too few images to hold one out.
    """
    out = groups.evenly(groups.held_out(data, share), math.ceil(share * ENOUGH_IMAGES))
    if out:
        return data._subset(groups.training_images(data, share)), data._subset(out)
    if share:
        needed = math.ceil(1 / share - 1e-9)
        warn(
            f"{len(data)} images are too few to hold one out (hold_out is {share:g}), so the weights at the end are"
            f" kept and not compared with those at the start; give {needed} images or more."
        )
    return data, None
