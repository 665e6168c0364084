"""The names that DINOv2's own code gives its tensors, as transformers' names."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

_RULES = [
    (re.compile(pattern), target)
    for pattern, target in (
        (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
        (r"^pos_embed$", r"embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", r"embeddings.patch_embeddings.projection."),
        (r"^norm\.", r"layernorm."),
        (r"^blocks\.(?:\d+\.)?(\d+)\.ls([12])\.gamma$", r"encoder.layer.\1.layer_scale\2.lambda1"),
        (r"^blocks\.(?:\d+\.)?(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
        (r"^blocks\.(?:\d+\.)?(\d+)\.mlp\.w12\.", r"encoder.layer.\1.mlp.weights_in."),
        (r"^blocks\.(?:\d+\.)?(\d+)\.mlp\.w3\.", r"encoder.layer.\1.mlp.weights_out."),
        (r"^blocks\.(?:\d+\.)?(\d+)\.(norm[12]|mlp)\.", r"encoder.layer.\1.\2."),
    )
]
_QKV = re.compile(r"^blocks\.(?:\d+\.)?(\d+)\.attn\.qkv\.(weight|bias)$")


def from_dinov2(
    tensors: Mapping[str, torch.Tensor], stored_as: Mapping[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors under DINOv2's names (``blocks.0.attn.qkv.weight``) under transformers'; others stay as they are.

    Queries, keys and values, one tensor there, are three here.

    Args:
        tensors: by name.
        stored_as: name -> what it is called in the file.

    Returns:
        Both, by their new names.
    """
    renamed: dict[str, torch.Tensor] = {}
    stored: dict[str, str] = {}
    for name, tensor in tensors.items():
        if found := _QKV.match(name):
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                new = f"encoder.layer.{found[1]}.attention.attention.{part}.{found[2]}"
                renamed[new], stored[new] = piece, stored_as[name]
            continue
        new = name
        for pattern, target in _RULES:
            new = pattern.sub(target, new)
        renamed[new], stored[new] = tensor, stored_as[name]
    return renamed, stored
