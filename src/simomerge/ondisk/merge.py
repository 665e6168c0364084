"""Merge from disk to disk: one tensor of each model in memory, and neither torch nor transformers imported."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.assets import resolve_source
from simomerge.checkpoints import (
    Checkpoint,
    TensorInfo,
    atomic_folder,
    check_same_encoder,
    fingerprint,
    is_lora_folder,
    model_card,
    only_task,
    open_checkpoint,
    open_lora,
    read_description,
    tensor_info,
    write_safetensors,
    write_sharded,
)
from simomerge.errors import InputError
from simomerge.merging import MergeMethod, Schedule, as_schedule, describe_method, get_method, merge_tensors
from simomerge.progress import Progress, silent

CONFIGS = ("config.json", "preprocessor_config.json")
"""What belongs to the weights of a transformers folder."""

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "F32": "F32", "F16": "F16", "BF16": "BF16"}


@dataclass(frozen=True)
class Source:
    """A base or an expert on disk.

    Attributes:
        path: a weight file, a transformers folder, a model folder, or (experts) a peft adapter folder.
        weights: of its encoder, lazy.
        description: simo.json of a model folder, else None.
    """

    path: Path
    weights: Mapping[str, Any]
    description: dict[str, Any] | None

    def origin(self) -> dict[str, str]:
        """Its name and what its weights are; no path: what is shared says nothing of the machine it was made on."""
        return {"source": self.path.name, "fingerprint": fingerprint(self.weights)}

    def encoder_folder(self) -> Path:
        """Where config.json is looked for."""
        if self.path.is_file():
            return self.path.parent
        return self.path / "encoder" if self.description else self.path


def open_source(path: str | os.PathLike[str], base: Checkpoint | None = None) -> Source:
    """Open a base, or with ``base`` an expert of it, without reading a value.

    Raises:
        InputError: nothing there, or damaged.
    """
    path = Path(resolve_source(os.fspath(path)))
    if base is not None and is_lora_folder(path):
        return Source(path, open_lora(path, base), None)
    description = read_description(path) if (path / "simo.json").is_file() else None
    return Source(path, open_checkpoint(path), description)


@dataclass(frozen=True)
class MergedOnDisk:
    """What a merge wrote: where, how, and with which tasks (none where only weights were merged)."""

    output: Path
    merge: dict[str, Any]
    tasks: tuple[str, ...]


def merge_on_disk(
    base: str | os.PathLike[str],
    experts: Mapping[str, str | os.PathLike[str]],
    output: str | os.PathLike[str],
    method: str | MergeMethod = "task-arithmetic",
    schedule: Schedule | Sequence[float] | str | None = None,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
    **parameters: Any,
) -> MergedOnDisk:
    """Merge experts' encoders from disk to disk, streaming.

    Where every expert is a model folder and ``output`` is not named ``*.safetensors``, the result is a model
    folder with all the heads. Else only weights are merged: into one file, or into a transformers folder.

    Args:
        base: the base: a weight file, a transformers or model folder, or ``rooms-base``.
        experts: expert name (for model folders: the task) -> the same, or a peft LoRA adapter folder.
        output: a folder, or a file ``*.safetensors``.
        method, schedule, threads, **parameters: see `simomerge.merging.merge_tensors`.
        dtype: storage of the merged floats: ``"float32"``, ``"float16"`` or ``"bfloat16"``; as the base's by default.
        max_shard_size: bytes; larger weights are written as shards with an index (folders only).
        overwrite: replace the output where it exists.

    Raises:
        InputError: an output that exists, a damaged or missing input, models that do not fit each other, a base
            that is not the experts' base, an unknown method, parameter or dtype, no space left. Nothing is
            written then.

    Example:
        >>> for name, value in (("base", 0), ("depth", 1), ("normals", 2)):
        ...     _ = write_safetensors(f"{name}.safetensors", {"w": np.full(2, value, np.float32)})
        >>> experts = {"depth": "depth.safetensors", "normals": "normals.safetensors"}
        >>> merged = merge_on_disk("base.safetensors", experts, "merged.safetensors", "average")
        >>> open_checkpoint(merged.output)["w"]
        array([1.5, 1.5], dtype=float32)
    """
    output = Path(output)
    chosen = method if isinstance(method, MergeMethod) else get_method(method, **parameters)
    depthwise = as_schedule(schedule)
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: use float32, float16 or bfloat16.")
    if output.exists() and not overwrite:
        raise InputError(f"{output} already exists: choose another path, or pass overwrite to replace it.")
    foundation = open_source(base)
    assert isinstance(foundation.weights, Checkpoint)
    opened = {name: open_source(path, foundation.weights) for name, path in experts.items()}
    layout = {name: tensor_info(foundation.weights, name) for name in foundation.weights}
    weights = {name: expert.weights for name, expert in opened.items()}
    tensors = merge_tensors(foundation.weights, weights, chosen, depthwise, threads=threads)
    stored = DTYPES[dtype] if dtype else None
    how = describe_method(chosen, depthwise)
    if output.suffix != ".safetensors" and all(expert.description for expert in opened.values()):
        provenance = _provenance(foundation, opened, how)
        write_model(output, opened, provenance, tensors, layout, stored, max_shard_size, overwrite, progress)
        return MergedOnDisk(output, how, tuple(opened))
    shown = _counted(tensors, len(layout), progress)
    if output.suffix == ".safetensors":
        write_safetensors(output, shown, stored, layout=layout)
    else:
        with atomic_folder(output, overwrite) as folder:
            write_sharded(folder, shown, stored, layout=layout, max_shard_size=max_shard_size)
            _copy_configs(foundation.encoder_folder(), folder)
    return MergedOnDisk(output, how, ())


def _counted(
    tensors: Iterator[tuple[str, np.ndarray]], total: int, progress: Progress
) -> Iterator[tuple[str, np.ndarray]]:
    for done, pair in enumerate(tensors, start=1):
        yield pair
        progress("merge", done, total, "")


def write_model(
    output: Path,
    heads: Mapping[str, Source],
    provenance: Mapping[str, Any],
    tensors: Iterator[tuple[str, np.ndarray]],
    layout: Mapping[str, TensorInfo],
    dtypes: str | Mapping[str, str] | None = None,
    max_shard_size: int | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> None:
    """Write a model folder of merged weights.

    Args:
        heads: task -> the model folder whose head (and definition of the task) it takes.
        provenance: what simo.json says the model was made of.
        tensors, layout, dtypes, max_shard_size: see `simomerge.checkpoints.write_sharded`.

    Raises:
        InputError: heads that cannot share one encoder, a missing head, no space left.
    """
    described = {task: only_task(source.description or {}, task) for task, source in heads.items()}
    check_same_encoder(described)
    for source in heads.values():
        if not (source.encoder_folder() / "config.json").is_file():
            raise InputError(
                f"{source.encoder_folder() / 'config.json'}: missing; take the model from its source again."
            )
    first = next(iter(described.values()))  # taps and normalisation are the experts', not the base folder's
    description = {
        **first,
        "tasks": {task: one["tasks"][task] for task, one in described.items()},
        "heads": {task: one["heads"][task] for task, one in described.items()},
        "adapters": None,
        "provenance": provenance,
    }
    with atomic_folder(output, overwrite) as folder:
        (folder / "heads").mkdir()
        for task, source in heads.items():
            _copy_head(source, task, folder / "heads" / f"{task}.safetensors")
        shown = _counted(tensors, len(layout), progress)
        write_sharded(folder / "encoder", shown, dtypes, layout=layout, max_shard_size=max_shard_size)
        _copy_configs(next(iter(heads.values())).encoder_folder(), folder / "encoder")
        (folder / "simo.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(description), encoding="utf-8")


def _provenance(base: Source, experts: Mapping[str, Source], how: dict[str, Any]) -> dict[str, Any]:
    """What the model is made of, after comparing what the experts say of their base with the given one."""
    origin = base.origin()
    for task, expert in experts.items():
        recorded = (expert.description or {})["provenance"].get("base", {})
        theirs = recorded.get("fingerprint")
        if theirs and theirs != origin["fingerprint"]:
            raise InputError(
                f"expert {task!r} was fine-tuned from another base (its base {theirs[:12]}, the given one"
                f" {origin['fingerprint'][:12]}); give {recorded.get('source', 'that base')}."
            )
    return {"base": origin, "experts": {task: expert.origin() for task, expert in experts.items()}, "merge": how}


def _copy_head(expert: Source, task: str, target: Path) -> None:
    tasks = (expert.description or {})["tasks"]
    head = expert.path / "heads" / f"{task if task in tasks else next(iter(tasks))}.safetensors"
    if not head.is_file():
        raise InputError(f"{head}: missing; take the model from its source again.")
    open_checkpoint(head)  # a truncated one is told now, not when the model is loaded
    shutil.copyfile(head, target)


def _copy_configs(source: Path, target: Path) -> None:
    for name in CONFIGS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
