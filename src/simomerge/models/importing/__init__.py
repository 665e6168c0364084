"""Import experts that were trained elsewhere: models of well-known families, and weight files of any training code."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from simomerge.checkpoints.lora import is_lora_folder
from simomerge.core.errors import InputError
from simomerge.core.hub import local_source, similar
from simomerge.core.model_files import file_and_key, is_weight_file
from simomerge.core.pixels import height_width
from simomerge.core.registry import check_known
from simomerge.core.text import first_sentence
from simomerge.models.heads import head_kind
from simomerge.models.importing.adapter import read_adapter
from simomerge.models.importing.dinov2 import is_dinov2_head, read_dinov2_head
from simomerge.models.importing.mapping import read_mapped
from simomerge.models.importing.options import ImportOptions
from simomerge.models.importing.transformers import read_transformers
from simomerge.models.model import SimoModel

_SIDE = 128
"""About the side in pixels of the image on which an imported head is tried."""


def import_expert(source: str | Path, task: str, **options: Any) -> SimoModel:
    """An expert from a model that simomerge did not train.

    There are four kinds of source:

    - A folder or hub id of transformers' Depth Anything or DPT, on any plain encoder. It needs no option.
    - A head that DINOv2 publishes (``dinov2_vitb14_nyu_linear4_head.pth``). ``encoder`` is the encoder that it reads.
    - Any other weight file. ``encoder`` is the architecture that it fine-tuned (usually the base), ``encoder_prefix``
      and ``head_prefix`` say which tensors belong to the encoder and to the head, and ``head`` is the head's class.
    - The folder of a peft LoRA adapter with a head in it (``modules_to_save``). ``encoder`` is the base that it was
      trained on, and ``head`` and ``head_prefix`` describe the head. The adapter is folded into the encoder.

    Args:
        source: A folder, a hub id or a weight file; ``FILE::KEY`` names one of several sets of weights in it. See
            `simomerge.checkpoints.open_checkpoint`.
        task: The name of the expert's task.
        **options: ``kind``, ``classes``, ``encoder``, ``encoder_prefix``, ``head_prefix``, ``head``,
            ``head_settings``, ``drop``, ``taps``, ``apply_layernorm``, ``mean``, ``std`` and ``size``; see
            `ImportOptions`.

    Raises:
        InputError: An unknown option, one that has no effect on this kind of source, an unknown source, tensors of a
            weight file that are unused or missing (the message lists them), or a head that fails on the encoder's
            features.

    Example:
        >>> expert = import_expert("depth-anything/Depth-Anything-V2-Small-hf", "depth")      # doctest: +SKIP
        >>> expert.save_pretrained("experts/depth")                                           # doctest: +SKIP
    """
    check_known("import_expert", options, [spec.name for spec in fields(ImportOptions)], "option")
    chosen = ImportOptions(**options)
    size = None if chosen.size is None else height_width(chosen.size)
    expert = _read(source, task, chosen)
    _try(expert, source, task)
    if size is not None:
        expert.provenance["training"] = {"size": list(size)}
    return expert


def _read(source: str | Path, task: str, chosen: ImportOptions) -> SimoModel:
    place = local_source(source)
    if Path(file_and_key(place)[0]).is_file():
        read = read_dinov2_head if not chosen.head and is_dinov2_head(Path(place)) else read_mapped
        return read(Path(place), task, chosen)
    if is_weight_file(place):
        raise InputError(f"{source}: no such file.{similar(file_and_key(place)[0])}")
    if is_lora_folder(place):
        return read_adapter(Path(place), str(source), task, chosen)
    return read_transformers(str(source), task, chosen)


def _try(expert: SimoModel, source: str | Path, task: str) -> None:
    """Raise InputError if the head fails on the features of a small image, as it would at the first photo."""
    multiple, wanted = expert.encoder.multiple, expert.tasks[task].channels
    side = max(1, _SIDE // multiple) * multiple
    kind = head_kind(expert.heads[task])
    part = "the encoder fails on an image"
    try:
        with torch.no_grad():
            features = expert.eval().encode(torch.full((1, 3, side, side), 0.5))
            part = f"the head {kind} fails on the encoder's features"
            found = tuple(expert.decode(features)[task].shape)
    except Exception as error:  # both may be of any class
        raise InputError(
            f"{source}: {part} ({type(error).__name__}: {first_sentence(error)}). Check --taps, --head, --head-arg and"
            " the source's config.json."
        ) from error
    if len(found) != 4 or found[1] != wanted:
        raise InputError(
            f"{source}: the head {kind} gives {found} for one image, and the task {task!r} needs (1, {wanted}, height,"
            " width). Check --kind, --classes and --head-arg."
        )


__all__ = ["ImportOptions", "import_expert"]
