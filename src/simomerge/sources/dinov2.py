"""The heads that DINOv2 publishes: linear (one or four taps) for depth and segmentation, DPT for depth.

Source: "DINOv2" (arXiv 2304.07193). The files hold the head alone, as ``decode_head.*``; the encoder is frozen DINOv2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from simomerge.checkpoints import Checkpoint, open_checkpoint
from simomerge.encoders import Encoder, default_taps
from simomerge.errors import InputError
from simomerge.heads import BinnedDepthHead, LinearHead, TransformersHead
from simomerge.model import SimoModel
from simomerge.sources.mapping import encoder_of, fill, source_of
from simomerge.tasks import Task

MIN_DEPTH = 0.001
"""Metres; the least depth that DINOv2's heads predict."""

MAX_DEPTH = {"kitti": 80.0}
"""Metres, by a word in the file's name; 10 (NYUv2, SUN RGB-D) else."""

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


def read_dinov2_head(
    file: Path,
    task: str,
    kind: str,
    classes: Sequence[str],
    encoder: str | Path | None,
    taps: Sequence[int] | None,
    apply_layernorm: bool | None,
) -> SimoModel:
    """The expert; see `simomerge.sources.import_expert`."""
    if not encoder:
        raise InputError(f"{file} holds a head of DINOv2 alone: give --encoder, the DINOv2 it reads.")
    weights = open_checkpoint(file)
    plain = encoder_of(str(encoder), None, None)
    sort = _sort(weights, file)
    width, depth = plain.channels[0], len(plain.anatomy.tapped)
    # As DINOv2's configurations have it: depth heads read raw blocks, segmentation heads normalised ones.
    if sort == "dpt":
        wanted = default_taps(depth)
    else:
        columns = weights.info(f"decode_head.{'conv_depth' if sort == 'depth' else 'conv_seg'}.weight").shape[1]
        each = width * (2 if sort == "depth" else 1)
        if columns not in (each, 4 * each):
            raise InputError(f"{file} reads {columns} channels, and {encoder} gives {width} a tap: another DINOv2.")
        last = tuple(range(depth - 3, depth + 1)) if sort == "segmentation" else default_taps(depth)
        wanted = last if columns == 4 * each else (depth,)
    normed = sort == "segmentation" if apply_layernorm is None else apply_layernorm
    reader = encoder_of(str(encoder), taps or wanted, normed)
    described = Task(task, kind or ("segmentation" if sort == "segmentation" else "depth"), tuple(classes))
    head = _build(sort, weights, reader, described, file)
    return SimoModel(reader, {task: described}, {task: head}, source_of(str(file), f"DINOv2 {sort} head")).eval()


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
        fill(Renamed(weights), {"neck.": head.neck, "head.": head.head})
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
