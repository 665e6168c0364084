"""What the merge methods that look at data need: Gram matrices of layer inputs (RegMean), Fisher information (Fisher).

Both are dicts of arrays by canonical tensor name, one dict per expert; see `simomerge.merging.statistics`. They are
computed in float32, whatever training uses: squares of gradients in bfloat16 keep two digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simomerge.checkpoints import canonical_name
from simomerge.core.errors import InputError
from simomerge.core.progress import progress
from simomerge.datasets.batches import ordered_batches
from simomerge.models.encoders import Encoder
from simomerge.models.model import SimoModel
from simomerge.training.lpft import image_losses


@torch.no_grad()
def input_grams(
    encoder: Encoder,
    images: Any,
    batch_size: int = 16,
    label: str = "input Grams",
) -> dict[str, np.ndarray]:
    """Second moments of the inputs of every linear layer of an encoder: X^T X / tokens, for RegMean.

    One pass; what is in memory is one batch and the result, 8 C^2 bytes per layer of C inputs (1.2 GB for a
    ViT-B), however many images there are. Each sum is over all tokens of all images: patches, CLS and registers.

    Args:
        encoder: an expert's; run in evaluation mode, on the device it is on.
        images: a dataset, of which ``image(i)`` (3, H, W) is used; no labels.
            Images of one size, or ``batch_size=1``.
        batch_size: images encoded at once. It does not change the result but for rounding.

    Returns:
        Canonical name of the weight -> float64 (C, C), symmetric.

    Raises:
        InputError: no images, an encoder without linear layers, or values that are not finite.

    Example:
        >>> grams = {"depth": input_grams(depth_model.encoder, images)}    # doctest: +SKIP
        >>> merge(base, experts, method="regmean", grams=grams)            # doctest: +SKIP
    """
    if not len(images):
        raise InputError("input_grams: there are no images; give at least one.")
    layers = {name: module for name, module in encoder.backbone.named_modules() if isinstance(module, nn.Linear)}
    if not layers:
        raise InputError(f"input_grams: {type(encoder.backbone).__name__} has no linear layers; use another method.")
    sums = {name: _InputMoment(layer) for name, layer in layers.items()}
    handles = [layer.register_forward_pre_hook(sums[name]) for name, layer in layers.items()]
    training, device = encoder.training, next(encoder.parameters()).device
    encoder.eval()
    try:
        for first in range(0, len(images), batch_size):
            batch = [images.image(i) for i in range(first, min(first + batch_size, len(images)))]
            encoder(torch.stack(batch).to(device))
            progress(label, first + len(batch), len(images), "")
    finally:
        encoder.train(training)
        for handle in handles:
            handle.remove()
    # A layer that never ran (of a part of the backbone that nobody uses) has no inputs, and its weight gets averaged.
    return {canonical_name(f"{name}.weight"): moment.mean(name) for name, moment in sums.items() if moment.tokens}


class _InputMoment:
    """A forward pre-hook that adds up x x^T over the tokens of a linear layer's inputs, in float64."""

    def __init__(self, layer: nn.Linear) -> None:
        device = layer.weight.device
        self.device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        self.total = torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64, device=self.device)
        self.tokens = 0

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        tokens = inputs[0].detach().reshape(-1, len(self.total)).to(self.device).double()
        self.total.addmm_(tokens.T, tokens)
        self.tokens += len(tokens)

    def mean(self, name: str) -> np.ndarray:
        mean = (self.total / self.tokens).cpu().numpy()
        if not np.isfinite(mean).all():
            raise InputError(f"input_grams: the inputs of '{name}' are not finite; the model or an image is damaged.")
        return mean


def fisher_information(
    model: SimoModel,
    data: Any,
    count: int = 256,
    label: str = "Fisher information",
) -> dict[str, np.ndarray]:
    """Diagonal empirical Fisher information of a model's encoder: the mean squared gradient of its loss.

    One gradient per image, of the sum of the model's task losses with the true labels ("empirical": the Fisher
    proper takes labels drawn from the model's prediction, which a loss such as L1 on depth does not define), then
    squared and averaged. Batches would square the mean gradient instead, which is near zero for a trained model.

    Args:
        model: an expert, with its head; in evaluation mode, on the device it is on.
        data: a dataset with the targets of all the model's tasks.
        count: images used at most, the first of the dataset.

    Returns:
        Canonical tensor name -> float32, of the tensor's shape; zero where the loss does not depend on it.

    Raises:
        InputError: a model without tasks, a task that the data lack, a loss that is not finite.

    Example:
        >>> fishers = {"depth": fisher_information(depth_model, data)}     # doctest: +SKIP
        >>> merge(base, experts, method="fisher", fishers=fishers)         # doctest: +SKIP
    """
    if not model.tasks:
        raise InputError("fisher_information: the model has no tasks, so no loss; give an expert with its head.")
    if count < 1:
        raise InputError(f"fisher_information: count={count}; use at least 1.")
    data = data.select(list(model.tasks))
    total = min(count, len(data))
    parameters = dict(model.encoder.backbone.named_parameters())
    squares = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    training, wanted = model.training, {name: parameter.requires_grad for name, parameter in parameters.items()}
    model.eval()
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for done, gradients in enumerate(_gradients(model, islice(ordered_batches(data, 1), total)), start=1):
            for square, gradient in zip(squares.values(), gradients, strict=True):
                if gradient is not None:
                    square.addcmul_(gradient, gradient, value=1 / total)
            progress(label, done, total, "")
    finally:
        model.train(training)
        for name, parameter in parameters.items():
            parameter.requires_grad_(wanted[name])
    return {canonical_name(name): square.float().cpu().numpy() for name, square in squares.items()}


def _gradients(model: SimoModel, batches: Any) -> Iterator[tuple[Tensor | None, ...]]:
    """Gradient of the summed losses of each batch with respect to the backbone's parameters; None where unused."""
    parameters = list(model.encoder.backbone.parameters())
    for number, batch in enumerate(batches):
        batch = {key: value.to(parameters[0].device) for key, value in batch.items()}
        with torch.enable_grad():
            loss = torch.stack(list(image_losses(model, batch).values())).sum()
        if not torch.isfinite(loss):
            raise InputError(f"fisher_information: the loss of image {number} is not finite; check its targets.")
        yield torch.autograd.grad(loss, parameters, allow_unused=True)
