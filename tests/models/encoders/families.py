"""A tiny random encoder of every family, made as its users would find it: a folder with a config and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

PLAIN: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 8,
    "image_size": 48,
}
DINO = {key: value for key, value in PLAIN.items() if key != "intermediate_size"}
CONV: dict[str, Any] = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1]}
WINDOWS: dict[str, Any] = {
    "embed_dim": 8,
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 2, 2, 4],
    "window_size": 2,
    "image_size": 64,
}
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 20,
}

TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dinov2": ("Dinov2Model", "Dinov2Config", DINO),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {**DINO, "num_register_tokens": 3},
    ),
    "dinov3_vit": ("DINOv3ViTModel", "DINOv3ViTConfig", {**PLAIN, "num_register_tokens": 4}),
    "dinov3_convnext": ("DINOv3ConvNextModel", "DINOv3ConvNextConfig", CONV),
    "vit": ("ViTModel", "ViTConfig", PLAIN),
    "vit_mae": (
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        {**PLAIN, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2},
    ),
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": TEXT, "vision_config": PLAIN}),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionConfig", PLAIN),
    "siglip": ("SiglipModel", "SiglipConfig", {"text_config": TEXT, "vision_config": PLAIN}),
    "siglip_vision_model": ("SiglipVisionModel", "SiglipVisionConfig", PLAIN),
    "beit": ("BeitModel", "BeitConfig", {**PLAIN, "use_relative_position_bias": True}),
    "deit": ("DeiTModel", "DeiTConfig", PLAIN),
    "swin": ("SwinModel", "SwinConfig", WINDOWS),
    "swinv2": ("Swinv2Model", "Swinv2Config", WINDOWS),
    "convnext": ("ConvNextModel", "ConvNextConfig", CONV),
    "convnextv2": ("ConvNextV2Model", "ConvNextV2Config", CONV),
    "resnet": (
        "ResNetModel",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 2, 1, 2]},
    ),
    "pvt_v2": (
        "PvtV2Model",
        "PvtV2Config",
        {**CONV, "num_attention_heads": [1, 2, 2, 4], "sr_ratios": [8, 4, 2, 1], "mlp_ratios": [2, 2, 2, 2]},
    ),
}
"""model_type -> class, configuration class and its arguments."""


def save_tiny(model_type: str, folder: Path) -> Path:
    """The folder of a tiny random model; parameters that start as zeros or ones are random too, so that they count."""
    model_class, config_class, arguments = TINY[model_type]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(len(model_type))
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**arguments))
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or "position" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
    return folder
