"""Representation re-alignment: a low-rank adapter beside every block, trained with the heads.

Source: "Single-Input Multi-Output Model Merging" (arXiv 2504.11268), re-alignment, second remedy.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from simomerge.assembly.realign.labels import check_labels
from simomerge.assembly.realign.low_rank import check_no_adapters, only_heads_learn, train_with_heads
from simomerge.assembly.realign.record import after
from simomerge.models.model import SimoModel
from simomerge.training.settings import TrainSettings

ADAPTER_SETTINGS = TrainSettings(steps=200, batch_size=32, lr=1e-3)


def realign_adapters(
    model: SimoModel,
    data: Any,
    settings: TrainSettings = ADAPTER_SETTINGS,
    rank: int = 16,
    activation: str = "none",
    last_blocks: int = 0,
    checkpointing: bool = False,
    work_folder: str | Path | None = None,
) -> SimoModel:
    """Train low-rank adapters beside the blocks and all heads on the multi-task loss; the encoder is frozen.

    Args:
        model: a merged model; it stays as it is.
        data: a labelled dataset with the targets of every task (the paper's D_val).
        settings: of the training.
        rank: of the adapters (paper: 16).
        activation: between the two factors: "none" (the paper's text) or "relu" (its reference code).
        last_blocks: adapters beside the last so many blocks only, for large encoders; 0: beside all (the paper).
        checkpointing: keep of every block its input alone for the backward pass; the same gradients in less memory.
        work_folder: where the state of a killed run is kept.

    Raises:
        InputError: the data lacks labels of a task, or the model has adapters already.
    """
    check_labels(model, data, "adapters need")
    check_no_adapters(model)
    result = copy.deepcopy(model)
    state_file = Path(work_folder) / "adapters.pt" if work_folder else None
    only_heads_learn(result, settings.seed)
    adapters = result.encoder.add_adapters(rank, activation, last_blocks)
    cost = train_with_heads(result, data, settings, state_file, "adapters", checkpointing=checkpointing)
    record = {
        "method": "adapters",
        **adapters.settings,
        **asdict(settings),
        "labelled_images": len(data),
        **cost,
    }
    result.provenance = {**model.provenance, "realign": after(model, record)}
    return result.eval()
