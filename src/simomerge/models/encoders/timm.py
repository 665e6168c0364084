"""Models of timm as encoders. timm is optional; it needs torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simomerge.core.classes import register_encoder
from simomerge.core.errors import InputError
from simomerge.core.text import shown
from simomerge.models.encoders.encoder import IMAGENET_MEAN, IMAGENET_STD

PREFIX = "timm:"
"""Prefix of a timm model wherever a base can be given, as in ``timm:convnext_tiny``."""


@register_encoder
class TimmEncoder(nn.Module):
    """An `ImageEncoder` around a model of timm: its last four feature maps. The weights are random; see `fetched`.

    Args:
        name: The name of an architecture for ``timm.create_model``. Names of models on the hub or in a folder
            (``hf-hub:...``) are refused: a model folder may fetch nothing.
        mean, std: RGB normalisation; by default that of the architecture.

    Raises:
        InputError: Such a name, timm cannot be imported, or it gives no feature maps of this model.

    Example:
        >>> from simomerge.models.model import SimoModel
        >>> base = SimoModel(TimmEncoder.fetched("convnext_tiny"), {}, {})        # doctest: +SKIP
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        super().__init__()
        if _is_elsewhere(name):
            raise InputError(f"name {shown(name)}: a model folder can only name an architecture of timm.")
        given = {"mean": mean, "std": std}
        self.settings: dict[str, Any] = {"name": name, **{key: list(value) for key, value in given.items() if value}}
        self._set_up(_create(name, pretrained=False))

    @classmethod
    def fetched(cls, name: str) -> TimmEncoder:
        """The encoder with timm's weights, which timm downloads if it does not have them.

        Args:
            name: Any name for ``timm.create_model``.

        Raises:
            InputError: timm cannot be imported, or gives no feature maps of this model.
        """
        encoder, model = cls.__new__(cls), _create(name, pretrained=True)
        nn.Module.__init__(encoder)
        encoder.settings = {"name": name}  # a loaded model takes its weights from its folder
        if _is_elsewhere(name):  # its folder then names the architecture
            config = getattr(model, "pretrained_cfg", None) or {}
            known = {key: list(config[key]) for key in ("mean", "std") if config.get(key)}
            encoder.settings = {"name": str(config.get("architecture", name)), **known}
        encoder._set_up(model)
        return encoder

    def _set_up(self, model: Any) -> None:
        self.model = model
        info, config = model.feature_info, getattr(model, "pretrained_cfg", None) or {}
        self.channels: Sequence[int] = tuple(info.channels())[-4:]
        self.strides: Sequence[int] = tuple(info.reduction())[-4:]
        for what, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            values = torch.tensor(self.settings.get(what, config.get(what, default))).view(1, 3, 1, 1)
            self.register_buffer(what, values, persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Float images (B, 3, H, W), RGB in [0, 1] -> maps (B, C, h, w)."""
        maps = self.model((images - self.mean) / self.std)[-4:]
        # Some models of timm return (B, h, w, C).
        return [
            each if each.shape[1] == width else each.movedim(-1, 1)
            for each, width in zip(maps, self.channels, strict=True)
        ]


def _is_elsewhere(name: Any) -> bool:
    """Whether timm would look for a model of this name on the hub or in a folder."""
    return not isinstance(name, str) or any(mark in name for mark in (":", "/", "\\"))


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
