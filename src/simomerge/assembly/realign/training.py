"""What the re-alignments that train have in common."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simomerge.assembly.realign.distillation import ExpertDistances
from simomerge.assembly.realign.held_out import split_off
from simomerge.assembly.realign.method import Inputs
from simomerge.assembly.realign.predictions import TeacherPredictions
from simomerge.core import distributed
from simomerge.core.caution import warn
from simomerge.core.errors import DivergedError, InputError
from simomerge.datasets import random_flip
from simomerge.datasets.tasks import Task
from simomerge.models.model import SimoModel
from simomerge.training.features import CachedFeatures, bytes_per_image, cache_features
from simomerge.training.loop import fit
from simomerge.training.lpft import finetune, train_head, trainable_parameters
from simomerge.training.pool import WorkerPool
from simomerge.training.settings import TrainSettings, TuneOptions
from simomerge.training.state import TrainLog


def check_no_adapters(model: SimoModel, remedy: str = "re-align the merged model they were made from") -> None:
    """Refuse a model with adapters: it cannot have a second set, and LoRA would not give a plain encoder."""
    if model.encoder.adapters is not None:
        raise InputError(f"the model has adapters already; {remedy}.")


def freeze_encoder(model: SimoModel, seed: int) -> None:
    """Train only the heads, and adapters or LoRA that are added later; these are initialised from the seed."""
    torch.manual_seed(seed)
    model.requires_grad_(False)
    model.heads.requires_grad_(True)


def train_with_heads(
    model: SimoModel, inputs: Inputs, settings: TrainSettings, label: str, checkpointing: bool = False
) -> dict[str, Any]:
    """Train all parameters that require a gradient on the labels of all tasks at once, in place; return the cost."""
    trained = trainable_parameters(model)
    state_file, options = inputs.work_folder / "state.safetensors", TuneOptions(checkpointing=checkpointing)
    log = finetune(model, inputs.data, settings, None, state_file, label, options=options)
    return {"steps": log.steps, "seconds": log.seconds, "trained_parameters": trained}


def match_predictions(
    model: Any, predictions: Any, settings: TrainSettings, label: str, state_file: Path | None = None
) -> TrainLog:
    """Train a model towards the teacher's predictions, in place.

    The distance of each task is divided by its value at the start.

    Args:
        model: A `SimoModel`, or a module with ``tasks`` that returns logits by task.
        predictions: The dataset of the teacher's predictions.
    """
    distances = ExpertDistances({}, batch_size=min(32, settings.batch_size)).in_units_of(model, predictions)
    return fit(
        model,
        distances,
        predictions,
        settings,
        transform=partial(random_flip, model.tasks),
        state_file=state_file,
        label=label,
    )


def train_heads(
    model: SimoModel, inputs: Inputs, settings: TrainSettings, criterion: str, cache_budget: int | None = None
) -> dict[str, Any]:
    """Train each head of a model on features that are computed once, in place; return the cost.

    Heads whose parameters are frozen, such as copies of those of frozen experts, are made trainable.

    Args:
        criterion: The method of `Task` to minimise: "loss" (labels) or "distance" (a teacher's logits). A head that
            diverges is an error with "loss"; with "distance" it stays as it was.
        cache_budget: Bytes that the features may take on disk.

    Raises:
        DivergedError: See ``criterion``.

    Warns:
        UserWarning: A head diverged.
    """
    work, data = inputs.work_folder, inputs.data
    model.heads.requires_grad_(True)
    common = {"data": data, "settings": settings, "work": work, "criterion": criterion}
    jobs = []
    for name, head in model.heads.items():
        features = _features_of(model, name, work)
        if not distributed.from_first(features.exists()):
            cache_features(model.encoder.branch(name), data, features, budget=cache_budget)
        jobs.append((_train_one, {"head": head, "task": model.tasks[name], "features": features, **common}))
    with WorkerPool(min(inputs.workers, len(jobs))) as pool:
        outcomes = pool.run(jobs)
    diverged = []
    for (task, head), (state, log) in zip(model.heads.items(), outcomes, strict=True):
        head.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
        if log["diverged"]:
            warn(f"{log['diverged']} The head stays as it was.")
            diverged.append(task)
    return {
        **({"diverged": diverged} if diverged else {}),
        "steps": sum(log["steps"] for _state, log in outcomes),
        "seconds": sum(log["seconds"] for _state, log in outcomes),
        "trained_parameters": sum(p.numel() for p in model.heads.parameters()),
    }


def _features_of(model: SimoModel, task: str, work: Path) -> Path:
    """The folder of the features that a head reads."""
    source = model.encoder.source(task)
    return work / (f"features-{source}" if source else "features")


def bytes_of_features(model: SimoModel, image: Tensor, count: int, work: Path) -> int:
    """What `train_heads` writes for a number of images of the size of this one, (3, H, W), unless it is there."""
    folders = {_features_of(model, task, work): model.encoder.branch(task) for task in model.heads}
    return count * sum(bytes_per_image(branch, image) for folder, branch in folders.items() if not folder.exists())


def distil_heads(
    model: SimoModel, inputs: Inputs, settings: TrainSettings, hold_out: float, label: str
) -> dict[str, Any]:
    """Train each head of a model on the experts' predictions, in place; what was measured, for the provenance.

    A head whose training diverges, or moves it away from its expert on held-out images, stays as it was.

    Warns:
        UserWarning: A head stays as it was.
    """
    predictions = TeacherPredictions(inputs.images, inputs.experts, inputs.work_folder / "predictions")
    train, held_out = split_off(predictions, hold_out)
    start = copy.deepcopy(model.heads)
    distances = ExpertDistances(inputs.experts, batch_size=min(32, settings.batch_size))
    before = distances.measured(model, held_out) if held_out else {}
    cost = train_heads(model, replace(inputs, data=train), settings, "distance")
    ratios = distances.ratios(model, held_out, before) if held_out else {}
    for task in (task for task, ratio in ratios.items() if ratio > 1):
        model.heads[task].load_state_dict(start[task].state_dict())
        warn(
            f"{label}: on held-out images {task} is {100 * (ratios[task] - 1):.1f} % further from its expert than"
            " before the training, so its head stays as it was."
        )
        ratios[task] = 1.0
    return {"held_out_images": len(held_out) if held_out else 0, "distance_ratio": ratios, **cost}


def _train_one(
    head: nn.Module, task: Task, features: Path, data: Any, settings: TrainSettings, work: Path, criterion: str
) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    """Weights (as arrays, which are cheap to send between processes) and log of one head's training."""
    start, why, cached = copy.deepcopy(head.state_dict()), "", CachedFeatures(features, data, [task.name])
    label, state_file = f"{'head' if criterion == 'loss' else 'distill'} {task.name}", work / f"{task.name}.safetensors"
    try:
        log = train_head(head, task, cached, settings, state_file=state_file, label=label, criterion=criterion)
    except DivergedError as error:
        if criterion == "loss":
            raise
        head.load_state_dict(start)
        log, why = TrainLog(error.step), str(error)
    state = {key: value.detach().cpu().numpy() for key, value in head.state_dict().items()}
    return state, {**vars(log), "diverged": why}
