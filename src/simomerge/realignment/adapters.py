"""Representation re-alignment: a low-rank adapter beside every block, trained with the heads.

Source: "Single-Input Multi-Output Model Merging" (arXiv 2504.11268), re-alignment, second remedy.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from simomerge.errors import InputError
from simomerge.model import SimoModel
from simomerge.progress import Progress, silent
from simomerge.realignment.record import after
from simomerge.training import TrainSettings, finetune, trainable_parameters

ADAPTER_SETTINGS = TrainSettings(steps=200, batch_size=32, lr=1e-3)


def realign_adapters(
    model: SimoModel,
    data: Any,
    settings: TrainSettings = ADAPTER_SETTINGS,
    rank: int = 16,
    activation: str = "none",
    work_folder: str | Path | None = None,
    progress: Progress = silent,
) -> SimoModel:
    """Train low-rank adapters beside the blocks and all heads on the multi-task loss; the encoder is frozen.

    Args:
        model: a merged model; it stays as it is.
        data: a labelled dataset with the targets of every task (the paper's D_val).
        settings: of the training.
        rank: of the adapters (paper: 16).
        activation: between the two factors: "none" (the paper's text) or "relu" (its reference code).
        work_folder: where the state of a killed run is kept.

    Raises:
        InputError: the data lacks labels of a task, or the model has adapters already.
    """
    missing = [name for name in model.tasks if name not in data.tasks]
    if missing:
        raise InputError(f"adapters need labels of every task; the data has none of {', '.join(missing)}.")
    if model.encoder.adapters is not None:
        raise InputError("the model has adapters already; re-align the merged model they were made from.")
    result = copy.deepcopy(model)
    torch.manual_seed(settings.seed)
    result.requires_grad_(False)
    result.encoder.add_adapters(rank, activation)
    result.heads.requires_grad_(True)
    trained = trainable_parameters(result)
    state_file = Path(work_folder) / "adapters.pt" if work_folder else None
    log = finetune(result, data, settings, None, state_file, "adapters", progress)
    record = {
        "method": "adapters",
        "rank": rank,
        "activation": activation,
        **asdict(settings),
        "labelled_images": len(data),
        "steps": log.steps,
        "seconds": log.seconds,
        "trained_parameters": trained,
    }
    result.provenance = {**model.provenance, "realign": after(model, record)}
    return result.eval()
