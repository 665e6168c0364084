"""Import experts that were trained elsewhere: models of well-known families, and weight files of any training code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simomerge.core.errors import InputError
from simomerge.datasets.pictures import parse_size
from simomerge.models.importing.dinov2 import is_dinov2_head, read_dinov2_head
from simomerge.models.importing.mapping import read_mapped
from simomerge.models.importing.options import ImportOptions
from simomerge.models.importing.transformers import read_transformers
from simomerge.models.model import SimoModel


def import_expert(source: str | Path, task: str, **options: Any) -> SimoModel:
    """An expert from a model that simomerge did not train.

    There are three kinds of source:

    - A folder or hub id of transformers' Depth Anything or DPT, on any plain encoder. It needs no option.
    - A head that DINOv2 publishes (``dinov2_vitb14_nyu_linear4_head.pth``). ``encoder`` is the encoder that it reads.
    - Any other weight file. ``encoder`` is the architecture that it fine-tuned (usually the base), ``encoder_prefix``
      and ``head_prefix`` say which tensors belong to the encoder and to the head, and ``head`` is the head's class.

    Args:
        source: A folder, a hub id or a weight file (safetensors, or pt, pth, bin with only tensors).
        task: The name of the expert's task.
        **options: ``kind``, ``classes``, ``encoder``, ``encoder_prefix``, ``head_prefix``, ``head``,
            ``head_settings``, ``drop``, ``taps``, ``apply_layernorm``, ``mean``, ``std`` and ``size``; see
            `ImportOptions`.

    Raises:
        InputError: An option that has no effect on this kind of source, an unknown source, or tensors of a weight file
            that are unused or missing. The message lists them.

    Example:
        >>> expert = import_expert("depth-anything/Depth-Anything-V2-Small-hf", "depth")      # doctest: +SKIP
        >>> expert.save_pretrained("experts/depth")                                           # doctest: +SKIP
    """
    chosen = ImportOptions(**options)
    size = None if chosen.size is None else parse_size(chosen.size)
    expert = _read(source, task, chosen)
    if size is not None:
        expert.provenance["training"] = {"size": list(size)}
    return expert


def _read(source: str | Path, task: str, chosen: ImportOptions) -> SimoModel:
    path = Path(source)
    if path.is_file():
        read = read_dinov2_head if is_dinov2_head(path) and not chosen.head else read_mapped
        return read(path, task, chosen)
    if path.suffix in (".safetensors", ".pt", ".pth", ".bin"):
        raise InputError(f"{source}: no such file.")
    return read_transformers(str(source), task, chosen)


__all__ = ["ImportOptions", "import_expert"]
