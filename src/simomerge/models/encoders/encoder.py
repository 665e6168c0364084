"""An encoder: images -> Features, around any vision encoder of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simomerge.core.errors import InputError
from simomerge.core.machine import arrange_convolutions
from simomerge.core.normalisation import check_normalisation
from simomerge.merging.engine.depth import Depth
from simomerge.models.encoders.adapters import Adapters, TreeAdapters
from simomerge.models.encoders.features import Features
from simomerge.models.encoders.layout import BlockShape, Layout, find_layout

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Encoder(nn.Module):
    """A foundation encoder that returns the maps (and CLS tokens) of some of its blocks or stages.

    Args:
        backbone: A vision encoder of transformers: a plain transformer such as ``Dinov2Model``, whose blocks can be
            tapped, or a pyramid such as ``SwinModel`` or ``ConvNextV2Model``, whose stages can be tapped.
        taps: The blocks or stages to read, counted from 1. The default is the four quarters of the depth (3, 6, 9, 12
            of twelve blocks, as in the paper), or every stage.
        mean, std: RGB normalisation of images in [0, 1]; see `check_normalisation`.
        apply_layernorm: Apply the encoder's final layer norm to every tapped map, as the ``*Backbone`` classes of
            transformers do by default. None means: if there is a norm that fits. Pyramids have none.
        layout: The parts of the backbone; found by `find_layout` by default.

    Raises:
        InputError: A tap that does not exist, a normalisation that cannot be meant, or an architecture whose blocks
            cannot be found.

    Example:
        >>> from transformers import Dinov2Config, Dinov2Model
        >>> config = Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, patch_size=8)
        >>> features = Encoder(Dinov2Model(config))(torch.rand(2, 3, 60, 80))
        >>> [tuple(m.shape) for m in features.maps], features.padded_size
        ([(2, 32, 8, 10), (2, 32, 8, 10), (2, 32, 8, 10), (2, 32, 8, 10)], (64, 80))
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        taps: Sequence[int] | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        apply_layernorm: bool | None = None,
        layout: Layout | None = None,
    ) -> None:
        super().__init__()
        check_normalisation(mean, std)
        self.layout = layout = layout or find_layout(backbone)
        self.set_taps(default_taps(len(layout.channels)) if taps is None else taps)
        if apply_layernorm and layout.norm is None:
            raise InputError(
                f"{type(backbone).__name__} has no final layer norm that fits every tap; use apply_layernorm=False."
            )
        self.backbone: Any = arrange_convolutions(backbone)
        self.apply_layernorm = layout.norm is not None if apply_layernorm is None else apply_layernorm
        self.adapters: Adapters | TreeAdapters | None = None
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self._outputs: dict[int, Tensor] | None = None
        self._checkpoints = False
        # The hooks are partials of bound methods, not closures: a deep copy of the encoder then calls its own methods.
        # Adapter hooks come first, so a tap at the end of a block includes the output of the adapter.
        for index, block in enumerate(layout.blocks):
            block.register_forward_hook(partial(self._add_adapter, index), with_kwargs=True)
        for tap, module in enumerate(layout.tapped, start=1):
            module.register_forward_hook(partial(self._keep_output, tap))

    def set_taps(self, taps: Sequence[int]) -> None:
        """Choose the blocks or stages to read, counted from 1. Raises InputError for one that does not exist."""
        depth, unit = len(self.layout.channels), "stage" if self.layout.is_pyramid else "block"
        wrong = [tap for tap in taps if not 1 <= tap <= depth]
        if wrong or not taps or len(set(taps)) != len(taps):
            raise InputError(
                f"taps {list(taps)}: the encoder has {unit}s 1 to {depth}; name each {unit} to read once"
                + (f" (there is no {unit} {wrong[0]})." if wrong else ".")
            )
        self.taps = tuple(int(tap) for tap in taps)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each tapped map."""
        return tuple(self.layout.channels[tap - 1] for tap in self.taps)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per place of each tapped map."""
        return tuple(self.layout.strides[tap - 1] for tap in self.taps)

    @property
    def multiple(self) -> int:
        """Images are padded to a multiple of this on each side: the patch size, or the stride of the last stage."""
        return max(self.layout.strides)

    @property
    def has_cls(self) -> bool:
        return self.layout.has_cls

    @property
    def preprocessing(self) -> dict[str, list[float]]:
        """RGB mean and standard deviation, as the shortest decimal numbers that give the same float32."""
        return {
            name: [float(str(value)) for value in buffer.flatten().float().cpu().numpy()]
            for name, buffer in (("mean", self.mean), ("std", self.std))
        }

    @property
    def architecture(self) -> str:
        """The class of the backbone."""
        return f"{type(self.backbone).__module__}.{type(self.backbone).__qualname__}"

    def around(self, backbone: nn.Module) -> Encoder:
        """An encoder with the same settings around another backbone of the same architecture."""
        mean, std = self.preprocessing["mean"], self.preprocessing["std"]
        return Encoder(backbone, self.taps, mean, std, self.apply_layernorm)

    def describe(self) -> dict[str, Any]:
        """The entry ``encoder`` of simo.json."""
        return {"taps": list(self.taps), "apply_layernorm": self.apply_layernorm, **self.preprocessing}

    def add_adapters(self, rank: int = 16, activation: str = "none", last: int = 0) -> Adapters | TreeAdapters:
        """Add a fresh low-rank adapter to every block, or to the last blocks, and return them; see `Adapters`.

        Raises:
            InputError: Invalid settings, or blocks that are unknown or cannot have an adapter.
        """
        self.adapters = self._beside(Adapters(self.block_shapes(), rank, activation, last))
        return self.adapters

    def _beside(self, adapters: Any) -> Any:
        """Adapters where the encoder is, unless they have no values yet."""
        empty = any(each.is_meta for each in adapters.parameters())
        return adapters if empty else adapters.to(self.mean.device)

    def block_shapes(self) -> Sequence[BlockShape]:
        """What each block does to the shape of its input.

        Raises:
            InputError: The blocks are unknown, as in a custom encoder that does not declare them.
        """
        if not self.layout.blocks:
            raise InputError(
                f"{type(self.backbone).__name__} is a custom encoder, whose blocks are unknown. Declare them in its"
                " class (blocks), or use a method that needs none, such as fold, heads or distill."
            )
        return self.layout.shapes

    def depth(self, names: Iterable[str]) -> Depth:
        """The blocks that tensors of the backbone belong to, by their names. Raises InputError as `Depth` does."""
        return Depth(names, self.layout.names)

    def check_checkpointing(self) -> None:
        """Check that `checkpoint_gradients` works for this encoder. Raises InputError."""
        if not getattr(self.backbone, "supports_gradient_checkpointing", False):
            raise InputError(
                f"{type(self.backbone).__name__} cannot checkpoint gradients; train without gradient checkpointing."
            )

    def checkpoint_gradients(self, on: bool = True) -> None:
        """Recompute every block in the backward pass instead of storing its activations: less memory, more time.

        Raises:
            InputError: The encoder does not support it.
        """
        if on:
            self.check_checkpointing()
            self._switch_checkpointing("enable")({"use_reentrant": False})
        elif self._checkpoints:
            self._switch_checkpointing("disable")()
        self._checkpoints = on

    def _switch_checkpointing(self, action: str) -> Any:
        """The backbone's method; transformers 5 renamed it to activation checkpointing."""
        renamed = getattr(self.backbone, f"activation_checkpointing_{action}", None)
        return renamed or getattr(self.backbone, f"gradient_checkpointing_{action}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Encoder:
        """Move or cast all tensors, but leave mean and std in float32: rounded, they would stay so for good."""
        exact = {"mean": self.mean, "std": self.std}
        super()._apply(fn, recurse)
        for name, values in exact.items():
            if not values.is_meta:  # such values are still unknown
                setattr(self, name, values.to(getattr(self, name).device))
        return self

    def train(self, mode: bool = True) -> Encoder:
        """Set the training mode. Batch norms keep their statistics: those of small batches would ruin a merge."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """The size in pixels to which an image is padded: whole patches, or whole places of the last stage."""
        step, least = self.multiple, self.layout.smallest
        return max(-(-height // step) * step, least), max(-(-width // step) * step, least)

    def forward(self, images: Tensor, tasks: Iterable[str] | None = None) -> Features:
        """Encode images.

        Args:
            images: Float (B, 3, H, W), RGB in [0, 1], of any size. They are padded on the right and bottom by
                repeating the last column and row.
            tasks: The tasks that need the features. Only a tree encodes less for fewer tasks.
        """
        height, width = images.shape[-2:]
        padded = self.padded(height, width)
        if padded != (height, width):
            images = F.pad(images, (0, padded[1] - width, 0, padded[0] - height), mode="replicate")
        with self._attention():
            return self._features(images, (height, width), tasks)

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """Use scaled_dot_product_attention inside the block where no gradient is needed, if the backbone has it.

        Narrow models on a CPU are loaded with the eager attention, which is faster in training only.
        """
        changed: list[Any] = []
        wanted = not torch.is_grad_enabled() and not torch.compiler.is_compiling()  # some families export eager only
        if wanted and any(getattr(each, "_supports_sdpa", False) for each in self.modules()):
            configs = {id(config): config for each in self.modules() if (config := getattr(each, "config", None))}
            changed = [each for each in configs.values() if getattr(each, "_attn_implementation", None) == "eager"]
        try:
            for config in changed:
                config._attn_implementation = "sdpa"
            yield
        finally:
            for config in changed:
                config._attn_implementation = "eager"

    def source(self, task: str) -> str:
        """A name for the features that a task's head reads: tasks with the same name share them."""
        return ""

    def branch(self, task: str) -> Encoder:
        """The encoder whose features a task's head reads."""
        return self

    def for_tasks(self, tasks: Iterable[str]) -> Encoder:
        """An encoder for the heads of these tasks, with the same tensors; only a tree leaves something out."""
        return self

    def _features(self, images: Tensor, size: tuple[int, int], tasks: Iterable[str] | None) -> Features:
        """The Features of padded images."""
        maps, cls = self._encode(images)
        height, width = images.shape[-2:]
        return Features(maps, cls, size, (height, width))

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect the outputs of tapped modules inside the block. Inside another such block it changes nothing."""
        if self._outputs is not None:
            yield
            return
        self._outputs = {}
        try:
            yield
        finally:
            self._outputs = None

    def restore_windows(self) -> None:
        """Undo what an earlier forward pass did to shifted windows; see `Layout.windows`."""
        for block, shift, window in self.layout.windows:
            block.shift_size, block.window_size = shift, window

    def _encode(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Maps (B, C, h, w) and CLS tokens (B, C) of padded images, one per tap."""
        self.restore_windows()
        with self.collecting():
            assert self._outputs is not None
            pixels = self._in_own_dtype((images - self.mean) / self.std)
            self.backbone(pixel_values=pixels, **self.layout.arguments)
            outputs = [self._outputs[tap] for tap in self.taps]
        if self.apply_layernorm:
            assert self.layout.norm is not None
            outputs = [self.layout.norm(output) for output in outputs]
        height, width = images.shape[-2:]
        grids = [(height // stride, width // stride) for stride in self.strides]
        maps = tuple(self._to_map(output, grid) for output, grid in zip(outputs, grids, strict=True))
        return maps, tuple(output[:, 0] for output in outputs) if self.has_cls else ()

    def _in_own_dtype(self, images: Tensor) -> Tensor:
        """Images in the dtype of the backbone's first weight, unless autocast chooses the dtypes."""
        own = next((each.dtype for each in self.backbone.parameters() if each.is_floating_point()), images.dtype)
        return images if torch.is_autocast_enabled(images.device.type) else images.to(own)

    def _to_map(self, output: Tensor, grid: tuple[int, int]) -> Tensor:
        """The map (B, C, h, w) of a tapped output, which is a map or tokens (B, N, C)."""
        is_map, skip = output.ndim == 4, self.layout.prefix
        found = tuple(output.shape[2:]) if is_map else output.shape[1] - skip
        if found != (grid if is_map else grid[0] * grid[1]):
            raise InputError(
                f"{type(self.backbone).__name__} gives {found} places, but its configuration implies {grid[0]} x"
                f" {grid[1]}. It cannot be read here; `simomerge encoders` lists the encoders that can."
            )
        return output if is_map else output[:, skip:].transpose(1, 2).unflatten(2, grid)

    def _add_adapter(
        self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Forward hook of a block: add the output of its adapter, if it has one."""
        adapters: Any = self.adapters
        adapter = adapters.of_block(index) if adapters is not None else None
        if adapter is None:
            return output
        tokens, *rest = output if isinstance(output, tuple) else (output,)
        tokens = tokens + adapter(args[0] if args else kwargs["hidden_states"])
        return (tokens, *rest) if isinstance(output, tuple) else tokens

    def _keep_output(self, tap: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of a tapped module: keep its output while the encoder encodes."""
        # Gradient checkpointing also runs blocks in the backward pass, when no outputs are collected.
        if self._outputs is not None and tap in self.taps:
            self._outputs[tap] = output[0] if isinstance(output, tuple) else output


def default_taps(depth: int) -> tuple[int, ...]:
    """The blocks at the four quarters of the depth, counted from 1.

    Example:
        >>> default_taps(12), default_taps(8)
        ((3, 6, 9, 12), (2, 4, 6, 8))
    """
    return tuple(dict.fromkeys(max(1, round(depth * quarter / 4)) for quarter in (1, 2, 3, 4)))
