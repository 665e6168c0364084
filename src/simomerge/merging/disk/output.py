"""Write merged weights: one file, a transformers folder, or a model folder with heads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from simomerge.checkpoints.description import check_output, existing, head_file, model_folder
from simomerge.checkpoints.experts import check_same_encoder, only_task
from simomerge.checkpoints.tensors import WRITTEN, TensorInfo, common_float
from simomerge.checkpoints.writing import Tensors, write_safetensors, write_sharded
from simomerge.core.documents import read_json
from simomerge.core.errors import InputError
from simomerge.core.files import atomic_folder, check_apart, check_not_current
from simomerge.core.model_files import TORCH_FILES
from simomerge.core.schema import nearest
from simomerge.merging.disk.sources import CONFIGS, Source, check_unchanged


@dataclass(frozen=True)
class Output:
    """Where and how merged weights are written.

    Attributes:
        path: a folder, or a file ``*.safetensors``.
        dtype: storage of the floats: ``"float32"``, ``"float16"`` or ``"bfloat16"``; by default that of the base.
        max_shard_size: bytes; larger weights are split into shards with an index (folders only).
        overwrite: replace ``path`` if it exists.
        threads: threads that merge and write; all cores by default.

    Raises:
        InputError: an unknown dtype, or a path that cannot be written like this.
    """

    path: Path
    dtype: str | None = None
    max_shard_size: int | None = None
    overwrite: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in (*WRITTEN, *WRITTEN.values()):
            raise InputError(f"dtype {self.dtype!r}: use float32, float16 or bfloat16.")
        if endings := [ending for ending in TORCH_FILES if self.path.name.endswith(ending)]:
            name = self.path.name.removesuffix(max(endings, key=len))
            raise InputError(
                f"{self.path}: weights are written as safetensors; name it {name}.safetensors, or a folder."
            )
        if not self.is_file and nearest(self.path.suffix, [".safetensors"]):
            raise InputError(
                f"{self.path}: did you mean {self.path.with_suffix('.safetensors')}, which is a weight file? For a"
                " folder, leave the suffix out."
            )
        if self.is_file and self.max_shard_size is not None:
            raise InputError(f"{self.path} is one file, not shards: name a folder, or leave the shard size out.")

    @property
    def is_file(self) -> bool:
        """Whether the output is one weight file."""
        return self.path.suffix == ".safetensors"

    @property
    def storage(self) -> str | None:
        """The safetensors name of ``dtype``."""
        return self.dtype and WRITTEN.get(self.dtype, self.dtype)

    def check(self, inputs: Sequence[Source]) -> None:
        """Raise InputError if the path must not be written: see `check_output` and `check_apart`."""
        check_not_current(self.path)
        check_apart(self.path, [source.path for source in inputs])
        check_output(self.path, self.overwrite)


def write_weights(output: Output, inputs: Sequence[Source], tensors: Tensors, layout: Mapping[str, TensorInfo]) -> None:
    """Write weights alone, to a file or a transformers folder with the base's configurations.

    Args:
        inputs: what the tensors are computed from, the base first.
        tensors, layout: see `simomerge.checkpoints.write_sharded`.

    Raises:
        InputError: no space left, a value too large for its dtype, or an input that changed meanwhile.
    """
    # The inputs still exist, so this can be made again: nothing waits until the disk has it.
    if output.is_file:
        check = partial(check_unchanged, inputs)
        write_safetensors(output.path, tensors, None, layout, output.threads, durable=False, check=check)
        return
    with atomic_folder(output.path, output.overwrite, durable=False) as folder:
        write_sharded(folder, tensors, None, layout, output.max_shard_size, output.threads, durable=False)
        _copy_configs(inputs[0].encoder_folder(), folder, layout)
        check_unchanged(inputs)


def write_model(
    output: Output,
    heads: Mapping[str, Source],
    provenance: Mapping[str, Any],
    tensors: Tensors,
    layout: Mapping[str, TensorInfo],
    others: Sequence[Source] = (),
) -> None:
    """Write a model folder of merged weights.

    Args:
        heads: task -> the model folder that lends its head and its definition of the task.
        provenance: what simo.json records about where the weights come from.
        tensors, layout: see `simomerge.checkpoints.write_sharded`.
        others: what else the tensors are computed from.

    Raises:
        InputError: heads that cannot share one encoder, a missing head, no space left, or an input that changed
            meanwhile.
    """
    described = describe_heads(heads)
    # Taps and normalisation are those of the experts, which may differ from the base folder's.
    first = next(iter(described.values()))
    description = {
        **first,
        "tasks": {task: one["tasks"][task] for task, one in described.items()},
        "heads": {task: one["heads"][task] for task, one in described.items()},
        "adapters": None,
        "provenance": provenance,
    }
    with model_folder(output.path, description, output.overwrite, durable=False) as folder:
        for task, source in heads.items():
            shutil.copyfile(source.head(task), head_file(folder, task))
        encoder = folder / "encoder"
        write_sharded(encoder, tensors, None, layout, output.max_shard_size, output.threads, durable=False)
        _copy_configs(next(iter(heads.values())).encoder_folder(), encoder, layout)
        check_unchanged([*heads.values(), *others])


def describe_heads(heads: Mapping[str, Source]) -> dict[str, dict[str, Any]]:
    """The description of each model folder reduced to its task, after checking that they can share one encoder.

    Raises:
        InputError: they cannot, or a configuration is missing.
    """
    described = {task: only_task(source.description or {}, task) for task, source in heads.items()}
    check_same_encoder(described)
    for source in heads.values():
        existing(source.encoder_folder() / "config.json")
    return described


def _copy_configs(source: Path, target: Path, layout: Mapping[str, TensorInfo]) -> None:
    """Copy the configurations, and enter the dtype of the stored weights: transformers loads them in this dtype."""
    for name in CONFIGS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    config = target / "config.json"
    dtype = common_float(layout.values())
    if dtype is None or not config.is_file():
        return
    described = read_json(config, "take it from its source again.")
    changed = {key: dtype for key in ("dtype", "torch_dtype") if described.get(key, dtype) != dtype}
    if changed:
        config.write_text(json.dumps(described | changed, indent=2, sort_keys=True) + "\n", encoding="utf-8")
