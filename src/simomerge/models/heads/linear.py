"""The paper's linear head: batch norm and a 1x1 convolution on the tapped tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simomerge.core import distributed
from simomerge.models.encoders import Features
from simomerge.models.heads.projections import Moments, Projection
from simomerge.models.heads.resize import resize


class LinearHead(nn.Module):
    """Maps tapped patch tokens, each concatenated with its CLS token, to logits by one linear map.

    Source: "Single-Input Multi-Output Model Merging" (arXiv 2504.11268), NYUv2 protocol: batch norm, 1x1
    convolution, bilinear upsampling of the logits.

    Args:
        in_channels: Channels of each tap.
        out_channels: Channels of the task.
        cls: Also read the CLS tokens.
        subpixels: 1 is the paper's head. With s > 1 each token gives s x s logits (a pixel shuffle), which small images
            with large patches need.

    Example:
        >>> features = Features((torch.rand(2, 32, 8, 10),), (torch.rand(2, 32),), (60, 80), (64, 80))
        >>> LinearHead([32], 13)(features).shape
        torch.Size([2, 13, 64, 80])
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, cls: bool = True, subpixels: int = 1) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {"cls": cls, "subpixels": subpixels}
        self.in_channels = tuple(in_channels)
        width = sum(in_channels) * (2 if cls else 1)
        self.norm: Any = nn.BatchNorm2d(width)
        self.output: Any = nn.Conv2d(width, out_channels * subpixels**2, 1)
        self.cls = cls
        self.subpixels = subpixels
        nn.init.normal_(self.output.weight, std=0.01)
        self.start_at(torch.zeros(out_channels))

    @torch.no_grad()
    def start_at(self, values: Tensor) -> None:
        """Set the bias so that a fresh head predicts these values (C,)."""
        self.output.bias.copy_(values.repeat_interleave(self.subpixels**2))

    def forward(self, features: Features) -> Tensor:
        """Features -> logits (B, C, H, W) at the padded size."""
        size = features.grid(0)
        maps = [resize(m, size) for m in features.maps]
        # Float32 is needed here: without a layer norm, means may be far larger than standard deviations.
        with torch.autocast(maps[0].device.type, enabled=False):
            logits = self._project([m.float() for m in maps], [c.float() for c in features.cls if self.cls])
        if self.subpixels > 1:
            logits = F.pixel_shuffle(logits, self.subpixels)
        return resize(logits, features.padded_size)

    def _project(self, maps: list[Tensor], cls: list[Tensor]) -> Tensor:
        """The batch norm and the 1x1 convolution in one step.

        The normalisation is an affine map per channel, so it goes into the convolution's weights. The convolution then
        reads each tap directly: the taps are never concatenated, and each CLS token is multiplied once per image, not
        once per place.
        """
        weight, bias = self._without_norm(*self._input_moments(maps, cls))
        parts = weight.split([tap.shape[1] for tap in (*maps, *cls)], 1)
        logits = bias[:, None, None]
        for tap, part in zip((*maps, *cls), parts, strict=True):
            logits = logits + (
                F.conv2d(tap, part[..., None, None]) if tap.ndim == 4 else (tap @ part.T)[..., None, None]
            )
        return logits

    def _without_norm(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (O, inputs) and bias of the linear map that equals the batch norm and the convolution."""
        # In float32 also if the model is in half precision, because variances of features exceed its range.
        scale = self.norm.weight.float() * torch.rsqrt(variance.float() + self.norm.eps)
        weight = self.output.weight.flatten(1).float()
        return weight * scale, self.output.bias.float() + weight @ (self.norm.bias.float() - mean.float() * scale)

    def projections(self) -> list[Projection]:
        """One projection of all taps, which includes the batch norm in evaluation mode."""
        weight, bias = self._without_norm(self.norm.running_mean, self.norm.running_var)
        parts = weight.split(list(self.in_channels) * (2 if self.cls else 1), 1)
        taps = len(self.in_channels)
        return [Projection(dict(enumerate(parts[:taps])), dict(enumerate(parts[taps:])), bias)]

    @torch.no_grad()
    def with_projections(self, projections: list[Projection], moments: Moments) -> LinearHead:
        """A copy that computes this projection. Its batch norm holds the moments of its future input.

        It therefore computes nearly the same in training mode, where the batch norm uses the moments of the batch, and
        its training can continue.
        """
        (projection,) = projections
        head = copy.deepcopy(self)
        taps = range(len(self.in_channels))
        sources = ((projection.maps, moments.maps), (projection.cls, moments.cls))[: 2 if self.cls else 1]
        weight = torch.cat([weights[tap] for weights, _ in sources for tap in taps], 1)
        mean, variance = (
            torch.cat([of[tap][which] for _, of in sources for tap in taps]).to(weight) for which in (0, 1)
        )
        head.norm.running_mean.copy_(mean)
        head.norm.running_var.copy_(variance)
        head.norm.weight.fill_(1.0)
        head.norm.bias.fill_(0.0)
        head.output.weight.copy_((weight * (variance + head.norm.eps).sqrt())[..., None, None])
        head.output.bias.copy_(projection.bias + weight @ mean)
        return head

    def _input_moments(self, maps: list[Tensor], cls: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and variance of every input channel: those of the batch in training, otherwise the running ones."""
        norm = self.norm
        if not norm.training:
            return norm.running_mean, norm.running_var
        # The rows are the places, so sums over them are contiguous in memory for channels-last taps.
        rows = [m.permute(0, 2, 3, 1).flatten(0, 2) for m in maps] + cls
        mean, variance = (torch.cat(values) for values in zip(*map(_column_moments, rows), strict=True))
        count = torch.tensor(float(len(rows[0])), dtype=torch.float64)
        distributed.add_up(count)
        places = int(count)
        if places < 2:
            raise ValueError("the batch norm of a linear head needs more than one place to train; use more images.")
        with torch.no_grad():
            norm.num_batches_tracked += 1
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(variance * (places / (places - 1)), norm.momentum)
        return mean, variance


def _column_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each column of (N, C), over the rows of all processes that share a batch.

    The squares are summed a few rows at a time, which is ten times as fast as torch.var_mean.
    """
    if distributed.processes() < 2:
        count, mean = float(len(rows)), rows.mean(0)
    else:
        total = distributed.summed(torch.cat([rows.double().sum(0), rows.new_full((1,), len(rows)).double()]))
        count, mean = float(total[-1].detach()), (total[:-1] / total[-1]).to(rows)
    squares = torch.stack([(part - mean).square().sum(0) for part in rows.split(512)])
    return mean, distributed.summed(squares.sum(0)) / count
