"""Experts from elsewhere: models of well-known families, and checkpoints of any training code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simomerge.core.errors import InputError
from simomerge.models.importing.dinov2 import is_dinov2_head, read_dinov2_head
from simomerge.models.importing.mapping import Reading, read_mapped
from simomerge.models.importing.predictions import ARCHITECTURES, architecture_of, read_transformers
from simomerge.models.model import SimoModel


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
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
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
        head: ``module:Class`` of a head of your own (see `simomerge.models.heads.DenseHead`), or a key of
            `simomerge.models.heads.HEADS`.
        head_settings: its keyword arguments.
        drop: prefixes of tensors that neither needs, such as ``"auxiliary_head."``.
        taps, apply_layernorm: what the head reads, see `Encoder`; known for the first two sorts.
        mean, std: RGB normalisation of a weight file's images, where it is not that of ``encoder``.

    Raises:
        InputError: something given that this sort of source has no use for; an unknown source, or tensors of a mapping
            that are unused or unfilled; the message lists them.

    Example:
        >>> expert = import_expert("depth-anything/Depth-Anything-V2-Small-hf", "depth")      # doctest: +SKIP
        >>> expert.save_pretrained("experts/depth")                                           # doctest: +SKIP
    """
    reading = Reading(
        encoder, encoder_prefix, head_prefix, head, head_settings or {}, drop, taps, apply_layernorm, mean, std
    )  # fmt: skip
    path = Path(source)
    if path.is_file():
        read = read_dinov2_head if is_dinov2_head(path) and not head else read_mapped
        return read(path, task, kind, classes, reading)
    if path.suffix in (".safetensors", ".pt", ".pth", ".bin"):
        raise InputError(f"{source}: no such file.")
    reading.allow_only(str(source), "a folder or hub id says itself how it is read")
    return read_transformers(str(source), task, kind, classes)


__all__ = ["ARCHITECTURES", "architecture_of", "import_expert"]
