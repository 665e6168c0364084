"""Merge from disk to disk: one tensor of each model in memory, and neither torch nor transformers imported."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.checkpoints import (
    Checkpoint,
    TensorInfo,
    canonicalise,
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
from simomerge.core.assets import resolve_source
from simomerge.core.errors import InputError
from simomerge.core.files import atomic_folder
from simomerge.merging import (
    Merged,
    MergeMethod,
    Schedule,
    TaskVectorStream,
    as_schedule,
    check_models,
    describe_method,
    get_method,
    sampled_distances,
)

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
        InputError: an output that exists or cannot be what was asked for, a damaged input, models that do not fit
            each other, a base that is not the experts' base, an unknown method, parameter or dtype, no space left.
            Nothing is written then.

    Example:
        >>> for name, value in (("base", 4), ("depth", 5), ("normals", 6)):
        ...     _ = write_safetensors(f"{name}.safetensors", {"w": np.full(2, value, np.float32)})
        >>> experts = {"depth": "depth.safetensors", "normals": "normals.safetensors"}
        >>> merged = merge_on_disk("base.safetensors", experts, "merged.safetensors", "average")
        >>> open_checkpoint(merged.output)["w"]
        array([5.5, 5.5], dtype=float32)
    """
    output = Path(output)
    chosen = method if isinstance(method, MergeMethod) else get_method(method, **parameters)
    depthwise = as_schedule(schedule)
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: use float32, float16 or bfloat16.")
    if output.suffix in (".pt", ".pth", ".bin"):
        raise InputError(
            f"{output}: weights are written as safetensors; name it {output.stem}.safetensors, or a folder."
        )
    if output.suffix == ".safetensors" and max_shard_size is not None:
        raise InputError(f"{output} is one file, and shards are several: name a folder, or leave the shard size out.")
    foundation = open_source(base)
    assert isinstance(foundation.weights, Checkpoint)
    opened = {name: open_source(path, foundation.weights) for name, path in experts.items()}
    check_output(output, [foundation, *opened.values()], overwrite)
    for name, expert in opened.items():
        if expert.description and expert.description["adapters"]:
            raise InputError(f"expert {name!r} has adapters beside its blocks: a weight merge would lose them.")
    to_model = output.suffix != ".safetensors" and all(expert.description for expert in opened.values())
    if to_model:
        foundation = without_extras(foundation, opened)
        assert isinstance(foundation.weights, Checkpoint)
    layout = {name: tensor_info(foundation.weights, name) for name in foundation.weights}
    weights = {name: expert.weights for name, expert in opened.items()}
    check_models(chosen, foundation.weights, weights)
    _warn_of_another_base(foundation, opened, threads)
    tensors = Merged(chosen, foundation.weights, weights, depthwise, threads)
    stored = DTYPES[dtype] if dtype else None
    how = describe_method(chosen, depthwise)
    if to_model:
        provenance = _provenance(foundation, opened, how)
        check_heads(opened)
        tensors.prepare()  # before anything is written, and where Ctrl-C is heard at once
        write_model(output, opened, provenance, tensors, layout, stored, max_shard_size, overwrite, threads)
        tensors.warn_of_unchanged()
        return MergedOnDisk(output, how, tuple(opened))
    if any("fingerprint" in _recorded_base(expert) for expert in opened.values()):
        check_base(foundation.origin(), opened)
    tensors.prepare()
    if output.suffix == ".safetensors":
        write_safetensors(output, tensors, stored, layout=layout, threads=threads, durable=False)
    else:
        with atomic_folder(output, overwrite, durable=False) as folder:
            write_sharded(folder, tensors, stored, None, layout, max_shard_size, threads, durable=False)
            _copy_configs(foundation.encoder_folder(), folder, layout, stored)
    tensors.warn_of_unchanged()
    return MergedOnDisk(output, how, ())


def check_output(output: Path, inputs: Sequence[Source], overwrite: bool) -> None:
    """Refuse an output that exists, unless it may be replaced, or a folder in which an input lies.

    Raises:
        InputError: which of these.
    """
    if output.exists() and not overwrite:
        raise InputError(f"{output} already exists: choose another path, or pass overwrite to replace it.")
    for source in inputs:
        if output.exists() and output.resolve() in source.path.resolve().parents:
            raise InputError(f"{output} holds the input {source.path} and would be replaced: choose another path.")


def without_extras(base: Source, experts: Mapping[str, Source]) -> Source:
    """A base without the tensors that no expert has: a pooler or a head is dropped when an expert is trained."""
    assert isinstance(base.weights, Checkpoint)
    known = {name for expert in experts.values() for name in canonicalise(expert.weights)}
    kept = [own for name, own in canonicalise(base.weights).items() if name in known]
    return replace(base, weights=base.weights.only(kept))


