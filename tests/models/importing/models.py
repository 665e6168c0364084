"""Tiny models of the families that can be imported, saved as their users find them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    Dinov2Model,
    DPTConfig,
    DPTForDepthEstimation,
    DPTForSemanticSegmentation,
)

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
BACKBONE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 70,
    "mlp_ratio": 2,
}
NECK: dict[str, Any] = {"neck_hidden_sizes": [8, 12, 16, 24], "fusion_hidden_size": 16}
OUT: dict[str, Any] = {"out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}


def dinov2(apply_layernorm: bool = True) -> Dinov2Config:
    return Dinov2Config(**BACKBONE, **OUT, apply_layernorm=apply_layernorm)


def make(model: torch.nn.Module, folder: Path, base: torch.nn.Module | None = None) -> Path:
    """Save a model with random numbers everywhere; its backbone a small step from ``base``."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if base is not None:
            ours = dict(model.backbone.named_parameters())
            for name, value in base.named_parameters():
                ours[name].copy_(value + 0.05 * torch.randn_like(value))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": CLIP_MEAN, "image_std": [0.3] * 3}))
    return folder


def base() -> Dinov2Model:
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**BACKBONE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def depth_anything(folder: Path, sort: str = "relative", start: torch.nn.Module | None = None) -> Path:
    torch.manual_seed(1)
    config = DepthAnythingConfig(
        backbone_config=dinov2(),
        reassemble_hidden_size=32,
        patch_size=14,
        head_hidden_size=8,
        depth_estimation_type=sort,
        max_depth=1 if sort == "relative" else 20,
        **NECK,
    )
    return make(DepthAnythingForDepthEstimation(config), folder, start)


def dpt_depth(folder: Path, readout: str = "project") -> Path:
    torch.manual_seed(2)
    config = DPTConfig(
        backbone_config=dinov2(apply_layernorm=False),
        readout_type=readout,
        use_bias_in_fusion_residual=False,
        neck_ignore_stages=[],
        **NECK,
    )
    return make(DPTForDepthEstimation(config), folder)


def dpt_segmentation(folder: Path) -> Path:
    """DPT on a transformer of its own, as on the hub."""
    torch.manual_seed(3)
    config = DPTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        patch_size=16,
        image_size=64,
        backbone_out_indices=[0, 1, 2, 3],
        neck_ignore_stages=[],
        id2label={0: "wall", 1: "floor", 2: "cat"},
        label2id={"wall": 0, "floor": 1, "cat": 2},
        **NECK,
    )
    model = DPTForSemanticSegmentation(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return make(model, folder)
