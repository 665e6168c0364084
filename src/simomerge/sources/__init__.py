"""Experts from elsewhere: models of well-known families, and checkpoints of any training code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simomerge.errors import InputError
from simomerge.model import SimoModel
from simomerge.sources.dinov2 import is_dinov2_head, read_dinov2_head
from simomerge.sources.mapping import read_mapped
from simomerge.sources.predictions import ARCHITECTURES, architecture_of, read_transformers


def import_expert(
    source: str | Path,
    task: str,
    kind: str = "",
    classes: Sequence[str] = (),
    encoder: str | Path | None = None,
    encoder_prefix: str = "",
    head_prefix: str = "",
    head: str = "",
    head_settings: Mapping[str, Any] | None = None,
    drop: Sequence[str] = (),
    taps: Sequence[int] | None = None,
    apply_layernorm: bool | None = None,
) -> SimoModel:
    """An expert from a model that simomerge did not train.

    Three sorts of source are known:

    - a folder or hub id of transformers' Depth Anything or DPT, on any plain encoder: nothing else is needed;
    - a head of DINOv2's own (``dinov2_vitb14_nyu_linear4_head.pth``): ``encoder`` is the encoder it was trained on;
    - any other checkpoint, a weight file: ``encoder`` says which architecture it fine-tuned (usually the base), the
      two prefixes which of its tensors are whose, ``head`` which class they make.

    Args:
        source: folder, hub id or weight file (safetensors, or pt, pth, bin of tensors alone).
        task: what the expert's task is called.
        kind: its kind, where the name does not say it (``"depth"`` of a model of relative depth is ``"disparity"``).
        classes: of a segmentation, where the source does not name them.
        encoder: folder or hub id.
        encoder_prefix, head_prefix: of the tensors' names; without the first, the encoder's weights are those of
            ``encoder``.
        head: ``module:Class`` of a head of your own (see `simomerge.heads.DenseHead`), or a key of
            `simomerge.heads.HEADS`.
        head_settings: its keyword arguments.
        drop: prefixes of tensors that neither needs, such as ``"auxiliary_head."``.
        taps, apply_layernorm: what the head reads, see `simomerge.encoders.Encoder`; known for the first two sorts.

    Raises:
        InputError: an unknown source, or tensors of a mapping that are unused or unfilled; the message lists them.

    Example:
        >>> expert = import_expert("depth-anything/Depth-Anything-V2-Small-hf", "depth")      # doctest: +SKIP
        >>> expert.save_pretrained("experts/depth")                                           # doctest: +SKIP
    """
    path = Path(source)
    if path.is_file():
        if is_dinov2_head(path) and not head:
            return read_dinov2_head(path, task, kind, classes, encoder, taps, apply_layernorm)
        return read_mapped(
            path, task, kind, classes, encoder, encoder_prefix, head_prefix, head, head_settings or {}, drop, taps,
            apply_layernorm,
        )  # fmt: skip
    given = {"encoder": encoder, "encoder_prefix": encoder_prefix, "head_prefix": head_prefix, "head": head}
    if wrong := [name for name, value in given.items() if value]:
        raise InputError(f"{source} is no weight file, and {wrong[0]!r} says how one is read; leave it out.")
    return read_transformers(str(source), task, kind, classes)


__all__ = ["ARCHITECTURES", "architecture_of", "import_expert"]
