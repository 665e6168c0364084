"""LP-FT: probe the heads on the frozen encoder, then fine-tune encoder and heads together.

Source: "Single-Input Multi-Output Model Merging" (arXiv 2504.11268), experts and joint MTL. One task makes an
expert, several make the joint-MTL baseline: the two-phase training is the same, its loss the unweighted mean
of the task losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simomerge.core import distributed
from simomerge.datasets.augment import augmentation as make_augmentation
from simomerge.datasets.tasks import Task
from simomerge.models.encoders import Encoder
from simomerge.models.heads import head_for
from simomerge.models.model import SimoModel
from simomerge.training.features import CachedFeatures, cache_features
from simomerge.training.loop import TrainLog, fit
from simomerge.training.settings import TrainSettings
from simomerge.training.weighting import weighting as make_weighting

ModelLosses = Callable[[SimoModel, Mapping[str, Any]], dict[str, Tensor]]
"""(model, batch) -> loss of each task."""


def fresh_head(
    encoder: Encoder, task: Task, train: Any, kind: str = "linear", seed: int = 0, **settings: Any
) -> nn.Module:
    """A head for one task, initialised from a seed, that starts at the mean of the task's targets.

    Args:
        encoder: whose taps it reads.
        train: a dataset with the task; its first 64 targets give the mean.
        kind, settings: see `simomerge.models.heads.build_head`.
    """
    torch.manual_seed(seed)
    head = head_for(encoder, kind, task.channels, **settings)
    start_at = getattr(head, "start_at", None)
    if start_at is not None:
        start_at(task.mean_target(train.targets(i, [task.name])[task.name] for i in range(min(64, len(train)))))
    return head


def label_counts(tasks: Mapping[str, Task], batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of how many values `Task.loss` is the mean, by task."""
    return {name: task.valid(batch[name]).sum() for name, task in tasks.items()}


def train_head(
    head: nn.Module,
    task: Task,
    train: CachedFeatures,
    settings: TrainSettings,
    validation: CachedFeatures | None = None,
    state_file: Path | None = None,
    label: str = "",
    criterion: str = "loss",
) -> TrainLog:
    """Train one head on cached features, in place: linear probing, and the paper's head re-alignment.

    With the criterion "distance" the targets are another model's logits, not labels.
    """
    return fit(
        head,
        partial(train.head_losses, task, head, criterion),
        train,
        settings,
        validation,
        state_file=state_file,
        label=label or task.name,
        counts=partial(label_counts, {task.name: task}) if criterion == "loss" else None,
    )


def image_losses(model: SimoModel, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Losses of every task of a model on a batch with images and targets."""
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
    checkpointing: bool = False,
    weighting: str = "equal",
    augmentation: str = "flip",
) -> TrainLog:
    """Train whatever of a model requires a gradient, on augmented images, in place.

    Args:
        checkpointing: keep of every block its input alone for the backward pass; the same gradients in less memory.
        weighting: of the tasks' losses, a key of `simomerge.training.weighting.WEIGHTINGS`.
        augmentation: a key of `simomerge.datasets.augment.AUGMENTATIONS`.

    Raises:
        InputError: an unknown weighting or augmentation, or what `fit` raises.
    """
    transform = make_augmentation(augmentation, model.tasks)
    epoch = max(1, len(train) // settings.batch_size)
    weighs = None if weighting == "equal" else make_weighting(weighting, len(model.tasks), settings.seed, epoch)
    model.encoder.checkpoint_gradients(checkpointing)
    try:
        return fit(
            model,
            partial(losses, model),
            train,
            settings,
            validation,
            transform=transform,
            state_file=state_file,
            label=label or "+".join(model.tasks),
            weighting=weighs,
            counts=partial(label_counts, model.tasks) if losses is image_losses else None,
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
    checkpointing: bool = False,
    weighting: str = "equal",
    augmentation: str = "flip",
) -> dict[str, TrainLog]:
    """Both phases, in place.

    Args:
        model: a foundation encoder with fresh heads.
        train: a dataset with the targets of all the model's tasks.
        probe, tune: settings of the two phases.
        validation: the dataset whose loss stops the second phase and chooses the weights to keep.
        work_folder: where features and the state of a killed run are kept, of this very training and no other;
            a temporary folder by default.
        cache_budget: bytes that the features of the first phase may take; see `cache_features`.
        checkpointing, weighting, augmentation: of the second phase; see `finetune`.

    Returns:
        The log of every head's probing (``probe/TASK``) and of the fine-tuning (``tune``).
    """
    if checkpointing:
        model.encoder.check_checkpointing()  # not only after the first phase
    with distributed.temporary_folder() as temporary:
        work = Path(work_folder or temporary)
        if not (work / "features").exists():
            cache_features(model.encoder, train, work / "features", budget=cache_budget)
        logs = {}
        for name, task in model.tasks.items():
            cached = CachedFeatures(work / "features", train, [name])
            logs[f"probe/{name}"] = train_head(
                model.heads[name], task, cached, probe, None, work / f"probe-{name}.pt", f"probe {name}"
            )
        model.requires_grad_(True)
        state_file = work / "tune.pt"
        logs["tune"] = finetune(
            model,
            train,
            tune,
            validation,
            state_file,
            checkpointing=checkpointing,
            weighting=weighting,
            augmentation=augmentation,
        )
        return logs


def trainable_parameters(module: nn.Module) -> int:
    """How many numbers an optimiser would change."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
