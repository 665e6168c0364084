"""Statistics for merge methods that look at data: Gram matrices of layer inputs (RegMean), Fisher information (Fisher).

Both are dicts of arrays by canonical tensor name, one dict per expert; see `simomerge.merging.statistics`. They are
computed in float32 even if training uses bfloat16, in which squared gradients would keep two digits only.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from simomerge.checkpoints import canonical_name
from simomerge.core.errors import InputError
from simomerge.core.modes import evaluating
from simomerge.core.progress import progress
from simomerge.core.schema import check_whole
from simomerge.datasets.batches import ordered_batches
from simomerge.models.encoders import Encoder
from simomerge.models.model import SimoModel
from simomerge.training.evaluate import shared_tasks


@torch.no_grad()
def input_grams(
    encoder: Encoder, images: Any, batch_size: int = 16, label: str = "input Grams"
) -> dict[str, np.ndarray]:
    """Second moments of the inputs of every linear layer and convolution, X^T X / tokens, for RegMean.

    Each sum is over all tokens of all images: patches, CLS and registers. The inputs of a convolution are the patches
    under its kernel, in the order of its weights, one for each place of its output. The memory does not depend on the
    number of images: one batch and the result, 8 C^2 bytes per layer with C inputs (1.2 GB for a ViT-B).

    Args:
        encoder: The encoder of an expert. It runs in evaluation mode, on its device.
        images: A dataset whose ``image(i)`` is (3, H, W); labels are not read. Images of several sizes need
            ``batch_size=1``.
        batch_size: Images per batch. It changes the result by rounding only.

    Returns:
        Canonical name of the weight -> float64 (C, C), symmetric; (groups, C, C) for a convolution.

    Raises:
        InputError: There are no images or no such layers, or values are not finite.

    Example:
        >>> grams = {"depth": input_grams(depth_model.encoder, images)}    # doctest: +SKIP
        >>> merge(base, experts, method="regmean", grams=grams)            # doctest: +SKIP
    """
    if not len(images):
        raise InputError("input_grams: there are no images; give at least one.")
    layers = {n: layer for n, layer in encoder.backbone.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    if not layers:
        raise InputError(
            f"input_grams: {type(encoder.backbone).__name__} has neither linear layers nor convolutions; use another"
            " method."
        )
    moments = {name: _InputMoment(layer) for name, layer in layers.items()}
    device = next(encoder.parameters()).device
    with evaluating(encoder), ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(moments[name]).remove)
        for first in range(0, len(images), batch_size):
            batch = [images.image(i) for i in range(first, min(first + batch_size, len(images)))]
            encoder(torch.stack(batch).to(device))
            progress(label, first + len(batch), len(images))
    # A layer in an unused part of the backbone never ran. It has no inputs, and its weight is averaged.
    return {canonical_name(f"{name}.weight"): moment.mean(name) for name, moment in moments.items() if moment.tokens}


class _InputMoment:
    """A forward pre-hook that sums x x^T over the inputs of a layer, in float64."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        device = layer.weight.device
        self.device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        size = layer.weight[0].numel()
        shape = (layer.groups, size, size) if isinstance(layer, nn.Conv2d) else (size, size)
        self.total = torch.zeros(shape, dtype=torch.float64, device=self.device)
        self.tokens = 0

    def __call__(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        x, size = inputs[0].detach(), self.total.shape[-1]
        if isinstance(layer, nn.Conv2d):
            tokens = _patches(layer, x).to(self.device).double()  # (groups, patches, size)
            self.total.baddbmm_(tokens.mT, tokens)
        else:
            tokens = x.reshape(-1, size).to(self.device).double()
            self.total.addmm_(tokens.T, tokens)
        self.tokens += tokens.shape[-2]

    def mean(self, name: str) -> np.ndarray:
        mean = (self.total / self.tokens).cpu().numpy()
        if not np.isfinite(mean).all():
            raise InputError(f"input_grams: the inputs of '{name}' are not finite; the model or an image is damaged.")
        return mean


def _patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """What the kernel of a convolution sees at each place, (groups, places, inputs of a group * kernel)."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    columns = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)  # (B, C * kernel, places)
    return columns.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def fisher_information(
    model: SimoModel, data: Any, count: int = 256, label: str = "Fisher information"
) -> dict[str, np.ndarray]:
    """Diagonal empirical Fisher information of a model's encoder: the mean squared gradient of its loss.

    The gradient of each image is that of the sum of the task losses with the true labels, hence "empirical". The true
    Fisher information takes labels drawn from the model's prediction, which a loss such as L1 on depth does not define.
    Batches would square the mean gradient instead, which is near zero for a trained model.

    Args:
        model: An expert with its head. It runs in evaluation mode, on its device.
        data: A dataset with the targets of all tasks of the model.
        count: Maximum number of images, from the start of the dataset.

    Returns:
        Canonical tensor name -> float32 of the tensor's shape; zero if the loss does not depend on the tensor.

    Raises:
        InputError: The model has no tasks, the data do not have one of them, or have it with other classes, or a loss
            is not finite.

    Example:
        >>> fishers = {"depth": fisher_information(depth_model, data)}     # doctest: +SKIP
        >>> merge(base, experts, method="fisher", fishers=fishers)         # doctest: +SKIP
    """
    if not model.tasks:
        raise InputError("fisher_information: the model has no tasks, so no loss; give an expert with its head.")
    check_whole("count", count)
    data = data.select(list(model.tasks))
    shared_tasks(model.tasks, data.tasks)
    total = min(count, len(data))
    parameters = {name: value.detach().requires_grad_() for name, value in model.encoder.backbone.named_parameters()}
    squares = {name: torch.zeros_like(value) for name, value in parameters.items()}
    with evaluating(model):
        for done, batch in enumerate(islice(ordered_batches(data, 1), total), start=1):
            gradients = _gradients(model, parameters, batch, done - 1)
            for square, gradient in zip(squares.values(), gradients, strict=True):
                if gradient is not None:
                    square.addcmul_(gradient, gradient, value=1 / total)
            progress(label, done, total)
    return {canonical_name(name): square.float().cpu().numpy() for name, square in squares.items()}


@torch.enable_grad()
def _gradients(
    model: SimoModel, backbone: Mapping[str, Tensor], batch: Mapping[str, Tensor], index: int
) -> tuple[Tensor | None, ...]:
    """Gradients of the summed task losses with respect to the backbone's parameters; None for unused ones."""
    batch = {key: value.to(next(iter(backbone.values())).device) for key, value in batch.items()}
    weights = {f"encoder.backbone.{name}": value for name, value in backbone.items()}
    logits = functional_call(model, weights, (batch["image"],))
    loss = torch.stack([task.loss(logits[name], batch[name]) for name, task in model.tasks.items()]).sum()
    if not torch.isfinite(loss):
        raise InputError(f"fisher_information: the loss of image {index} is not finite; check its targets.")
    return torch.autograd.grad(loss, list(backbone.values()), allow_unused=True)
