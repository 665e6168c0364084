"""Head re-alignment: the merged encoder frozen, every head fine-tuned on features computed once.

Source: "Single-Input Multi-Output Model Merging" (arXiv 2504.11268), re-alignment, first remedy.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from simomerge.assembly.realign.labels import check_labels
from simomerge.assembly.realign.record import after
from simomerge.core import distributed
from simomerge.datasets.tasks import Task
from simomerge.models.model import SimoModel
from simomerge.training.features import CachedFeatures, cache_features
from simomerge.training.lpft import train_head
from simomerge.training.pool import WorkerPool
from simomerge.training.settings import TrainSettings

HEAD_SETTINGS = TrainSettings(steps=200, batch_size=32, lr=1e-3)


def realign_heads(
    model: SimoModel,
    data: Any,
    settings: TrainSettings = HEAD_SETTINGS,
    work_folder: str | Path | None = None,
    workers: int = 1,
    cache_budget: int | None = None,
) -> SimoModel:
    """Fine-tune each head separately on a frozen encoder's features.

    The encoder runs once over the images; the features are kept memory-mapped in half precision, so the cost
    does not depend on the encoder's size, and every head is a job of its own.

    Args:
        model: a merged model; it stays as it is.
        data: a labelled dataset with the targets of every task (the paper's D_val).
        settings: of each head's training.
        work_folder: where features and the state of a killed run are kept, of this very re-alignment and no
            other; a temporary folder by default.
        workers: heads trained at once, each in its process.
        cache_budget: bytes that the features may take on disk; see `simomerge.training.features.cache_features`.

    Returns:
        A new model with the same encoder weights and re-aligned heads.

    Raises:
        InputError: the data lacks labels of a task.
    """
    check_labels(model, data, "head re-alignment needs")
    result = copy.deepcopy(model)
    with distributed.temporary_folder() as temporary:
        work = Path(work_folder or temporary)
        cost = train_heads(result, data, settings, work, workers, "loss", cache_budget)
    record = {"method": "heads", **asdict(settings), "labelled_images": len(data), **cost}
    result.provenance = {**model.provenance, "realign": after(model, record)}
    return result.eval()


def train_heads(
    model: SimoModel,
    data: Any,
    settings: TrainSettings,
    work: Path,
    workers: int,
    criterion: str,
    cache_budget: int | None = None,
) -> dict[str, Any]:
    """Train each head of a model on features computed once, in place, side by side; what it cost.

    Args:
        data: images with what the criterion compares with: targets, or another model's logits.
        work: where features and states are kept.
        criterion: "loss" (labels) or "distance" (a teacher's logits): the method of `Task` to minimise.
    """
    if not (work / "features").exists():
        cache_features(model.encoder, data, work / "features", budget=cache_budget)
    jobs = [
        (
            _train_one,
            {
                "head": head,
                "task": model.tasks[name],
                "data": data,
                "settings": settings,
                "work": work,
                "criterion": criterion,
            },
        )
        for name, head in model.heads.items()
    ]
    with WorkerPool(min(workers, len(jobs))) as pool:
        outcomes = pool.run(jobs)
    for head, (state, _log) in zip(model.heads.values(), outcomes, strict=True):
        head.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    return {
        "steps": sum(log["steps"] for _state, log in outcomes),
        "seconds": sum(log["seconds"] for _state, log in outcomes),
        "trained_parameters": sum(p.numel() for p in model.heads.parameters()),
    }


def _train_one(
    head: nn.Module,
    task: Task,
    data: Any,
    settings: TrainSettings,
    work: Path,
    criterion: str,
) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    """Weights (as arrays, which cross processes cheaply) and log of one head's training."""
    cached = CachedFeatures(work / "features", data, [task.name])
    label = f"{'head' if criterion == 'loss' else 'distill'} {task.name}"
    log = train_head(head, task, cached, settings, None, work / f"{task.name}.pt", label, criterion)
    return {key: value.detach().cpu().numpy() for key, value in head.state_dict().items()}, vars(log)
