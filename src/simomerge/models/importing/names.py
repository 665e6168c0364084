"""The names that DINOv2's own code gives its tensors, as transformers' names."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping

import torch

from simomerge.checkpoints import canonical_name

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


_GATED = re.compile(r"^(encoder\.layer\.\d+\.mlp)\.weights_in\.(weight|bias)$")


def split_gates(
    tensors: Mapping[str, torch.Tensor], stored_as: Mapping[str, str], wanted: Container[str]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The input of a SwiGLU DINOv2 (giant), one tensor on disk, as the gate and the up projection it is in memory.

    Args:
        tensors, stored_as: see `from_dinov2`.
        wanted: names that the module has; where it has the one tensor, nothing is changed.
    """
    split: dict[str, torch.Tensor] = {}
    stored: dict[str, str] = {}
    for name, tensor in tensors.items():
        found = _GATED.match(canonical_name(name))
        if not found or canonical_name(name) in wanted:
            split[name], stored[name] = tensor, stored_as[name]
            continue
        for part, piece in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
            new = f"{found[1]}.{part}.{found[2]}"
            split[new], stored[new] = piece, stored_as[name]
    return split, stored


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
