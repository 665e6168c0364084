"""Depth Anything and DPT of transformers, as experts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simomerge.checkpoints import open_checkpoint
from simomerge.core.errors import InputError
from simomerge.datasets.tasks import KINDS, Task
from simomerge.models.encoders import Encoder
from simomerge.models.encoders.anatomy import is_plain
from simomerge.models.encoders.loading import quiet, read_normalisation, without_pooler
from simomerge.models.heads import TransformersHead
from simomerge.models.importing.mapping import fill, source_of
from simomerge.models.model import SimoModel

ARCHITECTURES = ("DepthAnythingForDepthEstimation", "DPTForDepthEstimation", "DPTForSemanticSegmentation")
"""Of transformers, that can be imported."""

_KEPT = (
    "neck_hidden_sizes",
    "reassemble_factors",
    "fusion_hidden_size",
    "head_hidden_size",
    "head_in_index",
    "readout_type",
    "hidden_act",
    "use_batch_norm_in_fusion_residual",
    "use_bias_in_fusion_residual",
    "add_projection",
    "depth_estimation_type",
    "max_depth",
    "semantic_classifier_dropout",
)
"""What of a configuration the head depends on."""


def architecture_of(source: str) -> str:
    """The class that a folder's or hub id's config.json names; empty where it names none."""
    return str((getattr(_config(source), "architectures", None) or [""])[0])


def read_transformers(source: str, task: str, kind: str, classes: Sequence[str]) -> SimoModel:
    """The expert; see `simomerge.models.importing.import_expert`."""
    config = _config(source)
    architecture = str((config.architectures or [""])[0])
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{source}: a {architecture or config.model_type}, and only {', '.join(ARCHITECTURES)} can be imported as"
            " they are; give a weight file with --encoder, --encoder-prefix, --head-prefix and --head."
        )
    if getattr(config, "is_hybrid", False):
        raise InputError(f"{source}: DPT hybrids read a convolutional encoder beside the transformer: not here.")
    described = _task(config, architecture, task, kind, classes)
    weights = open_checkpoint(_weights_folder(source))
    own_vit = config.model_type == "dpt" and getattr(config, "backbone_config", None) is None
    with quiet():
        encoder = _dpt_encoder(config) if own_vit else _backbone_encoder(config)
    encoder.mean.copy_(torch.tensor(read_normalisation(source)[0]).view(1, 3, 1, 1))
    encoder.std.copy_(torch.tensor(read_normalisation(source)[1]).view(1, 3, 1, 1))
    settings = {name: getattr(config, name) for name in _KEPT if hasattr(config, name)}
    if architecture == "DPTForSemanticSegmentation":
        settings["num_labels"] = described.channels
    head = TransformersHead(encoder.channels, described.channels, architecture, _plain(settings))
    prefix = "dpt." if own_vit else "backbone."
    fill(
        weights,
        {prefix: encoder.backbone, "neck.": head.neck, "head.": head.head},
        ("auxiliary_head.", f"{prefix}pooler."),
        (f"{prefix}embeddings.mask_token",),
    )
    return SimoModel(encoder, {task: described}, {task: head}, source_of(source, architecture)).eval()


def source_model(source: str) -> nn.Module | None:
    """The model as transformers runs it, to compare predictions with; None where it has no class for it."""
    import transformers

    architecture = architecture_of(source)
    config = _config(source)
    if architecture not in ARCHITECTURES:
        return None
    if architecture == "DPTForSemanticSegmentation" and getattr(config, "backbone_config", None) is not None:
        return None  # it would run with an encoder of its own
    with quiet():
        model: nn.Module = getattr(transformers, architecture).from_pretrained(source, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def largest_difference(expert: SimoModel, model: nn.Module, size: tuple[int, int] | None = None) -> tuple[float, float]:
    """How far an expert's logits are from its source's, on a random image: (largest difference, largest value).

    Args:
        expert: with one task.
        model: see `source_model`.
        size: of the image, of whole patches; by default sixteen on each side.
    """
    (task,) = expert.tasks
    side = expert.encoder.multiple * 16
    image = torch.rand(1, 3, *(size or (side, side)), generator=torch.Generator().manual_seed(0))
    given = (image - expert.encoder.mean) / expert.encoder.std
    output: Any = model(pixel_values=given)
    theirs: Tensor = output.logits if hasattr(output, "logits") else output.predicted_depth[:, None]
    theirs = nn.functional.interpolate(theirs, image.shape[-2:], mode="bilinear", align_corners=False)
    ours = expert(image)[task]
    return float((ours - theirs).abs().max()), float(theirs.abs().max())


def _config(source: str) -> Any:
    from transformers import AutoConfig

    with quiet():
        try:
            return AutoConfig.from_pretrained(source)
        except Exception as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(
                f"{source}: no folder of a model, no weight file, and as a hub id not to be had ({first_line});"
                " download it while online and give its folder."
            ) from error


def _weights_folder(source: str) -> Path:
    """The folder with the weights: the one given, or where the hub's copy lies."""
    if Path(source).is_dir():
        return Path(source)
    from transformers.utils import cached_file

    for name in ("model.safetensors", "pytorch_model.bin"):
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if found:
            return Path(found).parent
    raise InputError(f"{source}: has no weights (model.safetensors or pytorch_model.bin) in one file.")


def _backbone_encoder(config: Any) -> Encoder:
    from transformers import AutoModel

    backbone_config = config.backbone_config
    taps = [int(index) for index in backbone_config.out_indices]
    backbone = without_pooler(AutoModel.from_config(backbone_config, dtype=torch.float32))
    if not is_plain(backbone):
        raise InputError(
            f"its encoder is a {type(backbone).__name__}, a pyramid: only Depth Anything and DPT on plain transformers"
            " can be imported."
        )
    # Backbones that know no such setting apply no norm.
    return Encoder(backbone.eval(), taps, apply_layernorm=bool(getattr(backbone_config, "apply_layernorm", False)))


def _dpt_encoder(config: Any) -> Encoder:
    """DPT's own transformer; its layer norm is only for poolers."""
    from transformers import DPTModel

    taps = [int(index) + 1 for index in config.backbone_out_indices]
    return Encoder(DPTModel(config, add_pooling_layer=False).float().eval(), taps, apply_layernorm=False)


def _task(config: Any, architecture: str, name: str, kind: str, classes: Sequence[str]) -> Task:
    if architecture == "DPTForSemanticSegmentation":
        labels = config.id2label or {}
        named = tuple(classes) or tuple(str(labels[index]) for index in sorted(labels, key=int))
        return _named(name, kind, "segmentation", architecture, named)
    if classes:
        raise InputError(f"{architecture} predicts depth, which has no classes; leave them out.")
    # DPTs on DINOv2 were trained on depths in metres, all others (MiDaS) on relative inverse depth.
    backbone = getattr(getattr(config, "backbone_config", None), "model_type", "")
    metric = "metric" if "dinov2" in backbone else "relative"
    relative = getattr(config, "depth_estimation_type", metric) == "relative"
    return _named(name, kind, "disparity" if relative else "depth", architecture)


def _named(name: str, kind: str, found: str, architecture: str, classes: tuple[str, ...] = ()) -> Task:
    """The task, unless its name says another sort of prediction than the source's."""
    alike = {"depth": "disparity", "disparity": "depth"}.get(found)
    if not kind and name in KINDS and name not in (found, alike):
        raise InputError(f"{architecture} predicts {found}: name the task otherwise than {name!r}, or say its kind.")
    return Task(name, kind or found, classes)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As simo.json gives them back."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain
