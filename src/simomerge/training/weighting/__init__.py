"""How a joint model's task losses become one: the baselines that merging is compared with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from simomerge.core.errors import InputError
from simomerge.training.weighting.gradients import CAGrad, GradientWeighting, GradNorm, NashMTL, PCGrad
from simomerge.training.weighting.losses import DynamicAverage, RandomWeights, Uncertainty, Weighting

WEIGHTINGS: dict[str, type[Weighting]] = {
    "equal": Weighting,
    "uncertainty": Uncertainty,
    "dwa": DynamicAverage,
    "random": RandomWeights,
    "gradnorm": GradNorm,
    "pcgrad": PCGrad,
    "cagrad": CAGrad,
    "nash": NashMTL,
}
"""Every weighting by name. A new one is one line here."""


def weighting(name: str, tasks: int, seed: int = 0, epoch: int = 100) -> Weighting:
    """A weighting by name.

    Raises:
        InputError: an unknown name.

    Example:
        >>> float(weighting("equal", 2)(torch.tensor([1.0, 3.0])))
        2.0
    """
    if name not in WEIGHTINGS:
        raise InputError(f"unknown loss weighting {name!r}; choose one of: {', '.join(WEIGHTINGS)}.")
    return WEIGHTINGS[name](tasks, seed, epoch)


def combined(parts: Mapping[str, Tensor], how: Weighting | None) -> Tensor:
    """One loss of those of the tasks; their mean without a weighting."""
    losses = torch.stack(list(parts.values()))
    total: Tensor = losses.mean() if how is None else how(losses)
    return total


__all__ = [
    "WEIGHTINGS",
    "CAGrad",
    "DynamicAverage",
    "GradNorm",
    "GradientWeighting",
    "NashMTL",
    "PCGrad",
    "RandomWeights",
    "Uncertainty",
    "Weighting",
    "combined",
    "weighting",
]
