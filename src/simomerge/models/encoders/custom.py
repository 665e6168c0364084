"""Custom encoders: any module that maps images to one map per tap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from simomerge.core.classes import class_path, settings_of
from simomerge.core.errors import InputError
from simomerge.models.encoders.encoder import Encoder
from simomerge.models.encoders.features import Features
from simomerge.models.encoders.layout import Layout


class ImageEncoder(Protocol):
    """What an ``nn.Module`` needs to be an encoder.

    It may also have ``has_cls = True`` if it returns `Features` with a CLS token per tap, and ``settings``, the keyword
    arguments that create it again. A model folder stores the settings together with the name of the class.

    Attributes:
        channels: Channels of each map it returns.
        strides: Pixels per place of each map. Images are padded to a multiple of the largest.
    """

    channels: Sequence[int]
    strides: Sequence[int]

    def __call__(self, images: Tensor) -> Sequence[Tensor] | Features:
        """Float images (B, 3, H, W), RGB in [0, 1] -> maps (B, C, h, w), or `Features` with CLS tokens."""


class CustomEncoder(Encoder):
    """An `Encoder` around an `ImageEncoder`; all its maps are tapped. `SimoModel` creates it when needed.

    Args:
        module: An `ImageEncoder`.

    Raises:
        InputError: The module has no ``channels`` or ``strides``, or not equally many.

    Example:
        >>> import torch
        >>> class Tiny(nn.Sequential):
        ...     channels, strides = (8,), (4,)
        ...     def forward(self, images):
        ...         return [super().forward(images)]
        >>> CustomEncoder(Tiny(nn.Conv2d(3, 8, 4, stride=4)))(torch.rand(2, 3, 30, 40)).maps[0].shape
        torch.Size([2, 8, 8, 10])
    """

    def __init__(self, module: nn.Module) -> None:
        channels, strides = (tuple(getattr(module, name, ())) for name in ("channels", "strides"))
        if not channels or len(channels) != len(strides):
            raise InputError(
                f"{type(module).__name__} has channels {list(channels)} and strides {list(strides)}."
                " A custom encoder needs both, one number for each map it returns."
            )
        layout = Layout(channels, strides, has_cls=bool(getattr(module, "has_cls", False)))
        super().__init__(module, range(1, len(channels) + 1), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), layout=layout)

    def around(self, backbone: nn.Module) -> CustomEncoder:
        return CustomEncoder(backbone)

    def describe(self) -> dict[str, Any]:
        """The entry ``encoder`` of simo.json: also the class and the arguments that create it again."""
        return {**super().describe(), "class": class_path(self.backbone), "settings": settings_of(self.backbone)}

    def _encode(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        given = self.backbone(images)
        maps, cls = (given.maps, given.cls) if isinstance(given, Features) else (given, ())
        name, found = type(self.backbone).__name__, tuple(each.shape[1] for each in maps)
        if bool(cls) != self.has_cls:
            gave = "gave" if cls else "gave no"
            raise InputError(f"{name} {gave} CLS tokens, but it declares has_cls = {self.has_cls}.")
        if found != self.channels:
            raise InputError(f"{name} gave maps of {found} channels, but it declares {self.channels}.")
        return tuple(maps), tuple(cls)