def _warn_of_another_base(base: Source, experts: Mapping[str, Source], threads: int | None) -> None:
    """Where an expert does not say what its base was, say how far its weights are from the given one."""
    unsure = {name: e for name, e in experts.items() if "fingerprint" not in _recorded_base(e)}
    if not unsure:
        return
    stream = TaskVectorStream(base.weights, {name: e.weights for name, e in unsure.items()}, threads)
    for name, distance in sampled_distances(stream).items():
        # A bare file never says; a model folder of ours should have.
        if distance > 0.5 or unsure[name].description is not None:
            warnings.warn(
                f"expert {name!r} does not record its base. Its weights differ from the given one by {distance:.0%} of"
                f" their norm: {'this looks like another base' if distance > 0.5 else 'plausible for a fine-tuning'}.",
                stacklevel=3,
            )


def _recorded_base(expert: Source) -> dict[str, Any]:
    return (expert.description or {}).get("provenance", {}).get("base", {})


def write_model(
    output: Path,
    heads: Mapping[str, Source],
    provenance: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray] | Iterator[tuple[str, np.ndarray]],
    layout: Mapping[str, TensorInfo],
    dtypes: str | Mapping[str, str] | None = None,
    max_shard_size: int | None = None,
    overwrite: bool = False,
    threads: int | None = None,
) -> None:
    """Write a model folder of merged weights.

    Args:
        heads: task -> the model folder whose head (and definition of the task) it takes.
        provenance: what simo.json says the model was made of.
        tensors, layout, dtypes, max_shard_size, threads: see `simomerge.checkpoints.write_sharded`.

    Raises:
        InputError: heads that cannot share one encoder, a missing head, no space left.
    """
    described = check_heads(heads)
    first = next(iter(described.values()))  # taps and normalisation are the experts', not the base folder's
    description = {
        **first,
        "tasks": {task: one["tasks"][task] for task, one in described.items()},
        "heads": {task: one["heads"][task] for task, one in described.items()},
        "adapters": None,
        "provenance": provenance,
    }
    # Made of models that are still there: the disk need not have it before the next thing is done.
    with atomic_folder(output, overwrite, durable=False) as folder:
        (folder / "heads").mkdir()
        for task, source in heads.items():
            _copy_head(source, task, folder / "heads" / f"{task}.safetensors")
        write_sharded(folder / "encoder", tensors, dtypes, None, layout, max_shard_size, threads, durable=False)
        _copy_configs(next(iter(heads.values())).encoder_folder(), folder / "encoder", layout, dtypes)
        (folder / "simo.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(description), encoding="utf-8")


def check_heads(heads: Mapping[str, Source]) -> dict[str, dict[str, Any]]:
    """What the experts say of themselves, each as one of its task, after making sure that they can share an encoder.

    Raises:
        InputError: they cannot, or a file is missing.
    """
    described = {task: only_task(source.description or {}, task) for task, source in heads.items()}
    check_same_encoder(described)
    for source in heads.values():
        if not (source.encoder_folder() / "config.json").is_file():
            raise InputError(
                f"{source.encoder_folder() / 'config.json'}: missing; take the model from its source again."
            )
    return described


def _provenance(base: Source, experts: Mapping[str, Source], how: dict[str, Any]) -> dict[str, Any]:
    """What the model is made of, after comparing what the experts say of their base with the given one."""
    origin = base.origin()
    check_base(origin, experts)
    return {"base": origin, "experts": {task: expert.origin() for task, expert in experts.items()}, "merge": how}


def check_base(base: Mapping[str, str], experts: Mapping[str, Source]) -> None:
    """Compare what the experts say of their base with the origin of the given one.

    Raises:
        InputError: it is another one.
    """
    for task, expert in experts.items():
        recorded = _recorded_base(expert)
        theirs = recorded.get("fingerprint")
        if theirs and theirs != base["fingerprint"]:
            raise InputError(
                f"expert {task!r} was fine-tuned from another base (its base {theirs[:12]}, the given one"
                f" {base['fingerprint'][:12]}); give {recorded.get('source', 'that base')}."
            )


def _copy_head(expert: Source, task: str, target: Path) -> None:
    tasks = (expert.description or {})["tasks"]
    head = expert.path / "heads" / f"{task if task in tasks else next(iter(tasks))}.safetensors"
    if not head.is_file():
        raise InputError(f"{head}: missing; take the model from its source again.")
    open_checkpoint(head)  # a truncated one is told now, not when the model is loaded
    shutil.copyfile(head, target)


def _copy_configs(
    source: Path, target: Path, layout: Mapping[str, TensorInfo], dtypes: str | Mapping[str, str] | None
) -> None:
    """The configurations, with the dtype in which the weights are stored: transformers loads them in it."""
    for name in CONFIGS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    config = target / "config.json"
    stored = {dtypes} if isinstance(dtypes, str) else {info.dtype for info in layout.values() if info.is_float}
    if not config.is_file() or isinstance(dtypes, Mapping) or len(stored) != 1:
        return
    described = json.loads(config.read_text(encoding="utf-8"))
    dtype = {code: name for name, code in DTYPES.items() if name != code}.get(next(iter(stored)))
    changed = {key: dtype for key in ("dtype", "torch_dtype") if dtype and described.get(key, dtype) != dtype}
    if changed:
        config.write_text(json.dumps(described | changed, indent=2, sort_keys=True) + "\n", encoding="utf-8")
