"""How to train one thing: plain data, read by recipes and by the command line without torch."""

from __future__ import annotations

from dataclasses import dataclass

from simomerge.core.errors import InputError


@dataclass(frozen=True)
class TrainSettings:
    """How to train one thing.

    Args:
        steps: optimiser steps at most.
        batch_size: images per step.
        lr: peak learning rate of the one-cycle schedule.
        encoder_lr: peak learning rate of the encoder, where it is trained; ``lr`` by default.
        weight_decay: AdamW's, on weights of two or more dimensions.
        warmup: fraction of the steps in which the learning rate rises (paper: 5 %).
        clip: largest gradient norm (paper: 25).
        validate_every: steps between looks at the validation loss; 0 never looks.
        patience: looks without a better loss after which training stops; the best weights are kept.
        seed: of initialisation, order and augmentation.

    Raises:
        InputError: a number out of its range.
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
        for name, low in (("steps", 1), ("batch_size", 1), ("validate_every", 0), ("patience", 1)):
            if getattr(self, name) < low:
                raise InputError(f"training: {name}={getattr(self, name)}; use at least {low}.")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"training: {name}={getattr(self, name)}; use a number above 0.")
        if self.encoder_lr is not None and not self.encoder_lr > 0:
            raise InputError(f"training: encoder_lr={self.encoder_lr}; use a number above 0.")
        if not self.weight_decay >= 0:
            raise InputError(f"training: weight_decay={self.weight_decay}; use a number of at least 0.")
        if not 0 <= self.warmup < 1:
            raise InputError(f"training: warmup={self.warmup}; use a fraction from 0 to below 1.")
