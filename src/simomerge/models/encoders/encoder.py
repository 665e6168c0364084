"""An encoder: images -> Features, with any vision encoder of transformers inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simomerge.core.errors import InputError
from simomerge.models.encoders.adapters import Adapters
from simomerge.models.encoders.anatomy import Anatomy, dissect
from simomerge.models.encoders.features import Features

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Encoder(nn.Module):
    """A foundation encoder that gives the maps (and CLS tokens) of some of its blocks or stages.

    Args:
        backbone: a vision encoder of transformers: a plain transformer (``Dinov2Model`` and its like), whose blocks
            can be tapped, or a pyramid (``SwinModel``, ``ConvNextV2Model``), whose stages can.
        taps: the blocks or stages to read, counted from 1; by default the four at the quarters of the depth (3, 6, 9,
            12 of twelve, as in the paper), or every stage.
        mean, std: RGB normalisation of images in [0, 1].
        apply_layernorm: pass every tapped map through the encoder's final layer norm, as the ``*Backbone``
            classes of transformers do by default; None where there is one that fits: pyramids have none.

    Raises:
        InputError: a tap that the encoder lacks, or an architecture whose blocks are not found.

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
    ) -> None:
        anatomy = dissect(backbone)
        depth = len(anatomy.tapped)
        what = "block" if anatomy.tapped is anatomy.blocks else "stage"
        chosen = default_taps(depth) if taps is None else check_taps(taps, depth, what)
        if apply_layernorm and anatomy.norm is None:
            raise InputError(
                f"{type(backbone).__name__} has no final layer norm that fits every tap; use apply_layernorm=False."
            )
        normed = anatomy.norm is not None if apply_layernorm is None else apply_layernorm
        self._set_up(backbone, anatomy, chosen, mean, std, normed)

    def _set_up(
        self,
        backbone: nn.Module,
        anatomy: Anatomy,
        taps: tuple[int, ...],
        mean: Sequence[float],
        std: Sequence[float],
        apply_layernorm: bool,
    ) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.anatomy = anatomy
        self.taps = taps
        self.apply_layernorm = apply_layernorm
        self.adapters: Adapters | None = None
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self._tapped: dict[int, Tensor] | None = None
        self._checkpoints = False
        # In this order: where a tap is the end of a block, it sees what the adapter added.
        for index, block in enumerate(anatomy.blocks):
            block.register_forward_hook(_AdapterHook(self, index), with_kwargs=True)
        for index, module in enumerate(anatomy.tapped, start=1):
            module.register_forward_hook(_TapHook(self, index))

    @property
    def config(self) -> Any:
        return self.backbone.config

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each tapped map."""
        return tuple(self.anatomy.channels[tap - 1] for tap in self.taps)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per place of each tapped map."""
        return tuple(self.anatomy.strides[tap - 1] for tap in self.taps)

    @property
    def multiple(self) -> int:
        """Images are padded to a multiple of this on each side: the patch, or the stride of the last stage."""
        return max(self.anatomy.strides)

    @property
    def has_cls(self) -> bool:
        return self.anatomy.has_cls

    @property
    def preprocessing(self) -> dict[str, list[float]]:
        """RGB mean and standard deviation, as the shortest plain numbers that give the same float32."""
        return {
            name: [float(str(value)) for value in buffer.flatten().float().cpu().numpy()]
            for name, buffer in (("mean", self.mean), ("std", self.std))
        }

    def describe(self) -> dict[str, Any]:
        """What simo.json says of it."""
        return {"taps": list(self.taps), "apply_layernorm": self.apply_layernorm, **self.preprocessing}

    def add_adapters(self, rank: int = 16, activation: str = "none", last: int = 0) -> Adapters:
        """Put a fresh low-rank adapter beside every block, or the last ones, and return them all; see `Adapters`."""
        self.adapters = Adapters(list(self.anatomy.widths), rank, activation, last)
        return self.adapters

    def check_checkpointing(self) -> None:
        """Refuse what `checkpoint_gradients` cannot do. Raises InputError."""
        if not getattr(self.backbone, "supports_gradient_checkpointing", False):
            raise InputError(f"{type(self.backbone).__name__} cannot checkpoint gradients; train without.")

    def checkpoint_gradients(self, on: bool = True) -> None:
        """Compute every block again in the backward pass, instead of keeping what is inside: less memory, more time.

        Raises:
            InputError: an encoder that cannot.
        """
        if on:
            self.check_checkpointing()
            self._switch("enable")({"use_reentrant": False})
        elif self._checkpoints:
            self._switch("disable")()
        self._checkpoints = on

    def train(self, mode: bool = True) -> Encoder:
        """As of any module, but batch norms keep their statistics: those of small batches would ruin a merge."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def _switch(self, how: str) -> Any:
        """transformers 5 calls it activation checkpointing."""
        new = getattr(self.backbone, f"activation_checkpointing_{how}", None)
        return new or getattr(self.backbone, f"gradient_checkpointing_{how}")

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """The size in pixels to which an image is padded: whole patches, or whole places of the last stage."""
        step, least = self.multiple, self.anatomy.smallest
        return max(-(-height // step) * step, least), max(-(-width // step) * step, least)

    def _pad(self, images: Tensor) -> Tensor:
        """Images with their last row and column repeated, up to the size that `padded` says."""
        height, width = images.shape[-2:]
        wanted = self.padded(height, width)
        if wanted == (height, width):
            return images
        return F.pad(images, (0, wanted[1] - width, 0, wanted[0] - height), mode="replicate")

    def _split(self, output: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Of a tapped output its map (B, C, h, w) and the tokens (B, n, C) before it: CLS, registers and the like."""
        skip = self.anatomy.prefix
        found = tuple(output.shape[2:]) if output.ndim == 4 else output.shape[1] - skip
        if found != (grid if output.ndim == 4 else grid[0] * grid[1]):
            raise InputError(
                f"{type(self.backbone).__name__} gives {found} places, not the {grid[0]} x {grid[1]} that its"
                " configuration says: it cannot be read here; `simomerge encoders` lists those that can."
            )
        if output.ndim == 4:
            return output, output.new_empty(len(output), 0, output.shape[1])
        return output[:, skip:].transpose(1, 2).unflatten(2, grid), output[:, :skip]

    def forward(self, images: Tensor) -> Features:
        """Encode images.

        Args:
            images: float (B, 3, H, W), RGB in [0, 1], any size; padded by repeating the last row and column.
        """
        height, width = images.shape[-2:]
        images = self._pad(images)
        padded = (images.shape[-2], images.shape[-1])
        for block, shift, window in self.anatomy.windows:
            block.shift_size, block.window_size = shift, window
        self._tapped = {}
        try:
            self.backbone(pixel_values=(images - self.mean) / self.std, **self.anatomy.arguments)
            outputs = [self._tapped[tap] for tap in self.taps]
        finally:
            self._tapped = None
        if self.apply_layernorm:
            assert self.anatomy.norm is not None
            outputs = [self.anatomy.norm(output) for output in outputs]
        pairs = [
            self._split(output, (padded[0] // stride, padded[1] // stride))
            for output, stride in zip(outputs, self.strides, strict=True)
        ]
        return Features(
            maps=tuple(patches for patches, _ in pairs),
            cls=tuple(prefix[:, 0] for _, prefix in pairs) if self.has_cls else (),
            image_size=(height, width),
            padded_size=padded,
        )


class _AdapterHook:
    """After a block: add its adapter's output, if there is one.

    An object, not a closure: a deep copy of the encoder then points to the copy.
    """

    def __init__(self, encoder: Encoder, index: int) -> None:
        self.encoder = encoder
        self.index = index

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        adapter = self.encoder.adapters.beside(self.index) if self.encoder.adapters is not None else None
        if adapter is None:
            return output
        given = args[0] if args else kwargs["hidden_states"]
        tokens = output[0] if isinstance(output, tuple) else output
        tokens = tokens + adapter(given)
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens


class _TapHook:
    """Keep the output of a block or stage that is tapped, while the encoder encodes."""

    def __init__(self, encoder: Encoder, index: int) -> None:
        self.encoder = encoder
        self.index = index

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        # Gradient checkpointing runs blocks again in the backward pass, when nobody asks.
        if self.encoder._tapped is not None and self.index in self.encoder.taps:
            self.encoder._tapped[self.index] = output[0] if isinstance(output, tuple) else output


def default_taps(depth: int) -> tuple[int, ...]:
    """The blocks at the four quarters of the depth, counted from 1.

    Example:
        >>> default_taps(12), default_taps(8)
        ((3, 6, 9, 12), (2, 4, 6, 8))
    """
    return tuple(dict.fromkeys(max(1, round(depth * quarter / 4)) for quarter in (1, 2, 3, 4)))


def check_taps(taps: Sequence[int], depth: int, what: str = "block") -> tuple[int, ...]:
    """The taps as a tuple, or an InputError that names the one the encoder lacks."""
    wrong = [tap for tap in taps if not 1 <= tap <= depth]
    if wrong or not taps or len(set(taps)) != len(taps):
        raise InputError(
            f"taps {list(taps)}: the encoder has {what}s 1 to {depth}; name each {what} to read once"
            + (f" (there is no {what} {wrong[0]})." if wrong else ".")
        )
    return tuple(int(tap) for tap in taps)
