"""Models of timm as encoders. timm is optional; it needs torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simomerge.core.classes import register_encoder
from simomerge.core.errors import InputError
from simomerge.models.encoders.encoder import IMAGENET_MEAN, IMAGENET_STD

PREFIX = "timm:"
"""Prefix of a timm model wherever a base can be given, as in ``timm:convnext_tiny``."""


@register_encoder
class TimmEncoder(nn.Module):
    """An `ImageEncoder` around a model of timm: its last four feature maps.

    Args:
        name: The name for ``timm.create_model``.
        pretrained: Download and use timm's weights.

    Raises:
        InputError: timm cannot be imported, or gives no feature maps of this model.

    Example:
        >>> from simomerge.models.model import SimoModel
        >>> base = SimoModel(TimmEncoder("convnext_tiny", pretrained=True), {}, {})        # doctest: +SKIP
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, pretrained: bool = False) -> None:
        super().__init__()
        self.settings = {"name": name}  # a loaded model takes its weights from its folder
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
        # Some models of timm return (B, h, w, C).
        return [
            each if each.shape[1] == width else each.movedim(-1, 1)
            for each, width in zip(maps, self.channels, strict=True)
        ]


def _create(name: str, pretrained: bool) -> Any:
    try:
        import timm
    except ImportError as error:
        raise InputError(f"{PREFIX}{name}: timm cannot be imported ({error}); pip install timm torchvision.") from error
    try:
        try:
            # Transformers of timm need this option for other image sizes than their own; other models reject it.
            return timm.create_model(name, pretrained=pretrained, features_only=True, dynamic_img_size=True)
        except TypeError:
            return timm.create_model(name, pretrained=pretrained, features_only=True)
    except (RuntimeError, OSError, AttributeError, AssertionError) as error:
        raise InputError(f"{PREFIX}{name}: timm gives no feature maps of this model ({error}).") from error
