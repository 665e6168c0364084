"""The heads that DINOv2 publishes: linear (one or four taps) for depth and segmentation, DPT for depth.

Source: "DINOv2" (arXiv 2304.07193). A file holds the head only, as ``decode_head.*``; the encoder is frozen DINOv2.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from simomerge.checkpoints import Checkpoint, open_checkpoint
from simomerge.core.errors import InputError
from simomerge.datasets.tasks import Task
from simomerge.models.encoders import Encoder
from simomerge.models.encoders.encoder import default_taps
from simomerge.models.heads.binned import BinnedDepthHead
from simomerge.models.heads.linear import LinearHead
from simomerge.models.heads.transformers import TransformersHead
from simomerge.models.importing.mapping import fill
from simomerge.models.importing.options import ImportOptions, as_imported
from simomerge.models.model import SimoModel

MIN_DEPTH = 0.001
"""The minimum depth in metres that DINOv2's heads predict."""

MAX_DEPTH = {"kitti": 80.0}
"""Word in the file's name -> maximum depth in metres; for other files (NYUv2, SUN RGB-D) it is 10."""

FOUR_TAPS = {12: (3, 6, 9, 12), 24: (5, 12, 18, 24), 40: (10, 20, 30, 40)}
"""Depth of the encoder -> the blocks, counted from 1, that depth heads of four taps read (dinov2/hub/depthers.py)."""

_LAYERS = {"dpt": "project.conv", "depth": "conv_depth", "segmentation": "conv_seg"}
"""Type of head -> a layer that only this type has, checked in this order."""

_DPT_NAMES = (
    (r"^decode_head\.", ""),
    (r"^reassemble_blocks\.projects\.(\d)\.conv\.", r"neck.reassemble_stage.layers.\1.projection."),
    (r"^reassemble_blocks\.readout_projects\.(\d)\.0\.", r"neck.reassemble_stage.readout_projects.\1.0."),
    (r"^reassemble_blocks\.resize_layers\.(\d)\.", r"neck.reassemble_stage.layers.\1.resize."),
    (r"^convs\.(\d)\.conv\.", r"neck.convs.\1."),
    (r"^fusion_blocks\.(\d)\.project\.conv\.", r"neck.fusion_stage.layers.\1.projection."),
    (
        r"^fusion_blocks\.(\d)\.res_conv_unit(\d)\.conv(\d)\.conv\.",
        r"neck.fusion_stage.layers.\1.residual_layer\2.convolution\3.",
    ),
    (r"^project\.conv\.", r"head.projection."),
    (r"^conv_depth\.head\.(\d)\.", r"head.head.\1."),
)


def is_dinov2_head(file: Path) -> bool:
    """Whether a weight file holds only a head that DINOv2 publishes."""
    names = list(open_checkpoint(file))
    return bool(names) and all(name.startswith("decode_head.") for name in names)


def read_dinov2_head(file: Path, task: str, options: ImportOptions) -> SimoModel:
    """The expert with a published head; see `simomerge.import_expert`."""
    if not options.encoder:
        raise InputError(f"{file} holds only a head of DINOv2: give --encoder, the DINOv2 that it reads.")
    used = ("encoder", "taps", "apply_layernorm", "mean", "std")
    options.check_used(str(file), "the file is a head that DINOv2 publishes", *used)
    weights = open_checkpoint(file)
    found = [name for name, layer in _LAYERS.items() if f"decode_head.{layer}.weight" in weights]
    if not found:
        raise InputError(
            f"{file}: not one of DINOv2's linear and DPT heads; name the class of the head by --head and --head-prefix."
        )
    head_type = found[0]
    # In DINOv2's configurations, depth heads read blocks without the layer norm, segmentation heads with it.
    encoder = replace(options, taps=None).load_encoder(apply_layernorm=head_type == "segmentation")
    taps = _taps(head_type, weights, encoder, file)
    encoder.set_taps(options.taps or taps)
    kind = "segmentation" if head_type == "segmentation" else "depth"
    described = Task(task, options.kind or kind, tuple(options.classes))
    head = _build(head_type, weights, encoder, described, file)
    return as_imported(encoder, described, head, str(file), f"DINOv2 {head_type} head")


def _taps(head_type: str, weights: Checkpoint, encoder: Encoder, file: Path) -> tuple[int, ...]:
    """The blocks that the head reads, from the number of its input channels."""
    width, depth = encoder.channels[0], len(encoder.layout.channels)
    four = FOUR_TAPS.get(depth, default_taps(depth))
    if head_type == "dpt":
        return four
    each = 2 * width if head_type == "depth" else width
    columns = weights.info(f"decode_head.{_LAYERS[head_type]}.weight").shape[1]
    if columns not in (each, 4 * each):
        raise InputError(f"{file} reads {columns} channels, but the encoder gives {width} per tap: another DINOv2.")
    if columns == each:
        return (depth,)
    return tuple(range(depth - 3, depth + 1)) if head_type == "segmentation" else four


def _build(head_type: str, weights: Checkpoint, encoder: Encoder, task: Task, file: Path) -> nn.Module:
    """The head, with the weights of the file."""
    limit = next((depth for word, depth in MAX_DEPTH.items() if word in file.name.lower()), 10.0)
    if head_type == "segmentation":
        linear = LinearHead(encoder.channels, task.channels, cls=False)
        fill(weights, {"decode_head.bn.": linear.norm, "decode_head.conv_seg.": linear.output})
        return linear
    if head_type == "depth":
        bins = weights.info("decode_head.conv_depth.weight").shape[0]
        binned = BinnedDepthHead(encoder.channels, 1, True, bins, MIN_DEPTH, limit)
        fill(weights, {"decode_head.conv_depth.": binned.output})
        return binned
    limits = (MIN_DEPTH, limit)  # DINOv2 clamps the output of every depth head
    dpt = TransformersHead(encoder.channels, 1, "DPTForDepthEstimation", _dpt_config(weights), MIN_DEPTH, limits)
    # DINOv2's DPT never uses its layer conv_depth. Its coarsest fusion has no skip connection to refine.
    optional = ["neck.fusion_stage.layers.0.residual_layer1."]
    fill(weights, {"neck.": dpt.neck, "head.": dpt.head}, ["conv_depth."], optional, _dpt_name)
    return dpt


def _dpt_config(weights: Checkpoint) -> dict[str, Any]:
    sizes = [weights.info(f"decode_head.reassemble_blocks.projects.{i}.conv.weight").shape[0] for i in range(4)]
    return {
        "neck_hidden_sizes": sizes,
        "fusion_hidden_size": weights.info("decode_head.convs.0.conv.weight").shape[0],
        "readout_type": "project",
        "use_bias_in_fusion_residual": False,
        "add_projection": True,
    }


def _dpt_name(name: str) -> str:
    """The name in transformers' DPT of a tensor of DINOv2's DPT head."""
    for pattern, target in _DPT_NAMES:
        name = re.sub(pattern, target, name)
    return name
