"""Find the blocks of a transformers encoder, the outputs that can be tapped, and their strides."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import mul
from typing import Any

from torch import nn

from simomerge.core.errors import InputError


@dataclass(frozen=True)
class BlockShape:
    """What a block does to the shape of its input, which is a map (B, C, h, w) or tokens (B, N, C).

    Attributes:
        before, after: Channels of input and output.
        stride: Height of the input over height of the output. Zero if it is no whole number, if tokens differ in their
            number, or if a map becomes tokens.

    Example:
        >>> BlockShape.between((1, 16, 8, 8), (1, 32, 4, 4))
        BlockShape(before=16, after=32, stride=2)
    """

    before: int
    after: int
    stride: int = 1

    @classmethod
    def between(cls, before: Sequence[int], after: Sequence[int]) -> BlockShape:
        """From the shapes of input and output."""
        channels_in, channels_out = (shape[1] if len(shape) == 4 else shape[2] for shape in (before, after))
        places = [shape[2:] if len(shape) == 4 else shape[1:2] for shape in (before, after)]
        strides = {b // a if b % a == 0 else 0 for b, a in zip(*places, strict=False)}
        fits = len(before) == len(after) and len(strides) == 1 and (len(before) == 4 or strides == {1})
        return cls(channels_in, channels_out, strides.pop() if fits else 0)


@dataclass(frozen=True)
class Layout:
    """The modules and sizes of a backbone that an `Encoder` needs to know.

    Attributes:
        channels: Channels of each output that can be tapped.
        strides: Pixels per place of each output that can be tapped.
        tapped: The modules that give these outputs: the blocks of a plain transformer, or the last module of each
            stage of a pyramid.
        blocks: The blocks that can get an adapter: those that keep the shape of their input, or the ones that an
            encoder of one's own declares.
        shapes: What each block does to the shape of its input; empty if that is not known before a forward pass.
        names: Names of the blocks in the backbone, if its class declares them. Other encoders have numbered blocks.
        norm: The final layer norm, if it fits every tapped output.
        has_cls: Whether the first token is a CLS token.
        prefix: Number of tokens before the patches: CLS, registers, and DeiT's distillation token.
        arguments: Keyword arguments of every forward pass.
        smallest: Minimum height and width of an image in pixels.
        windows: Blocks with shifted windows, each with its shift and window size. Swin changes both on small images
            and does not restore them.
        units: The modules between which a tree of shared blocks can split: the blocks of a plain transformer, the
            stages of a pyramid, or the blocks that an encoder of one's own declares. They run one after the other, and
            the hidden states are their first argument.
    """

    channels: Sequence[int]
    strides: Sequence[int]
    tapped: Sequence[nn.Module] = ()
    blocks: Sequence[nn.Module] = ()
    shapes: Sequence[BlockShape] = ()
    names: Sequence[str] = ()
    norm: nn.Module | None = None
    has_cls: bool = False
    prefix: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)
    smallest: int = 1
    windows: Sequence[tuple[Any, Any, Any]] = ()
    units: Sequence[nn.Module] = ()

    @property
    def is_pyramid(self) -> bool:
        """Whether the maps differ in stride. Taps then count stages instead of blocks."""
        return len(set(self.strides)) > 1

    @property
    def unit(self) -> str:
        """What messages call one of the units: "stage" in a pyramid, "block" elsewhere."""
        return "stage" if self.is_pyramid and not self.names else "block"


def find_layout(backbone: Any) -> Layout:
    """Find the layout of a backbone from its structure.

    Raises:
        InputError: It has neither a list of blocks nor stages of blocks.
    """
    # Models with learned position embeddings of one size resize them only on request.
    known = inspect.signature(backbone.forward).parameters
    arguments = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in known else {}
    stages = _stages(backbone)
    found = _pyramid(backbone.config, stages, arguments) if stages else _plain(backbone, arguments)
    return replace(found, units=stages or found.blocks)


def _plain(backbone: Any, arguments: dict[str, Any]) -> Layout:
    config = backbone.config
    blocks = _block_list(backbone)
    core = getattr(backbone, "vision_model", backbone)  # a wrapper in transformers 4
    norms = [getattr(core, name, None) for name in ("layernorm", "norm", "post_layernorm", "layer_norm")]
    embeddings = getattr(core, "embeddings", core)
    widths = [int(config.hidden_size)] * len(blocks)
    has_cls = any(getattr(embeddings, name, None) is not None for name in ("cls_token", "class_embedding"))
    has_distillation = getattr(embeddings, "distillation_token", None) is not None
    return Layout(
        channels=widths,
        strides=[int(config.patch_size)] * len(blocks),
        tapped=blocks,
        blocks=blocks,
        shapes=[BlockShape(width, width) for width in widths],
        # The norm of BEiT with mean pooling is an identity; the trained one lies in its pooler.
        norm=next((norm for norm in norms if norm is not None and not isinstance(norm, nn.Identity)), None),
        has_cls=has_cls,
        prefix=has_cls + has_distillation + int(getattr(config, "num_register_tokens", 0)),
        arguments=arguments,
    )


def _pyramid(config: Any, stages: Sequence[Any], arguments: dict[str, Any]) -> Layout:
    channels = getattr(config, "hidden_sizes", None) or [config.embed_dim * 2**stage for stage in range(len(stages))]
    pairs = [
        (block, int(width))
        for stage, width in zip(stages, channels, strict=True)
        for block in _blocks_of(stage)
        if isinstance(getattr(block, "shortcut", nn.Identity()), nn.Identity)  # other ResNet blocks change the shape
    ]
    strides = _pyramid_strides(config, len(stages))
    windows = [(b, b.shift_size, b.window_size) for b, _ in pairs if hasattr(b, "set_shift_and_window_size")]
    return Layout(
        channels=[int(width) for width in channels],
        strides=strides,
        # A stage of PVT v2 ends with a layer norm, all others end with a block.
        tapped=[getattr(stage, "layer_norm", None) or _blocks_of(stage)[-1] for stage in stages],
        blocks=[block for block, _ in pairs],
        shapes=[BlockShape(width, width) for _, width in pairs],
        arguments=arguments,
        smallest=strides[-1] * int(config.window_size) if windows else 1,
        windows=windows,
    )


def _stages(backbone: nn.Module) -> list[nn.Module]:
    """The stages of a pyramid: a module list whose items all hold a list of blocks."""
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and all(_blocks_of(stage) for stage in module):
            return list(module)
    return []


def _blocks_of(stage: nn.Module) -> list[nn.Module]:
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
