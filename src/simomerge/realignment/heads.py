"""Head re-alignment: the merged encoder frozen, every head fine-tuned on features computed once.

Source: "Single-Input Multi-Output Model Merging" (arXiv 2504.11268), re-alignment, first remedy.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from simomerge.errors import InputError
from simomerge.model import SimoModel
from simomerge.progress import Progress, silent
from simomerge.tasks import Task
from simomerge.training import CachedFeatures, TrainSettings, WorkerPool, cache_features, train_head

HEAD_SETTINGS = TrainSettings(steps=200, batch_size=32, lr=1e-3)


def realign_heads(
    model: SimoModel,
    data: Any,
    settings: TrainSettings = HEAD_SETTINGS,
    work_folder: str | Path | None = None,
    workers: int = 1,
    progress: Progress = silent,
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

    Returns:
        A new model with the same encoder weights and re-aligned heads.

    Raises:
        InputError: the data lacks labels of a task.
    """
    missing = [name for name in model.tasks if name not in data.tasks]
    if missing:
        raise InputError(f"head re-alignment needs labels of every task; the data has none of {', '.join(missing)}.")
    result = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(work_folder or temporary)
        if not (work / "features").exists():
            cache_features(result.encoder, data, work / "features", progress=progress)
        jobs = [
            (
                _train_one,
                {"head": head, "task": result.tasks[name], "data": data, "settings": settings, "work": work},
            )
            for name, head in result.heads.items()
        ]
        with WorkerPool(min(workers, len(jobs)), progress) as pool:
            outcomes = pool.run(jobs)
    for (_name, head), (state, _log) in zip(result.heads.items(), outcomes, strict=True):
        head.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    logs = {name: log for name, (_state, log) in zip(result.heads, outcomes, strict=True)}
    result.provenance["realign"] = {
        "method": "heads",
        **asdict(settings),
        "labelled_images": len(data),
        "steps": sum(log["steps"] for log in logs.values()),
        "seconds": sum(log["seconds"] for log in logs.values()),
        "trained_parameters": sum(p.numel() for p in result.heads.parameters()),
    }
    return result.eval()


def _train_one(
    head: nn.Module, task: Task, data: Any, settings: TrainSettings, work: Path, progress: Progress = silent
) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    """Weights (as arrays, which cross processes cheaply) and log of one head's training."""
    cached = CachedFeatures(work / "features", data, [task.name])
    log = train_head(head, task, cached, settings, None, work / f"{task.name}.pt", f"head {task.name}", progress)
    return {key: value.detach().cpu().numpy() for key, value in head.state_dict().items()}, vars(log)
