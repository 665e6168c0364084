"""Load an encoder of transformers from a hub id, or from a folder with config.json and model.safetensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from simomerge.checkpoints.lora import is_lora_folder
from simomerge.checkpoints.lora_config import CONFIG, read_config
from simomerge.checkpoints.lora_names import import_command
from simomerge.checkpoints.quantised import check_config
from simomerge.core.environment import broken_torchvision
from simomerge.core.errors import InputError
from simomerge.core.hub import is_only_a_path, local_source, similar
from simomerge.core.text import first_line, shortened
from simomerge.models.encoders.allocation import check_numbers, check_size
from simomerge.models.encoders.encoder import Encoder
from simomerge.models.encoders.families import family_of, unknown_encoder
from simomerge.models.encoders.other_models import check_no_other_model
from simomerge.models.encoders.preprocessing import read_normalisation


def load_encoder(
    source: str | Path,
    taps: Sequence[int] | None = None,
    apply_layernorm: bool | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Encoder:
    """An `Encoder` from a hub id or a local transformers folder.

    Args:
        source: As in `load_backbone`.
        taps, apply_layernorm: As in `Encoder`.
        mean, std: RGB normalisation; by default as in `read_normalisation`.

    Raises:
        InputError: As in `load_backbone` and `Encoder`.

    Example:
        >>> load_encoder("facebook/dinov2-base").taps                                           # doctest: +SKIP
        (3, 6, 9, 12)
    """
    folder = local_source(source)
    known_mean, known_std = read_normalisation(folder)
    backbone = load_backbone(folder)
    encoder = Encoder(backbone, taps, mean or known_mean, std or known_std, apply_layernorm)
    if family_of(backbone.config.model_type) is None:
        _try_out(encoder, str(source))
    return encoder


def load_backbone(source: str | Path) -> Any:
    """A vision encoder of transformers, in float32, from a hub id or a local folder.

    Models of images and text (CLIP, SigLIP) give their vision encoder. Poolers, which only classifiers read, are left
    out. On a CPU, narrow models use the "eager" attention, which trains nearly twice as fast there as
    scaled_dot_product_attention.

    Args:
        source: A hub id such as ``facebook/dinov2-base``, or a folder with config.json and model.safetensors.

    Raises:
        InputError: No such source, no network for a hub id, a damaged file, or not a vision encoder.
    """
    source = local_source(source)
    _check_folder(source)
    with quiet():
        try:
            backbone, loading = _read(source)
        except InputError:
            raise
        except Exception as error:  # transformers raises OSError, ValueError, SafetensorError, ... for the same cause
            place = "" if Path(source).is_dir() else "no such folder, and as a hub id: "
            raise InputError(
                broken_torchvision()
                or f"{source}: {place}cannot load an encoder ({first_line(error)}). Give a folder with config.json and"
                " model.safetensors, or a hub id while online."
            ) from error
    if getattr(backbone, "main_input_name", "") != "pixel_values":
        raise unknown_encoder(source, str(backbone.config.model_type))
    # transformers fills missing tensors with random numbers and only warns; a merge of those would be worthless.
    shapes = {name: f" of shape {tuple(has)}, not {tuple(wanted)}" for name, has, wanted in loading["mismatched_keys"]}
    missing = [name for name in sorted([*loading["missing_keys"], *shapes]) if "pooler" not in name]
    # No prediction depends on the number of batches that a batch norm has counted; some files leave it out.
    counters = [name for name in missing if name.endswith("num_batches_tracked")]
    for name in counters:
        backbone.get_buffer(name).zero_()
    missing = [name for name in missing if name not in counters]
    if missing:
        first = f"{missing[0]}{shapes.get(missing[0], '')}"
        many = "1 tensor is missing or has" if len(missing) == 1 else f"{len(missing)} tensors are missing or have"
        raise InputError(
            f"{source}: {many} another shape, first {first}. The file is incomplete, or its config.json belongs to"
            " another model."
        )
    return without_pooler(backbone).eval()


def without_pooler(backbone: Any) -> Any:
    """The model, in place, without the weights of its pooler, which no head reads."""
    pooler = getattr(backbone, "pooler", None)
    if pooler is not None and list(pooler.parameters()):
        backbone.pooler = None
    return backbone


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and warnings about tensors that are left out."""
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


