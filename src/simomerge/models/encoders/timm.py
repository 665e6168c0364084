"""Models of timm, where timm imports (it needs torchvision), as encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simomerge.core.errors import InputError
from simomerge.models.encoders.encoder import IMAGENET_MEAN, IMAGENET_STD

PREFIX = "timm:"
"""Before a name of timm's where a base is asked for, as ``timm:convnext_tiny``."""


class TimmEncoder(nn.Module):
    """An `ImageEncoder` around a model of timm: its last four feature maps.

    Args:
        name: as ``timm.create_model`` takes it.
        pretrained: with timm's weights, which it downloads.

    Raises:
        InputError: timm is not installed or does not import, or has no feature maps of this model.

    Example:
        >>> from simomerge.models.model import SimoModel
        >>> base = SimoModel(TimmEncoder("convnext_tiny", pretrained=True), {}, {})        # doctest: +SKIP
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, pretrained: bool = False) -> None:
        super().__init__()
        self.settings = {"name": name}  # weights come from the model folder when it is made again
        self.model = _create(name, pretrained)
        info, config = self.model.feature_info, getattr(self.model, "pretrained_cfg", None) or {}
        self.channels: Sequence[int] = tuple(info.channels())[-4:]
        self.strides: Sequence[int] = tuple(info.reduction())[-4:]
        for what, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            values = torch.tensor(config.get(what, default)).view(1, 3, 1, 1)
            self.register_buffer(what, values, persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Float images (B, 3, H, W), RGB in [0, 1] -> maps (B, C, h, w)."""
        maps = self.model((images - self.mean) / self.std)[-4:]
        # Some of timm's models give (B, h, w, C).
        return [
            each if each.shape[1] == width else each.movedim(-1, 1)
            for each, width in zip(maps, self.channels, strict=True)
        ]


def _create(name: str, pretrained: bool) -> Any:
    try:
        import timm
    except ImportError as error:
        raise InputError(
            f"{PREFIX}{name}: timm does not import here ({error}); pip install timm torchvision."
        ) from error
    try:
        try:
            # Transformers of timm take other sizes than their own only when asked to; other models know no such thing.
            return timm.create_model(name, pretrained=pretrained, features_only=True, dynamic_img_size=True)
        except TypeError:
            return timm.create_model(name, pretrained=pretrained, features_only=True)
    except (RuntimeError, OSError, AttributeError, AssertionError) as error:
        raise InputError(f"{PREFIX}{name}: timm gives no feature maps of it ({error}).") from error
