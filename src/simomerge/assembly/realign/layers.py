"""The calibration of the linear layers inside an encoder: ridge regressions in the order in which layers run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simomerge.assembly.realign.blocks import Call, call_of
from simomerge.assembly.realign.normal_equations import NormalEquations
from simomerge.assembly.realign.sums import FALLBACK_RIDGE, RIDGES
from simomerge.core.errors import InputError
from simomerge.core.machine import autocast
from simomerge.core.modes import evaluating
from simomerge.core.progress import progress
from simomerge.datasets import groups
from simomerge.datasets.pictures import image_batches
from simomerge.models.encoders import Encoder
from simomerge.models.model import SimoModel


@dataclass(frozen=True)
class Batch:
    """What one block receives for a batch of images.

    Attributes:
        held_out: Bool (B,), the images that choose the ridge.
        calls: Of the merged model, then of every expert.
    """

    held_out: Tensor
    calls: list[Call]


@dataclass(frozen=True)
class LayerFit:
    """The ridge of a layer, and its error on held-out images as a share of the targets' variance; NaN without any."""

    ridge: float
    before: float
    after: float


class Calibration:
    """Calibrates the linear layers of a merged model's blocks to those of the experts, in place.

    Args:
        model: A merged model without adapters.
        experts: By task, of the same architecture.
        mix: Share of an expert's own input in what its layer is shown.
        ridge: Shrinkage towards the merged weights, in units of the mean diagonal of the Gram matrix. "auto" takes the
            best of `RIDGES` on the held-out images for each layer; infinity leaves a layer unchanged.
    """

    def __init__(self, model: SimoModel, experts: Mapping[str, SimoModel], mix: float, ridge: float | str) -> None:
        self.models = [model, *experts.values()]
        self.mix = mix
        self.ridge = ridge
        self.device = next(model.parameters()).device
        blocks = model.encoder.layout.blocks
        self.blocks = [index for index, block in enumerate(blocks) if _linear_layers(block)]

    @torch.no_grad()
    def run(self, images: Any, batch_size: int = 32) -> dict[str, LayerFit]:
        """Calibrate every layer.

        Args:
            images: As `simomerge.datasets.pictures.as_images` gives them. They are read once per block.

        Returns:
            How each layer fits, by block and name, such as "0.attention.output.dense".
        """
        fits: dict[str, LayerFit] = {}
        with evaluating(*self.models):
            for done, index in enumerate(self.blocks, 1):
                batches = list(self._batches(index, images, batch_size))
                for names in self._groups(index, max(batches, key=lambda batch: len(batch.held_out))):
                    found = self._calibrate(index, names, batches)
                    fits |= {f"{index}.{name}": fit for name, fit in found.items()}
                progress("calibrate", done, len(self.blocks), "")
        return fits

    def _batches(self, index: int, images: Any, batch_size: int) -> Iterator[Batch]:
        """What a block receives in every model."""
        out = set(groups.held_out(images)) if len(images) >= groups.LEAST_IMAGES else set()
        for indices, pixels in image_batches(images, batch_size):
            pixels = self.models[0].fit(pixels.to(self.device))
            held_out = torch.tensor([index in out for index in indices])
            with autocast(self.device):
                calls = [call_of(_block(model, index), partial(model.encode, pixels)) for model in self.models]
            yield Batch(held_out, calls)

    def _run_block(self, model: SimoModel, index: int, call: Call) -> None:
        model.encoder.restore_windows()
        with autocast(self.device):
            _block(model, index)(*call.args, **call.kwargs)

    def _groups(self, index: int, batch: Batch) -> list[list[str]]:
        """The linear layers of a block in the order in which they run; those of one input, such as q, k, v, together.

        Layers without a bias have their own groups. A layer whose input does not depend on the image, such as one that
        makes position biases, is in none.
        """
        groups: list[tuple[Tensor, bool, list[str]]] = []
        call, images = batch.calls[0], len(batch.held_out)
        if images == 1:  # with one image, all inputs would seem to depend on it
            call, images = _doubled(call), 2

        def keep(name: str, layer: nn.Linear, args: tuple[Any, ...]) -> None:
            if len(args[0]) < images or len(args[0]) % images:
                return
            known = [names for x, bias, names in groups if x is args[0] and bias == (layer.bias is not None)]
            if known:
                known[0].append(name)
            else:
                groups.append((args[0], layer.bias is not None, [name]))

        layers = _linear_layers(_block(self.models[0], index))
        hooks = [layer.register_forward_pre_hook(partial(keep, name)) for name, layer in layers.items()]
        try:
            self._run_block(self.models[0], index, call)
        finally:
            for hook in hooks:
                hook.remove()
        return [names for _, _, names in groups]

    def _calibrate(self, index: int, names: list[str], batches: list[Batch]) -> dict[str, LayerFit]:
        """Calibrate layers that share one input, in place."""
        layers = [[_linear_layers(_block(model, index))[name] for name in names] for model in self.models]
        train, held_out = self._sums(index, layers, batches)
        if layers[0][0].bias is None:
            train, held_out = _through_origin(train), _through_origin(held_out)
        chosen = self._choose([len(layer.weight) for layer in layers[0]], train, held_out)
        total, first = train + held_out, 0
        ridges = {fit.ridge for fit in chosen if math.isfinite(fit.ridge)}
        solutions = {ridge: total.solve(ridge, torch.ones_like(total.x)) for ridge in ridges}
        for layer, fit in zip(layers[0], chosen, strict=True):
            columns = slice(first, first := first + len(layer.weight))
            if fit.ridge in solutions:
                weights, bias = (each[columns] for each in solutions[fit.ridge])
                layer.weight.copy_(layer.weight.to(weights) + weights)
                if layer.bias is not None:
                    layer.bias.copy_(layer.bias.to(bias) + bias)
        return dict(zip(names, chosen, strict=True))

    def _sums(
        self, index: int, layers: list[list[nn.Linear]], batches: list[Batch]
    ) -> tuple[NormalEquations, NormalEquations]:
        """Sums over the images that are solved on, and over those that are held out, of the change that layers need."""
        merged, *experts = [_stacked(each) for each in layers]
        device = torch.device("cpu") if self.device.type == "mps" else self.device  # MPS has no float64
        sums = NormalEquations.empty(merged[0].shape[1], len(merged[0]), device)
        held_out_sums = NormalEquations.empty(merged[0].shape[1], len(merged[0]), device)
        for batch in batches:
            x, *inputs = self._inputs(index, [each[0] for each in layers], batch)
            outputs = [
                F.linear(self.mix * each + (1 - self.mix) * x, *weights)
                for each, weights in zip(inputs, experts, strict=True)
            ]
            target = torch.stack(outputs).mean(0)
            rows = [_by_image(each, batch) for each in (x, target - F.linear(x, *merged), target)]
            for equations, chosen in ((sums, ~batch.held_out), (held_out_sums, batch.held_out)):
                if chosen.any():
                    patches, residual, wanted = (each[chosen] for each in rows)
                    equations.add(patches, patches.new_zeros(len(patches), 0), residual, wanted)
        return sums, held_out_sums

    def _inputs(self, index: int, layers: list[nn.Linear], batch: Batch) -> list[Tensor]:
        """What a layer receives in every model, in float32."""
        calls = [
            call_of(layer, partial(self._run_block, model, index, call))
            for model, layer, call in zip(self.models, layers, batch.calls, strict=True)
        ]
        return [call.args[0].float() for call in calls]

    def _choose(self, widths: list[int], train: NormalEquations, held_out: NormalEquations) -> list[LayerFit]:
        """The ridge of each layer with the least error on the held-out images."""
        ridges = RIDGES[::-1] if self.ridge == "auto" else (float(self.ridge),)
        if not train.images or not held_out.images:
            return [LayerFit(FALLBACK_RIDGE if self.ridge == "auto" else ridges[0], math.nan, math.nan)] * len(widths)
        spread = [float(each.sum()) for each in held_out.spread().split(widths)]
        errors = {math.inf: [float(each.sum()) for each in held_out.rr.split(widths)]}
        for ridge in ridges:
            if math.isfinite(ridge):
                error = held_out.error(*train.solve(ridge, torch.ones_like(train.x)))
                errors[ridge] = [float(each.sum()) for each in error.split(widths)]
        chosen = [min(ridges, key=lambda ridge: errors[ridge][place]) for place in range(len(widths))]
        return [
            LayerFit(ridge, *(errors[each][place] / (spread[place] or 1.0) for each in (math.inf, ridge)))
            for place, ridge in enumerate(chosen)
        ]


