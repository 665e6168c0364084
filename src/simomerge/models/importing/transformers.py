"""Depth Anything and DPT of transformers as experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simomerge.checkpoints import open_checkpoint
from simomerge.core.errors import InputError
from simomerge.core.hub import local_source
from simomerge.core.text import first_line
from simomerge.datasets.tasks import KINDS, Task
from simomerge.models.encoders import Encoder
from simomerge.models.encoders.allocation import check_numbers, check_size
from simomerge.models.encoders.layout import find_layout
from simomerge.models.encoders.loading import choose_attention, quiet, without_pooler
from simomerge.models.encoders.other_models import check_no_other_model
from simomerge.models.encoders.preprocessing import read_normalisation
from simomerge.models.heads.transformers import ARCHITECTURES, TransformersHead, check_not_hybrid
from simomerge.models.importing.mapping import fill
from simomerge.models.importing.options import ImportOptions, as_imported
from simomerge.models.model import SimoModel

_HEAD_SETTINGS = (
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
"""The entries of a configuration on which the head depends."""


def read_transformers(source: str, task: str, options: ImportOptions) -> SimoModel:
    """The expert in a folder or hub id; see `simomerge.import_expert`."""
    options.check_used(source, "a folder or hub id describes itself")
    given, source = source, local_source(source)
    config = _config(source)
    architecture = _architecture(config)
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{source}: a {architecture or config.model_type}, but only {', '.join(ARCHITECTURES)} can be imported from"
            " a folder; give a weight file with --encoder, --encoder-prefix, --head-prefix and --head."
        )
    check_not_hybrid(config, f"{source}: ")
    check_numbers(Path(source) / "config.json", config.to_dict())
    weights = open_checkpoint(source)
    try:
        described = _task(config, architecture, task, options)
        check_size(source, config, lambda given: nn.ModuleList(_parts(given, source, architecture, described)))
        encoder, head = _parts(config, source, architecture, described)
    except InputError:
        raise
    except Exception as error:  # transformers raises many kinds of errors for configurations that contradict themselves
        raise InputError(
            f"{source}: config.json describes no {architecture} that can be built ({first_line(error)}); take it from"
            " its source again."
        ) from error
    prefix = "backbone." if getattr(config, "backbone_config", None) is not None else "dpt."
    fill(
        weights,
        {prefix: encoder.backbone, "neck.": head.neck, "head.": head.head},
        drop=("auxiliary_head.", f"{prefix}pooler."),
        optional=(f"{prefix}embeddings.mask_token",),
    )
    return as_imported(encoder, described, head, given, architecture)


def _parts(config: Any, source: str, architecture: str, described: Task) -> tuple[Encoder, TransformersHead]:
    """The encoder and the head that a configuration describes, without weights."""
    encoder = _encoder(config, source)
    settings = {name: getattr(config, name) for name in _HEAD_SETTINGS if hasattr(config, name)}
    if architecture == "DPTForSemanticSegmentation":
        settings["num_labels"] = described.channels
    settings = json.loads(json.dumps(settings))  # the same values as after loading simo.json
    return encoder, TransformersHead(encoder.channels, described.channels, architecture, settings)


def source_model(source: str) -> nn.Module | None:
    """The source of an imported expert as transformers runs it; None if transformers cannot run it."""
    import transformers

    source = local_source(source)
    config = _config(source)
    architecture = _architecture(config)
    backbone = getattr(config, "backbone_config", None)
    if architecture == "DPTForSemanticSegmentation" and backbone is not None:
        return None  # transformers would run it with an encoder of its own
    if getattr(backbone, "num_register_tokens", 0) and not getattr(backbone, "reshape_hidden_states", True):
        return None  # transformers takes the registers for patches and fails
    with quiet():
        model: nn.Module = getattr(transformers, architecture).from_pretrained(
            source, config=config, dtype=torch.float32, trust_remote_code=False
        )
    return model.eval()


@torch.no_grad()
def largest_difference(expert: SimoModel, model: nn.Module, size: tuple[int, int] | None = None) -> tuple[float, float]:
    """Compare an expert's logits with those of its source on a random image.

    Args:
        expert: An expert with one task.
        model: The source; see `source_model`.
        size: Size of the image in pixels, in whole patches; by default sixteen patches per side.

    Returns:
        The largest absolute difference, and the largest absolute value.
    """
    (task,) = expert.tasks
    side = expert.encoder.multiple * 16
    image = torch.rand(1, 3, *(size or (side, side)), generator=torch.Generator().manual_seed(0))
    output: Any = model(pixel_values=(image - expert.encoder.mean) / expert.encoder.std)
    theirs: Tensor = output.logits if hasattr(output, "logits") else output.predicted_depth[:, None]
    theirs = nn.functional.interpolate(theirs, image.shape[-2:], mode="bilinear", align_corners=False)
    ours = expert(image)[task]
    return float((ours - theirs).abs().max()), float(theirs.abs().max())


def _config(source: str) -> Any:
    """The configuration in a folder or of a hub id, with an attention that simomerge chooses."""
    from transformers import AutoConfig, PretrainedConfig

    file = Path(source) / "config.json"
    with quiet():
        try:
            check_no_other_model(file, PretrainedConfig.get_config_dict(source)[0])
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{source}: not a model folder, not a weight file, and as a hub id it cannot be loaded"
                f" ({first_line(error)}). Download it while online and give its folder."
            ) from error
    check_no_other_model(file, config.to_dict())  # its class may name one by default
    choose_attention(config)
    return config


def _architecture(config: Any) -> str:
    """The class that config.json names first; empty if it names none."""
    named = config.architectures
    return str(named[0]) if isinstance(named, list) and named else ""


def _encoder(config: Any, source: str) -> Encoder:
    """The encoder, without weights: the model in ``backbone_config``, or DPT's own transformer."""
    from transformers import AutoModel, DPTModel

    backbone_config = getattr(config, "backbone_config", None)
    with quiet():
        if backbone_config is None:
            backbone = DPTModel(config, add_pooling_layer=False)
            taps = [int(index) + 1 for index in config.backbone_out_indices]
        else:
            model = AutoModel.from_config(backbone_config, dtype=torch.float32, trust_remote_code=False)
            backbone = without_pooler(model)
            taps = [int(index) for index in backbone_config.out_indices]
    layout = find_layout(backbone)
    if layout.is_pyramid:
        raise InputError(
            f"{source}: its encoder is a {type(backbone).__name__}, a pyramid. Only Depth Anything and DPT on plain"
            " transformers can be imported."
        )
    # Without this setting, backbone classes apply no layer norm. DPT's own norm is only read by its pooler.
    normed = bool(getattr(backbone_config, "apply_layernorm", False))
    return Encoder(backbone.float().eval(), taps, *read_normalisation(source), normed, layout)


def _task(config: Any, architecture: str, name: str, options: ImportOptions) -> Task:
    """The task that the source predicts. Raises InputError if the task's name says another kind."""
    classes = tuple(options.classes)
    if architecture == "DPTForSemanticSegmentation":
        labels = config.id2label or {}
        classes = classes or tuple(str(labels[index]) for index in sorted(labels, key=int))
        kind, accepted = "segmentation", ["segmentation"]
    elif classes:
        raise InputError(f"{architecture} predicts depth, which has no classes; leave them out.")
    else:
        # DPTs on DINOv2 were trained on depths in metres, all others (MiDaS) on relative inverse depth.
        backbone = getattr(getattr(config, "backbone_config", None), "model_type", "")
        metric = "metric" if "dinov2" in backbone else "relative"
        relative = getattr(config, "depth_estimation_type", metric) == "relative"
        kind, accepted = "disparity" if relative else "depth", ["depth", "disparity"]
    if not options.kind and name in KINDS and name not in accepted:
        raise InputError(f"{architecture} predicts {kind}: choose another task name than {name!r}, or give its kind.")
    return Task(name, options.kind or kind, classes)
