"""What the re-alignments that train the encoder itself have in common. Read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from simomerge.core.errors import InputError
from simomerge.core.registry import parameter

if TYPE_CHECKING:
    from simomerge.models.encoders import Encoder
    from simomerge.models.model import SimoModel
    from simomerge.training.settings import TrainSettings

ENCODER_RATE = 0.4
"""The encoder's learning rate relative to the heads', unless it is given."""


def last_blocks_parameter(**more: Any) -> Any:
    """The field of a re-alignment that may train a part of the encoder only."""
    return parameter(0, low=0, help="Train the last N blocks of the encoder only; 0 trains all.", **more)


def trained_names(encoder: Encoder, last_blocks: int) -> set[str]:
    """Names of the encoder's parameters that learn: all, or those of the last blocks and what follows them.

    Raises:
        InputError: The encoder has fewer blocks, or its blocks are unknown.
    """
    names = [name for name, _ in encoder.backbone.named_parameters()]
    depth = encoder.depth(names)
    if last_blocks > depth.blocks:
        raise InputError(
            f"last_blocks is {last_blocks}, and {depth.blocks} blocks of the encoder are known; give a smaller number,"
            " or 0 to train the whole encoder. An encoder of your own can declare its blocks."
        )
    return {name for name in names if not last_blocks or depth.position(name) >= depth.blocks - last_blocks}


def let_encoder_learn(model: SimoModel, names: set[str], settings: TrainSettings) -> TrainSettings:
    """Let the heads and some parameters of the encoder learn; the settings with the encoder's learning rate.

    Args:
        names: As `trained_names` gives them.
    """
    from simomerge.assembly.realign.training import freeze_encoder

    freeze_encoder(model, settings.seed)
    for name, weight in model.encoder.backbone.named_parameters():
        weight.requires_grad_(name in names)
    return replace(settings, encoder_lr=settings.encoder_lr or ENCODER_RATE * settings.lr)


def tasks_to_distil(model: SimoModel, experts: Mapping[str, SimoModel]) -> list[str]:
    """The tasks of a model that distillation can bring nearer to their experts.

    A task of a tree that shares no block, and still has the weights of its expert, is not one of them. Training could
    only move it away from its expert.

    Raises:
        InputError: No task is left.
    """
    from simomerge.assembly.realign.teacher import same_weights
    from simomerge.models.encoders import TreeEncoder

    encoder = model.encoder
    alone = encoder.alone if isinstance(encoder, TreeEncoder) and encoder.adapters is None else []
    found = [
        task
        for task in model.tasks
        if task not in alone
        or not same_weights(encoder.for_tasks([task]).backbone, experts[task].encoder.backbone)
        or not same_weights(model.heads[task], experts[task].heads[task])
    ]
    if not found:
        raise InputError("no task shares a block, and each has the weights of its expert: there is nothing to distil.")
    return found
