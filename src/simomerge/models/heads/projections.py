"""What a head first computes from the taps, said as data: this is where a fold (closed-form re-alignment) goes in.

Any head whose first layers are linear in the tokens can be folded. It declares them with two methods::

    def projections(self) -> list[Projection]: ...
    def with_projections(self, projections: list[Projection], moments: Moments) -> nn.Module: ...

The first says what they are, the second gives a copy of the head that computes the given ones instead. Where the
projections are 1x1 convolutions or linear layers, `Foldable` writes both. A head that can
also hold projections of taps it did not read so far says so with ``widens = True``; a cross-tap fold keeps to the taps
of a projection otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from simomerge.core.errors import InputError
from simomerge.models.encoders import Features
from simomerge.models.heads.resize import resize


@dataclass(frozen=True)
class Projection:
    """One linear map of the tapped tokens: ``u[n] = sum_l maps[l] z^l[n] + cls[l] cls^l + bias``.

    Attributes:
        maps: tap (counted from 0, in the order of the Features) -> weights (O, C_l) of its patch tokens.
        cls: tap -> weights (O, C_l) of its CLS token.
        bias: (O,).
        grid: the tap whose places u has; other taps are resized to it.

    Example:
        >>> projection = Projection({0: torch.eye(3, 8)}, {}, torch.zeros(3))
        >>> projection(Features((torch.rand(2, 8, 4, 5),), (), (32, 40), (32, 40))).shape
        torch.Size([2, 3, 4, 5])
    """

    maps: Mapping[int, Tensor]
    cls: Mapping[int, Tensor]
    bias: Tensor
    grid: int = 0

    @property
    def taps(self) -> tuple[int, ...]:
        return tuple(sorted({*self.maps, *self.cls}))

    def __call__(self, features: Features) -> Tensor:
        """Features -> u (B, O, h, w), computed in float32."""
        size = (features.maps[self.grid].shape[-2], features.maps[self.grid].shape[-1])
        total = self.bias.float()[:, None, None]
        with torch.autocast(self.bias.device.type, enabled=False):
            for tap, weight in self.maps.items():
                patches = resize(features.maps[tap].float(), size)
                total = total + torch.einsum("oc,bchw->bohw", weight.float(), patches)
            for tap, weight in self.cls.items():
                total = total + (features.cls[tap].float() @ weight.float().T)[..., None, None]
        return total.expand(len(features), -1, *size)

    def split(self) -> list[Projection]:
        """One projection per tap, which add up to this one; the first carries the bias."""
        parts = []
        for position, tap in enumerate(self.taps):
            bias = self.bias if position == 0 else torch.zeros_like(self.bias)
            maps, cls = ({tap: weights[tap]} if tap in weights else {} for weights in (self.maps, self.cls))
            parts.append(Projection(maps, cls, bias, self.grid))
        return parts

    def widened(self, channels: Sequence[int]) -> Projection:
        """The same function, written as one of all taps: those it does not read get zeros.

        Args:
            channels: of every tap.
        """
        rows = len(self.bias)
        blank = {tap: self.bias.new_zeros(rows, width) for tap, width in enumerate(channels)}
        return Projection({**blank, **self.maps}, {**blank, **self.cls} if self.cls else {}, self.bias, self.grid)


def joined(parts: Sequence[Projection]) -> Projection:
    """The sum of projections, as one."""
    maps: dict[int, Tensor] = {}
    cls: dict[int, Tensor] = {}
    for part in parts:
        for total, weights in ((maps, part.maps), (cls, part.cls)):
            for tap, weight in weights.items():
                total[tap] = total[tap] + weight if tap in total else weight
    bias = torch.stack([part.bias for part in parts]).sum(0)
    return Projection(maps, cls, bias, parts[0].grid)


@dataclass(frozen=True)
class Moments:
    """Mean and variance (C_l,) of every channel a head will read, by tap: what its normalisation needs to know."""

    maps: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    cls: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Foldable:
    """For a head whose first layers are 1x1 convolutions (or linear layers) on taps: says so, and takes a fold.

    Attributes:
        reads: name of such a layer -> the taps it reads (counted from 0), concatenated; their places are the first's.
        in_channels: of every tap; needed where a layer reads taps of unequal width.

    Example:
        >>> class Head(Foldable, nn.Module):
        ...     reads = {"project": (0,)}
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.project = nn.Conv2d(8, 3, 1)
        >>> Head().projections()[0].taps
        (0,)
    """

    reads: Mapping[str, Sequence[int]]
    in_channels: Sequence[int] | None = None

    def projections(self) -> list[Projection]:
        """One per layer in ``reads``."""
        return [
            layer_projection(self._layer(name), taps, grid=taps[0], channels=self.in_channels)
            for name, taps in self.reads.items()
        ]

    def with_projections(self, projections: list[Projection], moments: Moments) -> Any:
        """A copy whose layers compute these."""
        head = copy.deepcopy(self)
        for name, projection in zip(self.reads, projections, strict=True):
            assign(projection, head._layer(name))
        return head

    def _layer(self, name: str) -> Any:
        assert isinstance(self, nn.Module)
        try:
            return self.get_submodule(name)
        except AttributeError as error:
            raise InputError(f"{type(self).__name__}.reads names {name!r}, and it has no such layer.") from error


def is_foldable(head: nn.Module) -> bool:
    """Whether a head declares its input projections."""
    return all(callable(getattr(head, name, None)) for name in ("projections", "with_projections"))


def input_projections(head: Any, name: str = "") -> list[Projection]:
    """The projections that a head declares.

    Raises:
        InputError: it declares none; the message says how to.
    """
    if not is_foldable(head):
        raise InputError(
            f"head {name or type(head).__name__!r} ({type(head).__name__}) does not declare its input projections, so"
            " nothing can be folded into it. Give its class projections() and with_projections(), see"
            " simomerge.models.heads.projections, or re-align with method='distill'."
        )
    found: list[Projection] = [_detached(projection) for projection in head.projections()]
    return found


def _detached(projection: Projection) -> Projection:
    return Projection(
        {tap: weight.detach() for tap, weight in projection.maps.items()},
        {tap: weight.detach() for tap, weight in projection.cls.items()},
        projection.bias.detach(),
        projection.grid,
    )


def layer_projection(
    layer: Any, taps: Sequence[int], readout: Any = None, grid: int = 0, channels: Sequence[int] | None = None
) -> Projection:
    """The projection of a 1x1 convolution or linear layer that reads some taps, concatenated.

    Args:
        layer: ``nn.Conv2d`` of kernel 1, or ``nn.Linear``, on the patch tokens.
        taps: which it reads, in order.
        readout: the same for the CLS tokens, without a bias of its own.
        grid: the tap whose places the result has.
        channels: of every tap of the encoder; not needed where those it reads are of equal width.

    Example:
        >>> layer_projection(nn.Conv2d(8, 3, 1), [2]).maps[2].shape
        torch.Size([3, 8])
    """
    widths = [channels[tap] for tap in taps] if channels else [layer.weight.shape[1] // len(taps)] * len(taps)
    maps = dict(zip(taps, layer.weight.flatten(1).split(widths, 1), strict=True))
    cls = dict(zip(taps, readout.weight.flatten(1).split(widths, 1), strict=True)) if readout is not None else {}
    bias = layer.bias if layer.bias is not None else layer.weight.new_zeros(len(layer.weight))
    return Projection(maps, cls, bias, grid)


@torch.no_grad()
def assign(projection: Projection, layer: Any, readout: Any = None) -> None:
    """Make a layer (and its readout), as in `layer_projection`, compute this projection.

    Raises:
        InputError: a layer without a bias, or one that reads other taps.
    """
    if _concatenated(projection.maps).numel() != layer.weight.numel():
        raise InputError(
            f"a layer of weights {tuple(layer.weight.shape)} cannot hold a projection of taps {list(projection.maps)}:"
            " only heads that say widens = True may be given more taps than they read."
        )
    layer.weight.copy_(_concatenated(projection.maps).view_as(layer.weight))
    if layer.bias is None:
        raise InputError("a fold moves the bias: give the head's input layer a bias.")
    layer.bias.copy_(projection.bias)
    if readout is not None:
        readout.weight.copy_(_concatenated(projection.cls).view_as(readout.weight))


def _concatenated(weights: Mapping[int, Tensor]) -> Tensor:
    return torch.cat([weights[tap] for tap in sorted(weights)], 1)