def _doubled(call: Call) -> Call:
    """The call with each of its images twice."""

    def twice(value: Any) -> Any:
        return torch.cat([value, value]) if isinstance(value, Tensor) and value.ndim > 2 else value

    return Call(tuple(map(twice, call.args)), {name: twice(value) for name, value in call.kwargs.items()})


def check_layers(encoder: Encoder) -> None:
    """Raise InputError if no block of the encoder is known, or none has a linear layer."""
    blocks = encoder.layout.blocks
    if not any(map(_linear_layers, blocks)):
        found = "has no linear layers in its blocks" if blocks else "is a custom encoder, whose blocks are unknown"
        raise InputError(f"{type(encoder.backbone).__name__} {found}, and calibrate changes only these; use fold.")


def _block(model: SimoModel, index: int) -> nn.Module:
    return model.encoder.layout.blocks[index]


def _linear_layers(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def _stacked(layers: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of layers that share one input, as those of one layer."""
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    weight = torch.cat([layer.weight for layer in layers]).float()
    return weight, torch.cat(biases).float() if biases else None


def _by_image(rows: Tensor, batch: Batch) -> Tensor:
    """Tokens, windows or maps with their channels last, as (B, n, D)."""
    return rows.reshape(len(batch.held_out), -1, rows.shape[-1])


def _through_origin(sums: NormalEquations) -> NormalEquations:
    """Sums whose solution has no bias."""
    return replace(sums, x=torch.zeros_like(sums.x), r=torch.zeros_like(sums.r))
