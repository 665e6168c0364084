"""How to train: plain data that recipes and the command line read without torch."""

from __future__ import annotations

from dataclasses import dataclass

from simomerge.core.errors import InputError


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one training.

    Args:
        steps: Maximum number of optimiser steps.
        batch_size: Images per step.
        lr: Peak learning rate of the one-cycle schedule.
        encoder_lr: Peak learning rate of the encoder. The default is ``lr``.
        weight_decay: Weight decay of AdamW, on weights of two or more dimensions.
        warmup: Fraction of the steps in which the learning rate rises (paper: 5 %).
        clip: Maximum gradient norm (paper: 25).
        validate_every: Steps between two validations; 0 never validates.
        patience: Validations without a lower loss after which training stops. The best weights are kept.
        seed: Seed of initialisation, order and augmentation.

    Raises:
        InputError: A number is out of its range.
    """

    steps: int = 400
    batch_size: int = 32
    lr: float = 1e-3
    encoder_lr: float | None = None
    weight_decay: float = 0.01
    warmup: float = 0.05
    clip: float = 25.0
    validate_every: int = 0
    patience: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "steps": (self.steps >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "lr": (self.lr > 0, "a number above 0"),
            "encoder_lr": (self.encoder_lr is None or self.encoder_lr > 0, "a number above 0"),
            "weight_decay": (self.weight_decay >= 0, "a number of at least 0"),
            "warmup": (0 <= self.warmup < 1, "a fraction from 0 to below 1"),
            "clip": (self.clip > 0, "a number above 0"),
            "validate_every": (self.validate_every >= 0, "at least 0"),
            "patience": (self.patience >= 1, "at least 1"),
        }
        for name, (is_valid, hint) in ranges.items():
            if not is_valid:
                raise InputError(f"training: {name}={getattr(self, name)}; use {hint}.")


@dataclass(frozen=True)
class TuneOptions:
    """Options of training the encoder together with the heads.

    Args:
        weighting: How the losses of several tasks are combined, a key of `simomerge.training.choices.WEIGHTINGS`.
        augmentation: A key of `simomerge.training.choices.AUGMENTATIONS`.
        checkpointing: Store only the input of each block for the backward pass. This gives the same gradients with
            less memory, in more time.
    """

    weighting: str = "equal"
    augmentation: str = "flip"
    checkpointing: bool = False


DEFAULT_OPTIONS = TuneOptions()
