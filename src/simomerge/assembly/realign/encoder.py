"""What the re-alignments that train the encoder itself have in common. Read without torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def experts_kept(model: SimoModel) -> Iterator[None]:
    """Keep all that tasks without a shared block have in a tree as it is, unless no task shares anything.

    They predict what their experts predict. Training could only move them away from that, and their distances, which
    are divided by their value at the start, would outweigh those of the other tasks. The statistics of the heads' batch
    norms stay too; those of an encoder never change.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    from simomerge.models.encoders import TreeEncoder

    alone = model.encoder.alone if isinstance(model.encoder, TreeEncoder) else []
    kept = alone if len(alone) < len(model.tasks) else []
    for task in kept:
        branch = model.encoder.branch(task)
        for each in (branch, branch.adapters, model.heads[task]):
            if each is not None:
                each.requires_grad_(False)
    norms = [norm for task in kept for norm in model.heads[task].modules() if isinstance(norm, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