def _check_folder(source: str) -> None:
    """Check that a source that can only be a folder exists, and holds a whole encoder in floating point."""
    folder = Path(source)
    if not folder.is_dir() and is_only_a_path(source):
        raise InputError(
            f"{source}: no such folder; give a folder with config.json and model.safetensors, or a hub id."
            f"{similar(source)}"
        )
    if is_lora_folder(folder):  # transformers would load the model that its file names
        saved = read_config(folder / CONFIG).get("modules_to_save")
        raise InputError(
            f"{source}: a peft adapter, not an encoder. Merge it into its base: simomerge merge BASE task={source}."
            f" {import_command(source, str(saved[0])) if saved else ''}".rstrip()
        )
    check_config(folder)


def _read(source: str) -> tuple[Any, dict[str, Any]]:
    """The vision encoder, and what transformers reports about its tensors."""
    try:
        config, loader = _configuration(source)
    except (InputError, ImportError, OSError):
        raise
    except Exception as error:  # the classes of transformers raise anything for values that they do not expect
        file = Path(source) / "config.json"
        if not file.is_file() or broken_torchvision():
            raise
        detail = shortened(" ".join(str(error).split()), 200).rstrip(".") or type(error).__name__
        impossible = isinstance(error, (ValueError, ArithmeticError))
        what = "a value that no encoder can have" if impossible else "a value is missing or of the wrong kind"
        raise InputError(
            f"{file}: cannot load the encoder that it describes ({what}: {detail});"
            " take the file from the model's source again."
        ) from error
    found: tuple[Any, dict[str, Any]] = loader.from_pretrained(
        source,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are an error, of which this makes transformers report the names
        trust_remote_code=False,
    )
    return found


def _configuration(source: str) -> tuple[Any, Any]:
    """The configuration of the vision encoder, and the class that loads it."""
    import transformers

    settings = transformers.PretrainedConfig.get_config_dict(source)[0]
    file = Path(source) / "config.json"
    check_numbers(file, settings)
    check_no_other_model(file, settings)
    model_type = settings.get("model_type")
    if not model_type or not isinstance(model_type, str):
        raise InputError(
            f"{source}: cannot load an encoder (config.json is missing or names no model type). Give a folder with"
            " config.json and model.safetensors, or a hub id while online."
        )
    if model_type not in transformers.CONFIG_MAPPING:
        raise unknown_encoder(source, model_type)
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    check_no_other_model(file, config.to_dict())  # its class may name one by default
    config = getattr(config, "vision_config", None) or config
    if config.model_type == "vit_mae":  # its own class hides most of the image
        config = transformers.ViTConfig.from_dict({**config.to_dict(), "model_type": "vit"})
    if hasattr(config, "vision_use_head"):  # SigLIP's pooler
        config.vision_use_head = False
    choose_attention(config)
    family = family_of(config.model_type)
    loader = getattr(transformers, family.loads_as if family and family.loads_as else "AutoModel")
    if loader is transformers.AutoModel and type(config) not in transformers.MODEL_MAPPING:
        raise unknown_encoder(source, config.model_type)
    check_size(source, config, getattr(loader, "from_config", loader))
    return config, loader


def choose_attention(config: Any) -> None:
    """Choose the attention of an encoder, never what its file names: that may be code on the hub, or another file.

    Code in the model's folder is left out, too: transformers may offer to run what ``auto_map`` names.

    Args:
        config: The configuration of an encoder, or of a model with one in ``backbone_config``. It is changed in place.
    """
    width = getattr(getattr(config, "backbone_config", None) or config, "hidden_size", 0)
    # None is the choice of transformers. The setter also reaches the configurations inside of this one.
    config._attn_implementation = "eager" if width <= 256 and not torch.cuda.is_available() else None
    config.transformers_weights = None
    _leave_out_code(config)


def _leave_out_code(config: Any) -> None:
    vars(config).pop("auto_map", None)
    for inner in vars(config).values():
        if hasattr(inner, "model_type"):  # a configuration inside of this one
            _leave_out_code(inner)


@torch.no_grad()
def _try_out(encoder: Encoder, source: str) -> None:
    """Check that an architecture outside the tested families encodes an image as its structure implies."""
    try:
        encoder(torch.zeros(1, 3, *encoder.padded(1, 2 * encoder.multiple)))
    except InputError:
        raise
    except Exception as error:  # a foreign forward pass may raise anything
        raise unknown_encoder(source, str(encoder.backbone.config.model_type)) from error
