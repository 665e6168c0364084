"""How to train one thing: plain data, read by recipes and by the command line without torch."""

from __future__ import annotations

from dataclasses import dataclass

from simomerge.core.registry import check_parameters, parameter


@dataclass(frozen=True)
class TrainSettings:
    """How to train one thing with AdamW and a one-cycle schedule.

    Raises:
        InputError: A number out of its range.

    Example:
        >>> TrainSettings(steps=100, lr=3e-3).batch_size
        32
    """

    steps: int = parameter(400, low=1, help="Optimiser steps (of each head).")
    batch_size: int = parameter(32, low=1, help="Images per step.")
    lr: float = parameter(1e-3, above=0, help="Peak learning rate of the one-cycle schedule.")
    encoder_lr: float | None = parameter(
        None, kind=float, above=0, help="Peak learning rate of the encoder, where it is trained; lr by default."
    )
    weight_decay: float = parameter(0.01, low=0, help="Weight decay of AdamW, on weights of two or more dimensions.")
    warmup: float = parameter(
        0.05, low=0, high=0.99, help="Fraction of the steps in which the rate rises (paper: 0.05)."
    )
    clip: float = parameter(25.0, above=0, help="Largest norm of the gradient (paper: 25).")
    validate_every: int = parameter(0, low=0, help="Steps between two looks at the validation loss; 0 never looks.")
    patience: int = parameter(
        5, low=1, help="Looks without a better validation loss after which training stops; the best weights are kept."
    )
    seed: int = parameter(0, help="Seed of initialisation, order and augmentation.")

    def __post_init__(self) -> None:
        check_parameters("training", self)
