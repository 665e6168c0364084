"""How to train: plain data that recipes and the command line read without torch."""

from __future__ import annotations

from dataclasses import dataclass

from simomerge.core.errors import InputError
from simomerge.core.registry import check_parameters, parameter


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one training.

    Raises:
        InputError: A setting is out of its range.
    """

    steps: int = parameter(400, low=1, help="Maximum number of optimiser steps.")
    batch_size: int = parameter(32, low=1, help="Images per step.")
    lr: float = parameter(1e-3, above=0, help="Peak learning rate of the one-cycle schedule.")
    encoder_lr: float | None = parameter(
        None,
        kind=float,
        above=0,
        help="Peak learning rate of the encoder; lr by default, 0.4 lr in finetune and distill-encoder.",
    )
    layer_decay: float = parameter(
        1.0, above=0, high=1, help="Factor of the encoder's learning rate per block, from the last block to the first."
    )
    weight_decay: float = parameter(0.01, low=0, help="Weight decay of AdamW, on weights of two or more dimensions.")
    warmup: float = parameter(0.05, low=0, help="Fraction of the steps in which the learning rate rises (paper: 5 %).")
    clip: float = parameter(25.0, above=0, help="Maximum gradient norm (paper: 25).")
    validate_every: int = parameter(0, low=0, help="Steps between two validations; 0 never validates.")
    patience: int | None = parameter(
        None,
        kind=int,
        low=1,
        help="Validations without a lower loss after which training stops; 5 by default, and in finetune and"
        " distill-encoder it never stops by default. The best weights are kept.",
    )
    seed: int = parameter(0, help="Seed of initialisation, order and augmentation.")

    def __post_init__(self) -> None:
        check_parameters("training", self)
        if not self.warmup < 1:
            raise InputError(f"training: warmup must be below 1, got {self.warmup}.")


@dataclass(frozen=True)
class TuneOptions:
    """Options of training the encoder together with the heads.

    Args:
        weighting: How the losses of several tasks are combined, a key of `simomerge.training.choices.WEIGHTINGS`.
        augmentation: A key of `simomerge.training.choices.AUGMENTATIONS`.
        checkpointing: Store only the input of each block for the backward pass. This gives the same gradients with
            less memory, in more time.
        keep_start: The weights at the start compete with those of later validations, so that training never ends with a
            higher validation loss than it started with.
    """

    weighting: str = "equal"
    augmentation: str = "flip"
    checkpointing: bool = False
    keep_start: bool = False


DEFAULT_OPTIONS = TuneOptions()
