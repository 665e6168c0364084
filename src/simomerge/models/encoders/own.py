"""An encoder of the user's own: any module that maps images to one map per tap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from simomerge.core.classes import class_path, settings_of
from simomerge.core.errors import InputError
from simomerge.models.encoders.adapters import Adapters
from simomerge.models.encoders.anatomy import Anatomy
from simomerge.models.encoders.encoder import Encoder
from simomerge.models.encoders.features import Features


class ImageEncoder(Protocol):
    """What an ``nn.Module`` must have to be an encoder.

    Attributes:
        channels: of each map it gives.
        strides: pixels per place of each map; images are padded to a multiple of the largest.

    May have ``has_cls = True``, where it gives `Features` with a CLS token per tap, and ``settings``, the keyword
    arguments that make it again: a model folder holds them beside its class's name.
    """

    channels: Sequence[int]
    strides: Sequence[int]

    def __call__(self, images: Tensor) -> Sequence[Tensor] | Features:
        """Float images (B, 3, H, W), RGB in [0, 1] -> maps (B, C, h, w), or `Features` where there are CLS tokens."""


class OwnEncoder(Encoder):
    """An `Encoder` around such a module; all its maps are tapped. `SimoModel` makes it by itself.

    Args:
        module: an `ImageEncoder`.

    Raises:
        InputError: it lacks ``channels`` or ``strides``.

    Example:
        >>> import torch
        >>> class Tiny(nn.Sequential):
        ...     channels, strides = (8,), (4,)
        ...     def forward(self, images):
        ...         return [super().forward(images)]
        >>> OwnEncoder(Tiny(nn.Conv2d(3, 8, 4, stride=4)))(torch.rand(2, 3, 30, 40)).maps[0].shape
        torch.Size([2, 8, 8, 10])
    """

    def __init__(self, module: nn.Module) -> None:
        channels, strides = (tuple(getattr(module, name, ())) for name in ("channels", "strides"))
        if not channels or len(channels) != len(strides):
            raise InputError(
                f"{type(module).__name__} has channels {list(channels)} and strides {list(strides)}: an encoder of your"
                " own has both, one number for each map it gives."
            )
        has_cls = bool(getattr(module, "has_cls", False))
        anatomy = Anatomy((), (), (), channels, strides, None, has_cls, {})
        taps = range(1, len(channels) + 1)
        self._set_up(module, anatomy, tuple(taps), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), False)

    def describe(self) -> dict[str, Any]:
        """What simo.json says of it: its class and the arguments that make it again."""
        return {**super().describe(), "class": class_path(self.backbone), "settings": settings_of(self.backbone)}

    def add_adapters(self, rank: int = 16, activation: str = "none", last: int = 0) -> Adapters:
        """Not here: nothing is known of its blocks."""
        raise InputError(
            f"{type(self.backbone).__name__} is an encoder of your own, whose blocks are not known: adapters stand"
            " beside those of transformers' encoders; use fold, distill or heads."
        )

    def forward(self, images: Tensor) -> Features:
        """Encode float images (B, 3, H, W), RGB in [0, 1]."""
        height, width = images.shape[-2:]
        images = self._pad(images)
        given = self.backbone(images)
        maps, cls = (given.maps, given.cls) if isinstance(given, Features) else (given, ())
        if bool(cls) != self.has_cls:
            raise InputError(
                f"{type(self.backbone).__name__} {'gave' if cls else 'gave no'} CLS tokens and declares"
                f" has_cls = {self.has_cls}."
            )
        found = tuple(each.shape[1] for each in maps)
        if found != self.channels:
            raise InputError(
                f"{type(self.backbone).__name__} gave maps of {found} channels and declares {self.channels}."
            )
        return Features(tuple(maps), tuple(cls), (height, width), (images.shape[-2], images.shape[-1]))
