"""Load an encoder of transformers: from a hub id, or from a folder with config.json and model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simomerge.core.environment import broken_torchvision
from simomerge.core.errors import InputError
from simomerge.models.encoders.encoder import IMAGENET_MEAN, IMAGENET_STD, Encoder
from simomerge.models.encoders.families import family_of, unknown_encoder


def load_backbone(source: str | Path, attention: str | None = None) -> nn.Module:
    """A vision encoder of transformers, in float32, from a hub id or a local folder.

    Of a model of images and texts (CLIP, SigLIP) it is the vision encoder; what only classifiers read, as poolers,
    is left out.

    Args:
        source: hub id such as ``facebook/dinov2-base``, or a folder with config.json and model.safetensors.
        attention: attention implementation; by default "eager" on the CPU for narrow models, where it trains
            nearly twice as fast as scaled_dot_product_attention, and transformers' own choice otherwise.

    Raises:
        InputError: nothing there, no network for a hub id, a file that cannot be read, or no vision encoder.
    """
    source = str(source)
    owner, slash, _ = source.partition("/")
    # A hub id is OWNER/NAME; but where OWNER is a folder here, as runs/, the path of a folder is meant.
    local = source.startswith((".", "/", "~")) or source.count("/") > 1 or (slash and Path(owner).is_dir())
    if not Path(source).is_dir() and local:
        raise InputError(
            f"{source}: no such folder; give a folder with config.json and model.safetensors, or a hub id."
        )
    with quiet():
        config = _read_config(source)
        if attention is None and not torch.cuda.is_available() and getattr(config, "hidden_size", 0) <= 256:
            attention = "eager"
        backbone, loading = _read_weights(source, config, {"attn_implementation": attention} if attention else {})
    if getattr(backbone, "main_input_name", "") != "pixel_values":
        raise unknown_encoder(source, str(config.model_type))
    # transformers fills what a file lacks with random numbers and a warning; a merge of those is worthless.
    lacking = [name for name in [*loading["missing_keys"], *loading["mismatched_keys"]] if "pooler" not in str(name)]
    if lacking:
        raise InputError(
            f"{source}: {len(lacking)} tensors are missing or misshapen, first {lacking[0]}; the file is incomplete or"
            " its config.json is of another model."
        )
    return without_pooler(backbone).eval()


def without_pooler(backbone: Any) -> Any:
    """The model, in place, without the weights of a classifier's pooling: nothing that a head needs is read by them."""
    pooler = getattr(backbone, "pooler", None)
    if pooler is not None and list(pooler.parameters()):
        backbone.pooler = None
    return backbone


def load_encoder(source: str | Path, taps: Sequence[int] | None = None, apply_layernorm: bool | None = None) -> Encoder:
    """An `Encoder` from a hub id or a local transformers folder.

    RGB mean and standard deviation come from the folder's preprocessor_config.json; ImageNet's where it has none.

    Example:
        >>> load_encoder("facebook/dinov2-base").taps                                           # doctest: +SKIP
        (3, 6, 9, 12)
    """
    mean, std = read_normalisation(source)
    encoder = Encoder(load_backbone(source), taps=taps, mean=mean, std=std, apply_layernorm=apply_layernorm)
    if family_of(encoder.config.model_type) is None:
        _try_out(encoder, str(source))
    return encoder


@torch.no_grad()
def _try_out(encoder: Encoder, source: str) -> None:
    """An architecture that nobody tested: whether it encodes an image as its structure says."""
    try:
        encoder(torch.zeros(1, 3, *encoder.padded(1, 2 * encoder.multiple)))
    except InputError:
        raise
    except Exception as error:  # whatever a foreign forward pass may raise
        raise unknown_encoder(source, str(encoder.config.model_type)) from error


def _read_config(source: str) -> Any:
    """The configuration of the vision encoder."""
    from transformers import AutoConfig, ViTConfig

    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:
        raise _not_loaded(source, error) from error
    config = getattr(config, "vision_config", None) or config
    if config.model_type == "vit_mae":  # its own class hides most of the image
        config = ViTConfig.from_dict({**config.to_dict(), "model_type": "vit"})
    if hasattr(config, "vision_use_head"):  # SigLIP's pooler
        config.vision_use_head = False
    return config


def _read_weights(source: str, config: Any, extra: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    import transformers

    family = family_of(config.model_type)
    loader = getattr(transformers, family.loads_as if family and family.loads_as else "AutoModel")
    try:
        backbone, loading = loader.from_pretrained(
            source, config=config, dtype=torch.float32, output_loading_info=True, **extra
        )
    except InputError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, SafetensorError, ... for one cause
        raise _not_loaded(source, error) from error
    return backbone, loading


def _not_loaded(source: str, error: Exception) -> InputError:
    """What to say instead of transformers' words."""
    if cause := broken_torchvision():
        return InputError(cause)
    if model_type := _model_type(source):
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if model_type not in CONFIG_MAPPING:
            return unknown_encoder(source, model_type)
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InputError(
        f"{source}: {'' if Path(source).is_dir() else 'no such folder, and as a hub id: '}cannot load an encoder"
        f" ({first_line}). Give a folder with config.json and model.safetensors, or a hub id while online."
    )


def _model_type(folder: str) -> str:
    """What a folder's config.json calls itself; empty where that cannot be read."""
    try:
        return str(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("model_type", ""))
    except (OSError, ValueError, AttributeError):
        return ""


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and its reports of poolers that are left out."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def read_normalisation(source: str | Path) -> tuple[Sequence[float], Sequence[float]]:
    """RGB mean and standard deviation of a folder's or hub id's images; ImageNet's where it says none.

    Raises:
        InputError: a file that says something else; the message names it.
    """
    path, said = _preprocessing(str(source))
    found = []
    for name, default in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
        values = said.get(name, default)
        if not (isinstance(values, Sequence) and len(values) == 3 and all(isinstance(v, (int, float)) for v in values)):
            raise InputError(f"{path}: {name} is {values!r}; give three numbers, or remove it to use ImageNet's.")
        found.append(values)
    return found[0], found[1]


def _preprocessing(source: str) -> tuple[str, Mapping[str, Any]]:
    """What the file of an image processor says, and where it is; nothing where there is none."""
    from transformers.utils import cached_file

    for name, key in (("preprocessor_config.json", ""), ("processor_config.json", "image_processor")):
        try:
            path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
            if not path:
                continue
            said = json.loads(Path(path).read_text(encoding="utf-8"))
            said = said.get(key, {}) if key else said
            if not isinstance(said, Mapping):
                raise ValueError("no mapping")
        except (ValueError, AttributeError) as error:
            raise InputError(f"{path}: cannot be read ({error}); mend it, or remove it to use ImageNet's.") from error
        except OSError:
            continue
        return str(path), said
    return source, {}
