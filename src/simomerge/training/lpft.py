"""LP-FT: train the heads on the frozen encoder (linear probing), then encoder and heads together (fine-tuning).

Source: "Single-Input Multi-Output Model Merging" (arXiv 2504.11268), experts and joint MTL. A model with one task
becomes an expert, one with several tasks the joint-MTL baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simomerge.core import distributed
from simomerge.core.machine import compute_device
from simomerge.datasets.tasks import Task
from simomerge.models.encoders import Encoder
from simomerge.models.heads import head_for
from simomerge.models.model import SimoModel
from simomerge.training import sharding
from simomerge.training.choices import AUGMENTATIONS, WEIGHTINGS, find
from simomerge.training.features import CachedFeatures, cache_features
from simomerge.training.loop import Objective, fit
from simomerge.training.optimizer import check_layer_decay
from simomerge.training.settings import DEFAULT_OPTIONS, TrainSettings, TuneOptions
from simomerge.training.state import TrainLog

ModelLosses = Callable[[SimoModel, Mapping[str, Any]], dict[str, Tensor]]
"""(model, batch) -> loss of each task."""


def fresh_head(
    encoder: Encoder, task: Task, train: Any, kind: str = "linear", seed: int = 0, **settings: Any
) -> nn.Module:
    """A new head for one task, initialised from a seed, that predicts the mean of the task's targets.

    Args:
        encoder: The encoder whose taps the head reads.
        train: A dataset with the task. The mean is that of its first 64 targets.
        kind, settings: See `simomerge.models.heads.build_head`.
    """
    torch.manual_seed(seed)
    head = head_for(encoder, kind, task.channels, **settings)
    start_at = getattr(head, "start_at", None)
    if start_at is not None:
        start_at(task.mean_target(train.targets(i, [task.name])[task.name] for i in range(min(64, len(train)))))
    return head


def label_counts(tasks: Mapping[str, Task], batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Number of valid labels by task; `Task.loss` is the mean over them."""
    return {name: task.valid(batch[name]).sum() for name, task in tasks.items()}


def train_head(
    head: nn.Module,
    task: Task,
    train: CachedFeatures,
    settings: TrainSettings,
    state_file: Path | None = None,
    label: str = "",
    criterion: str = "loss",
) -> TrainLog:
    """Train one head on cached features, in place: linear probing, and the paper's head re-alignment.

    Args:
        criterion: The method of `Task` to minimise: "loss" (labels) or "distance" (another model's logits).
    """
    losses = partial(train.head_losses, task, criterion)
    counts = partial(label_counts, {task.name: task}) if criterion == "loss" else None
    return fit(head, Objective(losses, counts), train, settings, state_file=state_file, label=label or task.name)


def image_losses(model: SimoModel, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Losses of all tasks of a model on a batch with images and targets."""
    logits = model(batch["image"])
    return {name: task.loss(logits[name], batch[name]) for name, task in model.tasks.items()}


def finetune(
    model: SimoModel,
    train: Any,
    settings: TrainSettings,
    validation: Any = None,
    state_file: Path | None = None,
    label: str = "",
    losses: ModelLosses = image_losses,
    options: TuneOptions = DEFAULT_OPTIONS,
) -> TrainLog:
    """Train the parameters of a model that require a gradient, on augmented images, in place. See `fit`.

    Raises:
        InputError: The weighting or augmentation is unknown.
        DivergedError: The loss became NaN or infinite.
    """
    augment = find("augmentation", AUGMENTATIONS, options.augmentation)
    weighting = find("loss weighting", WEIGHTINGS, options.weighting)
    epoch = max(1, len(train) // settings.batch_size)
    objective = Objective(
        losses,
        partial(label_counts, model.tasks) if losses is image_losses else None,
        weighting(len(model.tasks), settings.seed, epoch),
        options.keep_start,
    )
    model.encoder.checkpoint_gradients(options.checkpointing)
    try:
        return fit(
            model,
            objective,
            train,
            settings,
            validation,
            transform=partial(augment, model.tasks) if augment else None,
            state_file=state_file,
            label=label or "+".join(model.tasks),
        )
    finally:
        model.encoder.checkpoint_gradients(False)


def lpft(
    model: SimoModel,
    train: Any,
    probe: TrainSettings,
    tune: TrainSettings,
    validation: Any = None,
    work_folder: str | Path | None = None,
    cache_budget: int | None = None,
    options: TuneOptions = DEFAULT_OPTIONS,
) -> dict[str, TrainLog]:
    """Both phases of LP-FT, in place.

    Args:
        model: A foundation encoder with new heads.
        train: A dataset with the targets of all tasks of the model.
        probe, tune: Settings of the two phases.
        validation: Its loss stops the second phase early and selects the weights to keep.
        work_folder: Folder for features and the state of a killed run. Do not share it between trainings. The default
            is a temporary folder.
        cache_budget: Maximum size in bytes of the features of the first phase; see `cache_features`.
        options: Options of the second phase.

    Returns:
        The logs of the probing of each head (``probe/TASK``) and of the fine-tuning (``tune``).
    """
    if options.checkpointing:
        model.encoder.check_checkpointing()
    check_layer_decay(model.encoder, tune)  # both fail before the first phase, not after it
    with distributed.temporary_folder() as temporary:
        work = Path(work_folder or temporary)
        if not (work / "features").exists():
            home = next(model.parameters()).device
            place = compute_device() if sharding.current() is None else home
            cache_features(model.encoder.to(place), train, work / "features", budget=cache_budget)
            model.encoder.to(home)
        logs = {}
        for name, task in model.tasks.items():
            cached, state_file = CachedFeatures(work / "features", train, [name]), work / f"probe-{name}.safetensors"
            logs[f"probe/{name}"] = train_head(
                model.heads[name], task, cached, probe, state_file=state_file, label=f"probe {name}"
            )
        model.requires_grad_(True)
        logs["tune"] = finetune(model, train, tune, validation, work / "tune.safetensors", options=options)
        return logs


def trainable_parameters(module: nn.Module) -> int:
    """Number of parameters that require a gradient."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
