"""An encoder: images -> Features, with any vision transformer of transformers inside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simomerge.encoders.adapters import Adapters
from simomerge.encoders.features import Features
from simomerge.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Encoder(nn.Module):
    """A foundation encoder that gives the patch maps and CLS tokens of some of its blocks.

    Args:
        backbone: a plain-ViT model of transformers (``Dinov2Model`` and its like).
        taps: the blocks to read, counted from 1; by default the four at the quarters of the depth (3, 6, 9, 12
            of twelve, as in the paper).
        mean, std: RGB normalisation of images in [0, 1].
        apply_layernorm: pass every tapped map through the encoder's final layer norm, as the ``*Backbone``
            classes of transformers do by default.

    Raises:
        InputError: a tap that is no block of the encoder, or an architecture whose blocks are not found.

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
        apply_layernorm: bool = True,
    ) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.blocks = _find_blocks(backbone)
        self.taps = default_taps(len(self.blocks)) if taps is None else check_taps(taps, len(self.blocks))
        self.apply_layernorm = apply_layernorm
        self.adapters: Adapters | None = None
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self._tapped: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks, start=1):
            block.register_forward_hook(_BlockHook(self, index))

    @property
    def config(self) -> Any:
        return self.backbone.config

    @property
    def patch_size(self) -> int:
        return int(self.config.patch_size)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each tapped map."""
        return (int(self.config.hidden_size),) * len(self.taps)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per place of each tapped map."""
        return (self.patch_size,) * len(self.taps)

    @property
    def has_cls(self) -> bool:
        return hasattr(_embeddings(self.backbone), "cls_token")

    @property
    def preprocessing(self) -> dict[str, list[float]]:
        """RGB mean and standard deviation, as the shortest plain numbers that give the same float32."""
        return {
            name: [float(str(value)) for value in buffer.flatten().float().cpu().numpy()]
            for name, buffer in (("mean", self.mean), ("std", self.std))
        }

    def add_adapters(self, rank: int = 16, activation: str = "none") -> Adapters:
        """Put a fresh low-rank adapter beside every block and return them all; see `Adapters`."""
        self.adapters = Adapters([int(self.config.hidden_size)] * len(self.blocks), rank, activation)
        return self.adapters

    def forward(self, images: Tensor) -> Features:
        """Encode images.

        Args:
            images: float (B, 3, H, W), RGB in [0, 1], any size; padded to whole patches by repeating the
                last row and column.
        """
        height, width = images.shape[-2:]
        patch = self.patch_size
        padded = (-(-height // patch) * patch, -(-width // patch) * patch)
        if padded != (height, width):
            images = F.pad(images, (0, padded[1] - width, 0, padded[0] - height), mode="replicate")
        self._tapped = {}
        self.backbone(pixel_values=(images - self.mean) / self.std)
        tokens = [self._tapped[tap] for tap in self.taps]
        self._tapped = {}
        if self.apply_layernorm:
            norm = _final_norm(self.backbone)
            tokens = [norm(tap) for tap in tokens]
        grid = (padded[0] // patch, padded[1] // patch)
        skip = tokens[0].shape[1] - grid[0] * grid[1]  # CLS and register tokens stand before the patches
        return Features(
            maps=tuple(t[:, skip:].transpose(1, 2).unflatten(2, grid) for t in tokens),
            cls=tuple(t[:, 0] for t in tokens) if self.has_cls else (),
            image_size=(height, width),
            padded_size=padded,
        )


class _BlockHook:
    """After block ``index``: add its adapter's output, if there is one, and keep what is tapped.

    One hook does both, in this order, so that a tap always sees the adapted output. An object, not a closure:
    a deep copy of the encoder then points to the copy.
    """

    def __init__(self, encoder: Encoder, index: int) -> None:
        self.encoder = encoder
        self.index = index

    def __call__(self, block: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        tokens = output[0] if isinstance(output, tuple) else output
        if self.encoder.adapters is not None:
            tokens = tokens + self.encoder.adapters[self.index - 1](inputs[0])
        if self.index in self.encoder.taps:
            self.encoder._tapped[self.index] = tokens
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens


def default_taps(depth: int) -> tuple[int, ...]:
    """The blocks at the four quarters of the depth, counted from 1.

    Example:
        >>> default_taps(12), default_taps(8)
        ((3, 6, 9, 12), (2, 4, 6, 8))
    """
    return tuple(dict.fromkeys(max(1, round(depth * quarter / 4)) for quarter in (1, 2, 3, 4)))


def check_taps(taps: Sequence[int], depth: int) -> tuple[int, ...]:
    """The taps as a tuple, or an InputError that names the one the encoder lacks."""
    wrong = [tap for tap in taps if not 1 <= tap <= depth]
    if wrong or not taps or len(set(taps)) != len(taps):
        raise InputError(
            f"taps {list(taps)}: the encoder has blocks 1 to {depth}; name each block to read once"
            + (f" (there is no block {wrong[0]})." if wrong else ".")
        )
    return tuple(int(tap) for tap in taps)


def _find_blocks(backbone: nn.Module) -> list[nn.Module]:
    depth = getattr(backbone.config, "num_hidden_layers", None)
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return list(module)
    raise InputError(
        f"{type(backbone).__name__}: found no list of {depth} blocks;"
        " give a plain vision transformer such as Dinov2Model."
    )


def _embeddings(backbone: nn.Module) -> nn.Module:
    return getattr(backbone, "embeddings", backbone)


def _final_norm(backbone: nn.Module) -> nn.Module:
    norm = getattr(backbone, "layernorm", None)
    if norm is None:
        raise InputError(f"{type(backbone).__name__} has no final layer norm; load it with apply_layernorm=False.")
    return norm


def load_backbone(source: str | Path, attention: str | None = None) -> nn.Module:
    """A transformers model, in float32, from a hub id or a local folder.

    Args:
        source: hub id such as ``facebook/dinov2-base``, or a folder with config.json and model.safetensors.
        attention: attention implementation; by default "eager" on the CPU for narrow models, where it trains
            nearly twice as fast as scaled_dot_product_attention, and transformers' own choice otherwise.

    Raises:
        InputError: nothing there, no network for a hub id, or a file that cannot be read.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    source = str(source)
    if not Path(source).is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise InputError(
            f"{source}: no such folder; give a folder with config.json and model.safetensors, or a hub id."
        )
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source)
        if attention is None and not torch.cuda.is_available() and getattr(config, "hidden_size", 0) <= 256:
            attention = "eager"
        extra = {"attn_implementation": attention} if attention else {}
        backbone, loading = AutoModel.from_pretrained(
            source, config=config, dtype=torch.float32, output_loading_info=True, **extra
        )
    except InputError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, SafetensorError, ... for one cause
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{source}: {'' if Path(source).is_dir() else 'no such folder, and as a hub id: '}cannot load an encoder"
            f" ({first_line}). Give a folder with config.json and model.safetensors, or a hub id while online."
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    # transformers fills what a file lacks with random numbers and a warning; a merge of those is worthless.
    lacking = [name for name in [*loading["missing_keys"], *loading["mismatched_keys"]] if "pooler" not in str(name)]
    if lacking:
        raise InputError(
            f"{source}: {len(lacking)} tensors are missing or misshapen, first {lacking[0]}; the file is incomplete or"
            " its config.json is of another model."
        )
    # Pooling layers of classifiers read nothing that a head needs.
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    return backbone.eval()


def load_encoder(source: str | Path, taps: Sequence[int] | None = None, apply_layernorm: bool = True) -> Encoder:
    """An `Encoder` from a hub id or a local transformers folder.

    RGB mean and standard deviation come from the folder's preprocessor_config.json; ImageNet's where it has none.
    """
    mean, std = _read_normalisation(source)
    return Encoder(load_backbone(source), taps=taps, mean=mean, std=std, apply_layernorm=apply_layernorm)


def _read_normalisation(source: str | Path) -> tuple[Sequence[float], Sequence[float]]:
    import json

    from transformers.utils import cached_file

    try:
        path = cached_file(str(source), "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
        data = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except ValueError as error:
        raise InputError(f"{path}: cannot be read ({error}); mend it, or remove it to use ImageNet's.") from error
    except OSError:
        data = {}
    return data.get("image_mean", IMAGENET_MEAN), data.get("image_std", IMAGENET_STD)
