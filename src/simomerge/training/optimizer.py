"""The optimiser of a training: AdamW with parameter groups for encoder, heads, and weight decay."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from simomerge.core.errors import InputError
from simomerge.merging.engine.depth import Depth
from simomerge.training.settings import TrainSettings

_ENCODER = "encoder.backbone."
_COEFFICIENTS = "encoder.coefficients"


def make_optimizer(parameters: Mapping[str, nn.Parameter], settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW without weight decay on biases, norms and merging coefficients; the encoder may have its own rates."""
    if not parameters:
        raise InputError("nothing to train: no parameter requires a gradient.")
    rates = _encoder_rates(parameters, settings)
    groups: dict[tuple[str, float, float], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        part, lr = ("encoder", rates[name]) if name in rates else ("heads", settings.lr)
        decay = settings.weight_decay if parameter.ndim > 1 and not name.startswith(_COEFFICIENTS) else 0.0
        group = groups.setdefault((part, lr, decay), {"params": [], "part": part, "lr": lr, "weight_decay": decay})
        group["params"].append(parameter)
    return torch.optim.AdamW(groups.values(), fused=True)


def _encoder_rates(names: Collection[str], settings: TrainSettings) -> dict[str, float]:
    """The peak learning rate of each parameter of the encoder, lower by ``layer_decay`` per block below the last."""
    if settings.encoder_lr is None and settings.layer_decay == 1:
        return {}
    inside = [name for name in names if name.startswith(_ENCODER)]
    depth, top = Depth(name.removeprefix(_ENCODER) for name in inside), settings.encoder_lr or settings.lr
    below = {name: depth.blocks - 1 - depth.position(name.removeprefix(_ENCODER)) for name in inside}
    rates = {name: top * settings.layer_decay ** max(below[name], 0) for name in inside}
    return rates | {name: top for name in names if name.startswith(_COEFFICIENTS)}
