"""Where an encoder of transformers has its blocks, what can be tapped, and at which strides."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import Any

from torch import nn

from simomerge.core.errors import InputError


@dataclass(frozen=True)
class Anatomy:
    """The parts of a backbone that an `Encoder` works with.

    Attributes:
        blocks: the residual blocks that keep the shape of their input: an adapter may stand beside each.
        widths: channels of each block.
        tapped: the modules whose output can be tapped: the blocks of a plain transformer, the ends of the stages of
            a pyramid.
        channels, strides: of each tapped output; pixels per place.
        norm: the final layer norm that fits every tapped output, or None.
        has_cls: whether the first token is a CLS token.
        prefix: tokens before the patches: CLS, registers, DeiT's distillation token.
        arguments: keyword arguments of every forward pass.
        smallest: pixels that each side must have at least.
        windows: blocks of shifted windows with their shift and size, which Swin forgets on small images.
    """

    blocks: Sequence[nn.Module]
    widths: Sequence[int]
    tapped: Sequence[nn.Module]
    channels: Sequence[int]
    strides: Sequence[int]
    norm: nn.Module | None
    has_cls: bool
    arguments: dict[str, Any]
    prefix: int = 0
    smallest: int = 1
    windows: Sequence[tuple[Any, Any, Any]] = field(default_factory=tuple)


def dissect(backbone: nn.Module) -> Anatomy:
    """Find the parts of a backbone by its structure.

    Raises:
        InputError: it has neither a list of blocks nor stages of blocks.
    """
    stages = _stages(backbone)
    return _pyramid(backbone, stages) if stages else _plain(backbone)


def is_plain(backbone: nn.Module) -> bool:
    """Whether all blocks give maps of one stride."""
    return not _stages(backbone)


def _plain(backbone: Any) -> Anatomy:
    config = backbone.config
    blocks = _block_list(backbone)
    core = getattr(backbone, "vision_model", backbone)  # a wrapper of transformers before 5
    norms = [getattr(core, name, None) for name in ("layernorm", "norm", "post_layernorm", "layer_norm")]
    embeddings = getattr(core, "embeddings", core)
    width = int(config.hidden_size)
    has_cls = any(getattr(embeddings, name, None) is not None for name in ("cls_token", "class_embedding"))
    distils = getattr(embeddings, "distillation_token", None) is not None
    return Anatomy(
        blocks,
        [width] * len(blocks),
        blocks,
        [width] * len(blocks),
        [int(config.patch_size)] * len(blocks),
        next((norm for norm in norms if norm is not None), None),
        has_cls,
        _arguments(backbone),
        prefix=has_cls + distils + int(getattr(config, "num_register_tokens", 0)),
    )


def _pyramid(backbone: Any, stages: Sequence[Any]) -> Anatomy:
    config = backbone.config
    widths = getattr(config, "hidden_sizes", None) or [config.embed_dim * 2**stage for stage in range(len(stages))]
    pairs = [
        (block, int(width))
        for stage, width in zip(stages, widths, strict=True)
        for block in _inside(stage)
        if isinstance(getattr(block, "shortcut", nn.Identity()), nn.Identity)  # ResNet's others change the shape
    ]
    strides = _pyramid_strides(config, len(stages))
    windows = [(b, b.shift_size, b.window_size) for b, _ in pairs if hasattr(b, "set_shift_and_window_size")]
    return Anatomy(
        [block for block, _ in pairs],
        [width for _, width in pairs],
        # PVT v2 normalises at the end of a stage; all others end with a block.
        [getattr(stage, "layer_norm", None) or _inside(stage)[-1] for stage in stages],
        [int(width) for width in widths],
        strides,
        None,
        False,
        _arguments(backbone),
        smallest=strides[-1] * int(config.window_size) if windows else 1,
        windows=windows,
    )


def _stages(backbone: nn.Module) -> list[nn.Module]:
    """The stages of a pyramid: the list of modules each of which holds a list of blocks."""
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and all(_inside(stage) for stage in module):
            return list(module)
    return []


def _inside(stage: nn.Module) -> list[nn.Module]:
    for name in ("blocks", "layers"):
        inner = getattr(stage, name, None)
        if isinstance(inner, (nn.ModuleList, nn.Sequential)):
            return list(inner)
    return []


def _pyramid_strides(config: Any, stages: int) -> list[int]:
    if hasattr(config, "strides"):  # PVT v2
        return list(accumulate((int(stride) for stride in config.strides), mul))
    first = int(getattr(config, "patch_size", 4))
    return [first * 2 ** (stage + bool(getattr(config, "downsample_in_first_stage", False))) for stage in range(stages)]


def _block_list(backbone: Any) -> list[nn.Module]:
    depth = getattr(backbone.config, "num_hidden_layers", None)
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return list(module)
    raise InputError(
        f"{type(backbone).__name__}: found no list of {depth} blocks, and no stages of blocks;"
        " give a vision encoder that `simomerge encoders` lists."
    )


def _arguments(backbone: nn.Module) -> dict[str, Any]:
    """Images of any size: those that learned position embeddings of one size must be told to resize them."""
    known = inspect.signature(backbone.forward).parameters
    return {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in known else {}
