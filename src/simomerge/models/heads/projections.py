"""The first linear layers of a head as data, which is where a fold (closed-form re-alignment) changes the head.

Any head whose first layers are linear in the tokens can be folded. It declares them with two methods::

    def projections(self) -> list[Projection]: ...
    def with_projections(self, projections: list[Projection], moments: Moments) -> nn.Module: ...

The first describes the layers, the second returns a copy of the head that computes other projections. `Foldable` writes
both methods for heads whose first layers are 1x1 convolutions or linear layers. A cross-tap fold keeps to the taps that
a projection reads, unless the head sets ``widens = True`` to say that its projections may read more taps.
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
        maps: Tap -> weights (O, C_l) of its patch tokens. Taps are counted from 0, in the order of the Features.
        cls: Tap -> weights (O, C_l) of its CLS token.
        bias: (O,).
        grid: The tap that sets the size of u; other taps are resized to it.

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
        size = features.grid(self.grid)
        total = self.bias.float()[:, None, None]
        with torch.autocast(self.bias.device.type, enabled=False):
            for tap, weight in self.maps.items():
                patches = resize(features.maps[tap].float(), size)
                total = total + torch.einsum("oc,bchw->bohw", weight.float(), patches)
            for tap, weight in self.cls.items():
                total = total + (features.cls[tap].float() @ weight.float().T)[..., None, None]
        return total.expand(features.maps[0].shape[0], -1, *size)  # not len(): it makes the batch of an export fixed

    def split(self) -> list[Projection]:
        """One projection per tap; they add up to this one. The first has the bias."""
        parts = []
        for position, tap in enumerate(self.taps):
            bias = self.bias if position == 0 else torch.zeros_like(self.bias)
            maps, cls = ({tap: weights[tap]} if tap in weights else {} for weights in (self.maps, self.cls))
            parts.append(Projection(maps, cls, bias, self.grid))
        return parts

    def widened(self, channels: Sequence[int]) -> Projection:
        """The same function as a projection of all taps. Taps that it does not read get weights of zero.

        Args:
            channels: Channels of every tap.
        """
        rows = len(self.bias)
        blank = {tap: self.bias.new_zeros(rows, width) for tap, width in enumerate(channels)}
        return Projection({**blank, **self.maps}, {**blank, **self.cls} if self.cls else {}, self.bias, self.grid)


def joined(parts: Sequence[Projection]) -> Projection:
    """The sum of projections, as one projection."""
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
    """Tap -> mean and variance (C_l,) of every channel that a head will read, for heads that normalise their input."""

    maps: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    cls: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class InputLayer:
    """A first layer of a head: a 1x1 convolution or linear layer on the concatenated channels of some taps.

    Attributes:
        layer: ``nn.Conv2d`` of kernel 1, or ``nn.Linear``.
        taps: The taps it reads, in the order of its input channels.
        readout: A layer of the same kind for the CLS tokens of these taps, whose output is added. It has no bias.
        grid: The tap that sets the size of the output.
        channels: Channels of every tap of the encoder. Not needed if the taps it reads have equal width.
        paired: Its input has the CLS token's channels after each tap's own.

    Example:
        >>> InputLayer(nn.Conv2d(8, 3, 1), [2]).projection().maps[2].shape
        torch.Size([3, 8])
    """

    layer: Any
    taps: Sequence[int]
    readout: Any = None
    grid: int = 0
    channels: Sequence[int] = ()
    paired: bool = False

    def projection(self) -> Projection:
        """The projection that the layer computes."""
        weight, bias, repeats = self.layer.weight.flatten(1), self.layer.bias, 2 if self.paired else 1
        equal = weight.shape[1] // (len(self.taps) * repeats)
        widths = [self.channels[tap] if self.channels else equal for tap in self.taps]
        pieces = weight.split([width for width in widths for _ in range(repeats)], 1)
        maps = dict(zip(self.taps, pieces[::repeats], strict=True))
        cls = dict(zip(self.taps, pieces[1::2], strict=True)) if self.paired else {}
        if self.readout is not None:
            cls = dict(zip(self.taps, self.readout.weight.flatten(1).split(widths, 1), strict=True))
        return Projection(maps, cls, weight.new_zeros(len(weight)) if bias is None else bias, self.grid)

    @torch.no_grad()
    def assign(self, projection: Projection) -> None:
        """Make the layer compute a projection.

        Raises:
            InputError: The layer has no bias, or it reads other taps.
        """
        sources = (projection.maps, projection.cls) if self.paired else (projection.maps,)
        order = list(self.taps) if set(self.taps) == set(projection.maps) else sorted(projection.maps)
        weight = torch.cat([source[tap] for tap in order for source in sources], 1)
        if weight.numel() != self.layer.weight.numel():
            raise InputError(
                f"a layer with weights {tuple(self.layer.weight.shape)} cannot hold a projection of taps"
                f" {list(projection.maps)}. Only heads with widens = True may be given more taps than they read."
            )
        if self.layer.bias is None:
            raise InputError("a fold changes the bias: give the head's input layer a bias.")
        self.layer.weight.copy_(weight.view_as(self.layer.weight))
        self.layer.bias.copy_(projection.bias)
        if self.readout is not None:
            readout = torch.cat([projection.cls[tap] for tap in order], 1)
            self.readout.weight.copy_(readout.view_as(self.readout.weight))


class Foldable:
    """Base class of heads whose first layers are 1x1 convolutions or linear layers on taps, so they can be folded.

    Set ``reads``, or override `input_layers` for layers that also read CLS tokens.

    Attributes:
        reads: Name of a first layer -> the taps it reads (counted from 0), concatenated. The first sets the size of the
            output.
        in_channels: Channels of every tap. Needed if a layer reads taps of different width.

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
    in_channels: Sequence[int] = ()

    def input_layers(self) -> list[InputLayer]:
        """The head's first layers; those in ``reads`` by default."""
        assert isinstance(self, nn.Module)
        layers = []
        widths = () if isinstance(self.in_channels, int) else self.in_channels  # a number if the head is a convolution
        for name, taps in self.reads.items():
            try:
                layer = self.get_submodule(name)
            except AttributeError as error:
                raise InputError(
                    f"{type(self).__name__}.reads names {name!r}, but the head has no such layer."
                ) from error
            layers.append(InputLayer(layer, taps, grid=taps[0], channels=widths))
        return layers

    def projections(self) -> list[Projection]:
        """One projection per first layer."""
        return [layer.projection() for layer in self.input_layers()]

    def with_projections(self, projections: list[Projection], moments: Moments) -> Any:
        """A copy of the head whose first layers compute these projections."""
        head = copy.deepcopy(self)
        for layer, projection in zip(head.input_layers(), projections, strict=True):
            layer.assign(projection)
        return head


def is_foldable(head: nn.Module) -> bool:
    """Whether a head declares its projections."""
    return all(callable(getattr(head, name, None)) for name in ("projections", "with_projections"))


def input_projections(head: Any, name: str = "") -> list[Projection]:
    """The projections that a head declares, without gradients.

    Raises:
        InputError: It declares none; the message says how to.
    """
    if not is_foldable(head):
        raise InputError(
            f"head {name or type(head).__name__!r} ({type(head).__name__}) does not declare its input projections, so"
            " nothing can be folded into it. Give its class projections() and with_projections(), see"
            " simomerge.models.heads.projections, or re-align with method='distill'."
        )
    return [
        Projection(_detached(each.maps), _detached(each.cls), each.bias.detach(), each.grid)
        for each in head.projections()
    ]


def _detached(weights: Mapping[int, Tensor]) -> dict[int, Tensor]:
    return {tap: weight.detach() for tap, weight in weights.items()}
