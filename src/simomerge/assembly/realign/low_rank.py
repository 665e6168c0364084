"""What the paper's adapters and LoRA share: a few parameters in a frozen encoder, trained together with all heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from simomerge.core.errors import InputError
from simomerge.models.model import SimoModel
from simomerge.training.lpft import ModelLosses, finetune, image_losses, trainable_parameters
from simomerge.training.settings import TrainSettings, TuneOptions


def check_no_adapters(model: SimoModel, mend: str = "re-align the merged model they were made from") -> None:
    """Refuse a model with adapters beside its blocks: it gets no second ones, and LoRA would not make it plain."""
    if model.encoder.adapters is not None:
        raise InputError(f"the model has adapters already; {mend}.")


def only_heads_learn(model: SimoModel, seed: int) -> None:
    """Freeze all of a model but its heads; what is put into its encoder next starts from the seed, and learns."""
    torch.manual_seed(seed)
    model.requires_grad_(False)
    model.heads.requires_grad_(True)


def train_with_heads(
    model: SimoModel,
    data: Any,
    settings: TrainSettings,
    state_file: Path | None,
    label: str,
    losses: ModelLosses = image_losses,
    checkpointing: bool = False,
) -> dict[str, Any]:
    """Train on all tasks at once what of a model learns, in place; what it cost."""
    trained = trainable_parameters(model)
    log = finetune(model, data, settings, None, state_file, label, losses, TuneOptions(checkpointing=checkpointing))
    return {"steps": log.steps, "seconds": log.seconds, "trained_parameters": trained}
