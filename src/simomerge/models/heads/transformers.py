"""The heads of Depth Anything and DPT as transformers has them, on Features of any plain encoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simomerge.core.errors import InputError
from simomerge.models.encoders import Features
from simomerge.models.heads.projections import Moments, Projection, assign, layer_projection


class TransformersHead(nn.Module):
    """Neck and head of DepthAnythingForDepthEstimation, DPTForDepthEstimation or DPTForSemanticSegmentation.

    Sources: "Depth Anything" (arXiv 2401.10891), "Vision Transformers for Dense Prediction" (arXiv 2103.13413).

    Args:
        in_channels: of each tap.
        out_channels: of the task.
        architecture: one of the three names.
        config: what differs from the defaults of the architecture's configuration class, as plain data.
        offset: added to the output (DINOv2's own depth heads add their least depth).

    Raises:
        InputError: another architecture, or taps that the configuration does not fit.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        architecture: str,
        config: Mapping[str, Any] = MappingProxyType({}),
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {"architecture": architecture, "config": dict(config), "offset": offset}
        self.offset = offset
        built = _configuration(architecture, config, in_channels[0])
        if len(built.neck_hidden_sizes) != len(in_channels):
            raise InputError(f"{architecture} reads {len(built.neck_hidden_sizes)} taps, not {len(in_channels)}.")
        channels = built.num_labels if architecture == "DPTForSemanticSegmentation" else 1
        if channels != out_channels:
            raise InputError(f"{architecture} gives {channels} channels, the task has {out_channels}.")
        self.readout = getattr(built, "readout_type", "ignore")
        self.neck, self.head = _modules(architecture, built)
        self.wants_grid = architecture == "DepthAnythingForDepthEstimation"

    def forward(self, features: Features) -> Tensor:
        """Features -> logits (B, C, H, W) at the padded size."""
        height, width = features.maps[0].shape[-2:]
        hidden = self.neck(_tokens(features), height, width)
        if self.wants_grid:
            self.head.patch_size = features.padded_size[0] / height  # it multiplies the grid by it
            logits = self.head(hidden, height, width)
        else:
            logits = self.head(hidden)
        logits = logits[:, None] if logits.ndim == 3 else logits
        if logits.shape[-2:] != features.padded_size:
            logits = F.interpolate(logits, features.padded_size, mode="bilinear", align_corners=False)
        return logits + self.offset

    def projections(self) -> list[Projection]:
        """One per tap: the readout layer where it has one, else the neck's 1x1 convolution."""
        found = []
        for tap, layer in enumerate(self._first_layers()):
            if self.readout != "project":
                found.append(layer_projection(layer, [tap], grid=tap))
                continue
            patches, cls = layer.weight.chunk(2, 1)  # of each patch's token, with the CLS token behind it
            found.append(Projection({tap: patches}, {tap: cls}, layer.bias, tap))
        return found

    @torch.no_grad()
    def with_projections(self, projections: list[Projection], moments: Moments) -> TransformersHead:
        """A copy that computes these."""
        head = copy.deepcopy(self)
        for tap, (layer, projection) in enumerate(zip(head._first_layers(), projections, strict=True)):
            if self.readout != "project":
                assign(projection, layer)
                continue
            layer.weight.copy_(torch.cat([projection.maps[tap], projection.cls[tap]], 1))
            layer.bias.copy_(projection.bias)
        return head

    def _first_layers(self) -> list[Any]:
        stage = self.neck.reassemble_stage
        if self.readout == "project":
            return [readout[0] for readout in stage.readout_projects]
        if self.readout == "add":
            raise InputError(
                "this DPT adds the CLS token to the patches before its first layer, so nothing can be folded into that:"
                " re-align with method='distill' or 'heads'."
            )
        return [layer.projection for layer in stage.layers]


def _configuration(architecture: str, config: Mapping[str, Any], width: int) -> Any:
    import transformers

    classes = {
        "DepthAnythingForDepthEstimation": "DepthAnythingConfig",
        "DPTForDepthEstimation": "DPTConfig",
        "DPTForSemanticSegmentation": "DPTConfig",
    }
    if architecture not in classes:
        raise InputError(f"architecture {architecture!r}: choose one of {', '.join(classes)}.")
    backbone = transformers.Dinov2Config(hidden_size=width)
    built = getattr(transformers, classes[architecture])(**{**config, "backbone_config": backbone})
    built.reassemble_hidden_size = width
    if getattr(built, "is_hybrid", False):
        raise InputError("DPT hybrids read a convolutional encoder beside the transformer: they cannot be merged here.")
    built.neck_ignore_stages = []
    return built


def _modules(architecture: str, config: Any) -> tuple[Any, Any]:
    if architecture == "DepthAnythingForDepthEstimation":
        from transformers.models.depth_anything import modeling_depth_anything as anything

        return anything.DepthAnythingNeck(config), anything.DepthAnythingDepthEstimationHead(config)
    from transformers.models.dpt import modeling_dpt as dpt

    segments = architecture == "DPTForSemanticSegmentation"
    return dpt.DPTNeck(config), (dpt.DPTSemanticSegmentationHead if segments else dpt.DPTDepthEstimationHead)(config)


def _tokens(features: Features) -> list[Tensor]:
    """Per tap (B, 1 + N, C): the CLS token, or zeros where there is none, before the patches."""
    cls = features.cls or tuple(each.new_zeros(each.shape[:2]) for each in features.maps)
    return [
        torch.cat([first[:, None], each.flatten(2).transpose(1, 2)], 1)
        for first, each in zip(cls, features.maps, strict=True)
    ]
