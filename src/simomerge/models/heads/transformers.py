"""The heads of Depth Anything and DPT in transformers, on the Features of any plain encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from simomerge.core.errors import InputError
from simomerge.core.text import shown
from simomerge.models.encoders import Features
from simomerge.models.encoders.other_models import check_no_other_model
from simomerge.models.heads.projections import Foldable, InputLayer

ARCHITECTURES = {
    "DepthAnythingForDepthEstimation": ("DepthAnything", "depth_anything", "DepthAnythingDepthEstimationHead"),
    "DPTForDepthEstimation": ("DPT", "dpt", "DPTDepthEstimationHead"),
    "DPTForSemanticSegmentation": ("DPT", "dpt", "DPTSemanticSegmentationHead"),
}
"""Architecture -> prefix of its configuration and neck classes, its module in transformers, and its head class."""


class TransformersHead(Foldable, nn.Module):
    """Neck and head of DepthAnythingForDepthEstimation, DPTForDepthEstimation or DPTForSemanticSegmentation.

    Sources: "Depth Anything" (arXiv 2401.10891), "Vision Transformers for Dense Prediction" (arXiv 2103.13413).

    Args:
        in_channels: Channels of each tap.
        out_channels: Channels of the task.
        architecture: One of the three names.
        config: Arguments of the architecture's configuration class that differ from its defaults, as plain data.
        offset: Added to the output. DINOv2's own depth heads add their minimum depth.
        limit: The smallest and the largest output, which is clamped before it is resized to the image. As in DINOv2,
            nothing is clamped in training, where it would have no gradient.

    Raises:
        InputError: Another architecture, a limit that is no two rising numbers, or taps or channels that do not fit the
            configuration.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        architecture: str,
        config: Mapping[str, Any] = MappingProxyType({}),
        offset: float = 0.0,
        limit: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {"architecture": architecture, "config": dict(config), "offset": offset}
        self.offset, self.limit = offset, limit
        if limit is not None:
            if len(limit) != 2 or not limit[0] < limit[1]:
                raise InputError(f"limit is {shown(limit)}: give the smallest and the largest output.")
            self.settings["limit"] = [float(value) for value in limit]
        built = _configuration(architecture, config, in_channels[0])
        if len(built.neck_hidden_sizes) != len(in_channels):
            raise InputError(f"{architecture} reads {len(built.neck_hidden_sizes)} taps, not {len(in_channels)}.")
        channels = built.num_labels if architecture == "DPTForSemanticSegmentation" else 1
        if channels != out_channels:
            raise InputError(f"{architecture} gives {channels} channels, but the task has {out_channels}.")
        self.readout = getattr(built, "readout_type", "ignore")
        prefix, module, head_class = ARCHITECTURES[architecture]
        modeling = import_module(f"transformers.models.{module}.modeling_{module}")
        self.neck: Any = getattr(modeling, f"{prefix}Neck")(built)
        self.head: Any = getattr(modeling, head_class)(built)
        self.wants_grid = architecture == "DepthAnythingForDepthEstimation"

    def forward(self, features: Features) -> Tensor:
        """Features -> logits (B, C, H, W) at the padded size."""
        height, width = features.grid(0)
        hidden = self.neck(_tokens(features), height, width)
        if self.wants_grid:
            self.head.patch_size = features.padded_size[0] / height  # the head multiplies the grid by its patch size
            logits = self.head(hidden, height, width)
        else:
            logits = self.head(hidden)
        logits = (logits[:, None] if logits.ndim == 3 else logits) + self.offset
        if self.limit is not None and not self.training:
            logits = logits.clamp(self.limit[0], self.limit[1])
        if logits.shape[-2:] != features.padded_size:
            logits = interpolate(logits, features.padded_size, mode="bilinear", align_corners=False)
        return logits

    def input_layers(self) -> list[InputLayer]:
        """One per tap: the readout layer if there is one, otherwise the 1x1 convolution of the neck."""
        stage = self.neck.reassemble_stage
        if self.readout == "add":
            raise InputError(
                "this DPT adds the CLS token to the patches before its first layer, so nothing can be folded into it."
                " Re-align with method='distill' or 'heads'."
            )
        if self.readout == "project":
            layers = [readout[0] for readout in stage.readout_projects]
        else:
            layers = [layer.projection for layer in stage.layers]
        paired = self.readout == "project"
        return [InputLayer(layer, [tap], grid=tap, paired=paired) for tap, layer in enumerate(layers)]


def check_not_hybrid(config: Any, where: str = "") -> None:
    """Raise InputError for the configuration of a DPT hybrid; ``where`` begins the message."""
    if getattr(config, "is_hybrid", False):
        raise InputError(
            f"{where}DPT hybrids read a convolutional encoder in addition to the transformer; they are not supported."
        )


def _configuration(architecture: str, config: Mapping[str, Any], width: int) -> Any:
    import transformers

    if architecture not in ARCHITECTURES:
        raise InputError(f"architecture {architecture!r}: choose one of {', '.join(ARCHITECTURES)}.")
    check_no_other_model(architecture, config)
    backbone = transformers.Dinov2Config(hidden_size=width)
    config_class = getattr(transformers, f"{ARCHITECTURES[architecture][0]}Config")
    built = config_class(**{**config, "backbone_config": backbone})
    check_not_hybrid(built)
    built.reassemble_hidden_size = width
    built.neck_ignore_stages = []
    return built


def _tokens(features: Features) -> list[Tensor]:
    """Tokens (B, 1 + N, C) per tap: the CLS token, or zeros if there is none, and then the patches."""
    cls = features.cls or tuple(each.new_zeros(each.shape[:2]) for each in features.maps)
    return [
        torch.cat([first[:, None], each.flatten(2).transpose(1, 2)], 1)
        for first, each in zip(cls, features.maps, strict=True)
    ]
