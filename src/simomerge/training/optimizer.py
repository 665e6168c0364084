"""The optimiser of a training: AdamW with parameter groups for encoder, heads, and weight decay."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from simomerge.core.errors import InputError
from simomerge.merging.engine.depth import Depth
from simomerge.models.encoders import Encoder
from simomerge.training.settings import TrainSettings

_ENCODER = "encoder.backbone."
_COEFFICIENTS = "encoder.coefficients"

DepthOf = Callable[[Iterable[str]], Depth]
"""Names of an encoder's tensors -> the blocks they belong to."""


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], settings: TrainSettings, depth_of: DepthOf = Depth
) -> torch.optim.AdamW:
    """AdamW without weight decay on biases, norms and merging coefficients; the encoder may have its own rates.

    Args:
        parameters: The parameters to train, by name in the module that is trained.
        settings: Of the training.
        depth_of: Names of the backbone's parameters -> the blocks they belong to, as `Encoder.depth` does.

    Raises:
        InputError: There is nothing to train, or the rate shall differ between blocks and they are unknown.
    """
    if not parameters:
        raise InputError("nothing to train: no parameter requires a gradient.")
    rates = _encoder_rates(parameters, settings, depth_of)
    groups: dict[tuple[str, float, float], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        part, lr = ("encoder", rates[name]) if name in rates else ("heads", settings.lr)
        decay = settings.weight_decay if parameter.ndim > 1 and not name.startswith(_COEFFICIENTS) else 0.0
        group = groups.setdefault((part, lr, decay), {"params": [], "part": part, "lr": lr, "weight_decay": decay})
        group["params"].append(parameter)
    return torch.optim.AdamW(groups.values(), fused=True)


def one_cycle(optimizer: torch.optim.Optimizer, settings: TrainSettings) -> torch.optim.lr_scheduler.OneCycleLR:
    """The one-cycle schedule of a training: the rates of the optimiser's groups are its peaks."""
    total, rise = settings.steps + 1, max(settings.warmup, 1e-3)
    if rise * total == 1:  # a rise of exactly one step ends where it begins, and OneCycleLR divides 0 by 0
        rise *= 1 + 1e-9
    peaks = [group["lr"] for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=total, pct_start=rise)


def check_layer_decay(encoder: Encoder, settings: TrainSettings) -> None:
    """Check that an encoder has blocks if its learning rate shall differ between them. Raises InputError."""
    if settings.layer_decay != 1:
        _check_has_blocks(encoder.depth(name for name, _ in encoder.backbone.named_parameters()), settings)


def _check_has_blocks(depth: Depth, settings: TrainSettings) -> None:
    if not depth.blocks:
        raise InputError(
            f"layer_decay is {settings.layer_decay}, and the encoder's blocks are unknown: declare them in its class"
            " (blocks), or leave layer_decay out."
        )


def _encoder_rates(names: Collection[str], settings: TrainSettings, depth_of: DepthOf) -> dict[str, float]:
    """The peak learning rate of each parameter of the encoder, lower by ``layer_decay`` per block below the last."""
    if settings.encoder_lr is None and settings.layer_decay == 1:
        return {}
    top = settings.encoder_lr or settings.lr
    own = {name: name.removeprefix(_ENCODER) for name in names if name.startswith(_ENCODER)}
    rates = dict.fromkeys([name for name in names if name in own or name.startswith(_COEFFICIENTS)], top)
    if settings.layer_decay != 1 and own:
        depth = depth_of(own.values())
        _check_has_blocks(depth, settings)
        last = depth.blocks - 1
        rates |= {name: top * settings.layer_decay ** (last - depth.position(short)) for name, short in own.items()}
    return rates
