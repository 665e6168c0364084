"""Modules whose weights are a start plus a weighted sum of task vectors; the coefficients of the sum are trained."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from simomerge.core.errors import InputError
from simomerge.models.model import SimoModel

_BACKBONE = "backbone."
"""Where the encoder's parameters are in an `Encoder`."""


def task_vectors(base: SimoModel, experts: Mapping[str, SimoModel], part: str = "") -> dict[str, Tensor]:
    """The task vectors of the encoder's parameters, or of those in one part of the backbone.

    Args:
        base: The foundation encoder.
        experts: By task.
        part: Name of a module in the backbone. The default is the whole backbone.

    Returns:
        Name in the part -> tensor (experts, *shape), in the order of the experts.

    Raises:
        InputError: A parameter of the base is missing in an expert, or has another shape there.
    """
    start = f"{part}." if part else ""
    theta = {name: value for name, value in base.encoder.backbone.named_parameters() if name.startswith(start)}
    weights = {task: dict(expert.encoder.backbone.named_parameters()) for task, expert in experts.items()}
    for task, expert in weights.items():
        for name, value in theta.items():
            if name not in expert or expert[name].shape != value.shape:
                raise InputError(
                    f"the base does not fit expert {task!r}: {name} is {tuple(value.shape)} in the base and"
                    f" {tuple(expert[name].shape) if name in expert else 'missing'} in the expert; give the foundation"
                    " encoder that it was fine-tuned from."
                )
    return {
        name.removeprefix(start): torch.stack(
            [expert[name].detach() - value.detach().to(expert[name].device) for expert in weights.values()]
        )
        for name, value in theta.items()
    }


class Blend(nn.Module):
    """A module whose parameters are theta + sum_t c_t tau_t. Only the coefficients c are trained.

    The module stays in evaluation mode. A subclass has the coefficients and `change`.

    Args:
        module: Its parameters are theta; they are frozen.
        vectors: Name of a parameter -> its task vectors tau (experts, *shape).
    """

    def __init__(self, module: nn.Module, vectors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.module = module.requires_grad_(False)
        self.vectors = vectors

    @abstractmethod
    def change(self, name: str, vectors: Tensor) -> Tensor:
        """The sum over the experts of coefficient times task vector, of one parameter."""

    def weights(self) -> dict[str, Tensor]:
        """The parameters that have task vectors, by name."""
        theta = dict(self.module.named_parameters())
        return {
            name: theta[name] + self.change(name, vectors.to(theta[name])) for name, vectors in self.vectors.items()
        }

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return functional_call(self.module, self.weights(), arguments, named)

    def _apply(self, fn: Any, recurse: bool = True) -> Blend:
        """Also move the task vectors, which would otherwise be copied to a GPU in every step."""
        self.vectors = {name: fn(vectors) for name, vectors in self.vectors.items()}
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Blend:
        super().train(mode)
        self.module.eval()
        return self

    @torch.no_grad()
    def settle(self) -> nn.Module:
        """Write the weights into the module and return it."""
        theta = dict(self.module.named_parameters())
        for name, value in self.weights().items():
            theta[name].copy_(value)
        return self.module


class EncoderBlend(Blend):
    """An encoder with one coefficient per expert and block.

    Args:
        model: The model with the encoder. Its parameters are theta.
        vectors: As `task_vectors` gives them.
        least: Coefficients below it count as this value.

    Attributes:
        coefficients: (experts, blocks), zero at the start.
    """

    def __init__(self, model: SimoModel, vectors: Mapping[str, Tensor], least: float = -math.inf) -> None:
        super().__init__(model.encoder, {f"{_BACKBONE}{name}": value for name, value in vectors.items()})
        self.depth = model.encoder.depth(vectors)
        self.least = least
        first = next(iter(vectors.values()))
        self.coefficients = nn.Parameter(first.new_zeros(len(first), max(self.depth.blocks, 1)))

    @property
    def scales(self) -> Tensor:
        """The coefficients as they are used (experts, blocks)."""
        return self.coefficients.clamp(min=self.least)

    def change(self, name: str, vectors: Tensor) -> Tensor:
        return torch.tensordot(self.scales[:, self.depth.position(name.removeprefix(_BACKBONE))], vectors, 1)


class ElementBlend(Blend):
    """A module with one coefficient per expert and weight.

    Attributes:
        coefficients: One tensor (experts, *shape) per parameter, zero at the start.
    """

    def __init__(self, module: nn.Module, vectors: Mapping[str, Tensor]) -> None:
        super().__init__(module, vectors)
        self.places = {name: place for place, name in enumerate(vectors)}
        self.coefficients = nn.ParameterList([torch.zeros_like(each) for each in vectors.values()])

    def change(self, name: str, vectors: Tensor) -> Tensor:
        return (self.coefficients[self.places[name]] * vectors).sum(0)
