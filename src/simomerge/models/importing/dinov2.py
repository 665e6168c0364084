"""The heads that DINOv2 publishes: linear (one or four taps) for depth and segmentation, DPT for depth.

Source: "DINOv2" (arXiv 2304.07193). The files hold the head alone, as ``decode_head.*``; the encoder is frozen DINOv2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from simomerge.checkpoints import Checkpoint, open_checkpoint
from simomerge.core.errors import InputError
from simomerge.datasets.tasks import Task
from simomerge.models.encoders import Encoder, default_taps
from simomerge.models.heads import BinnedDepthHead, LinearHead, TransformersHead
from simomerge.models.importing.mapping import Reading, fill, source_of
from simomerge.models.model import SimoModel

MIN_DEPTH = 0.001
"""Metres; the least depth that DINOv2's heads predict."""

MAX_DEPTH = {"kitti": 80.0}
"""Metres, by a word in the file's name; 10 (NYUv2, SUN RGB-D) else."""

FOUR_TAPS = {12: (3, 6, 9, 12), 24: (5, 12, 18, 24), 40: (10, 20, 30, 40)}
"""Depth of the encoder -> the blocks, counted from 1, that depth heads of four taps read (dinov2/hub/depthers.py)."""

_DPT_NAMES = (
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
    """Whether a weight file holds a head of DINOv2's own and nothing else."""
    if file.suffix not in (".pth", ".pt", ".safetensors"):
        return False
    names = list(open_checkpoint(file))
    return bool(names) and all(name.startswith("decode_head.") for name in names)


def read_dinov2_head(file: Path, task: str, kind: str, classes: Sequence[str], reading: Reading) -> SimoModel:
    """The expert; see `simomerge.models.importing.import_expert`."""
    if not reading.encoder:
        raise InputError(f"{file} holds a head of DINOv2 alone: give --encoder, the DINOv2 it reads.")
    reading.allow_only(str(file), "a head of DINOv2's own", "encoder", "taps", "apply_layernorm", "mean", "std")
    weights = open_checkpoint(file)
    sort = _sort(weights, file)
    plain = replace(reading, taps=None).load_encoder()
    # As DINOv2's configurations have it: depth heads read raw blocks, segmentation heads normalised ones.
    encoder = reading.load_encoder(_taps(sort, weights, plain, file), sort == "segmentation")
    described = Task(task, kind or ("segmentation" if sort == "segmentation" else "depth"), tuple(classes))
    head = _build(sort, weights, encoder, described, file)
    return SimoModel(encoder, {task: described}, {task: head}, source_of(str(file), f"DINOv2 {sort} head")).eval()


def _taps(sort: str, weights: Checkpoint, encoder: Encoder, file: Path) -> tuple[int, ...]:
    """The blocks that the head reads, by how many channels it reads."""
    width, depth = encoder.channels[0], len(encoder.anatomy.tapped)
    four = FOUR_TAPS.get(depth, default_taps(depth))
    if sort == "dpt":
        return four
    layer, each = ("conv_depth", 2 * width) if sort == "depth" else ("conv_seg", width)
    columns = weights.info(f"decode_head.{layer}.weight").shape[1]
    if columns not in (each, 4 * each):
        raise InputError(f"{file} reads {columns} channels, and the encoder gives {width} a tap: another DINOv2.")
    if columns == each:
        return (depth,)
    return tuple(range(depth - 3, depth + 1)) if sort == "segmentation" else four


def _sort(weights: Checkpoint, file: Path) -> str:
    for sort, name in (
        ("dpt", "project.conv.weight"),
        ("depth", "conv_depth.weight"),
        ("segmentation", "conv_seg.weight"),
    ):
        if f"decode_head.{name}" in weights:
            return sort
    raise InputError(
        f"{file}: a head of another sort than DINOv2's linear and DPT ones; name its class by --head and --head-prefix."
    )


def _build(sort: str, weights: Checkpoint, encoder: Encoder, task: Task, file: Path) -> nn.Module:
    limit = next((depth for word, depth in MAX_DEPTH.items() if word in file.name.lower()), 10.0)
    if sort == "segmentation":
        head: nn.Module = LinearHead(encoder.channels, task.channels, cls=False)
        assert isinstance(head, LinearHead)
        fill(weights, {"decode_head.bn.": head.norm, "decode_head.conv_seg.": head.output})
    elif sort == "depth":
        bins = weights.info("decode_head.conv_depth.weight").shape[0]
        head = BinnedDepthHead(encoder.channels, 1, True, bins, MIN_DEPTH, limit)
        fill(weights, {"decode_head.conv_depth.": head.output})
    else:
        head = TransformersHead(encoder.channels, 1, "DPTForDepthEstimation", _dpt_config(weights), MIN_DEPTH)
        # Its coarsest fusion has nothing to add a skip to.
        unused = ["neck.fusion_stage.layers.0.residual_layer1."]
        fill(Renamed(weights), {"neck.": head.neck, "head.": head.head}, may_lack=unused)
    return head


def _dpt_config(weights: Checkpoint) -> dict[str, Any]:
    sizes = [weights.info(f"decode_head.reassemble_blocks.projects.{i}.conv.weight").shape[0] for i in range(4)]
    return {
        "neck_hidden_sizes": sizes,
        "fusion_hidden_size": weights.info("decode_head.convs.0.conv.weight").shape[0],
        "readout_type": "project",
        "use_bias_in_fusion_residual": False,
        "add_projection": True,
    }


class Renamed(Checkpoint):
    """A checkpoint of DINOv2's DPT head under the names of transformers' DPT."""

    def __init__(self, weights: Checkpoint) -> None:
        entries = {}
        for name, entry in weights._entries.items():
            new = name.removeprefix("decode_head.")
            for pattern, target in _DPT_NAMES:
                new = re.sub(pattern, target, new)
            # conv_depth.conv_depth is a layer that DINOv2's DPT never uses.
            if not new.startswith("conv_depth."):
                entries[new] = entry
        super().__init__(weights.path, entries)
