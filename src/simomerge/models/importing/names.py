"""DINOv2 names for tensors, and their names in transformers, which splits some tensors that DINOv2 stores as one."""

from __future__ import annotations

import re
from collections.abc import Container

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


def from_dinov2(name: str) -> list[str]:
    """The names in transformers of a tensor of DINOv2's own code (``blocks.0.attn.qkv.weight``).

    Queries, keys and values are one tensor in DINOv2 and three in transformers: equal parts of it along the first axis.
    Other names stay as they are.

    Example:
        >>> from_dinov2("blocks.3.norm1.bias"), len(from_dinov2("blocks.3.attn.qkv.bias"))
        (['encoder.layer.3.norm1.bias'], 3)
    """
    if found := _QKV.match(name):
        return [f"encoder.layer.{found[1]}.attention.attention.{part}.{found[2]}" for part in ("query", "key", "value")]
    for pattern, target in _RULES:
        name = pattern.sub(target, name)
    return [name]


def split_gate(name: str, known: Container[str]) -> list[str]:
    """The names in memory of a tensor on disk.

    The gate and the up projection of a SwiGLU DINOv2 (giant) are one tensor on disk and two in memory: its halves.

    Args:
        name: The name on disk.
        known: Canonical names of the module's tensors. If it has the one tensor, nothing is split.
    """
    found = _GATED.match(canonical_name(name))
    if not found or canonical_name(name) in known:
        return [name]
    return [f"{found[1]}.{part}.{found[2]}" for part in ("gate_proj", "up_proj")]
