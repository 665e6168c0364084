"""Many experts in one folder: the base, the merged task vector, and one bit per parameter and task.

The folder holds ``base.safetensors`` (as the base is stored), ``merged.safetensors`` (the sum of the task vectors),
``masks/TASK.safetensors`` (per tensor the packed mask, and one scale per tensor; running statistics of batch norms as
they are), ``experts/TASK/`` (the other files of a model folder: description, heads, configurations) and
``compressed.json``. An expert is restored as ``base + scale * mask * merged``. This is an approximation;
compressed.json records its error for each task.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.checkpoints.description import (
    FILE,
    check_output,
    existing,
    file_name,
    head_file,
    is_file_name,
    read_description,
    write_description,
)
from simomerge.checkpoints.experts import check_base
from simomerge.checkpoints.lora import is_lora_folder
from simomerge.checkpoints.names import canonicalise, is_running_statistic
from simomerge.checkpoints.parts import joined, separated
from simomerge.checkpoints.reading import Checkpoint, open_checkpoint
from simomerge.checkpoints.tensors import FLOATS, TensorInfo, decode, encode, tensor_info
from simomerge.checkpoints.writing import write_safetensors
from simomerge.core.documents import check, read_json
from simomerge.core.errors import InputError
from simomerge.core.files import atomic_folder, check_apart
from simomerge.core.progress import progress
from simomerge.core.text import shown
from simomerge.merging import TaskArithmetic, TaskVectorStream, check_models
from simomerge.merging.compression import THRESHOLDS, least_squares_scale, masked_by, pack_mask, squared_errors
from simomerge.merging.consensus import tall_mask
from simomerge.merging.disk.sources import CONFIGS, Source, check_unchanged, open_experts

FORMAT = 1
"""Version of the compressed folder's format."""

_REMEDY = "copy the folder from its source again."
_DESCRIPTION, _BASE, _MERGED = "compressed.json", "base.safetensors", "merged.safetensors"
_SCALES = "simomerge.scales"  # in a mask file: float32, one per mask, in the order of their sorted names


@dataclass(frozen=True)
class Fit:
    """How one expert is restored.

    Attributes:
        threshold: lambda of its mask.
        density: the fraction of the parameters in its mask.
        weights_error: ``||restored - expert|| / ||expert||`` over the encoder's weights.
        task_vector_error: ``||s * m * tau_MTL - tau|| / ||tau||``; 0 is exact, 1 is no better than the base.
    """

    threshold: float
    density: float
    weights_error: float
    task_vector_error: float


@dataclass(frozen=True)
class Compression:
    """The sizes of a compressed folder and of its experts, and how well it restores them.

    Attributes:
        bytes_before: the experts' weights, heads and configurations, without the base, which they do not need.
        bytes_after: the compressed folder, including the base.
        tasks: by task, how it is restored.
    """

    bytes_before: int
    bytes_after: int
    tasks: dict[str, Fit]

    @property
    def ratio(self) -> float:
        """``bytes_before / bytes_after``."""
        return self.bytes_before / self.bytes_after


# Compress -----------------------------------------------------------------------------------------------


def compress(
    base: str | os.PathLike[str],
    experts: Mapping[str, str | os.PathLike[str]],
    output: str | os.PathLike[str],
    threshold: float | str = "auto",
    dtype: str = "F16",
    overwrite: bool = False,
) -> Compression:
    """Store experts of one base in one folder, from which :func:`restore` makes each of them again, approximately.

    A first pass over all models writes the merged task vector, then one pass per expert writes its masks. A few
    threads each hold one tensor of each model in memory.

    Args:
        base: what the experts were fine-tuned from: a weight file, a transformers or a model folder.
        experts: task -> a model folder (its heads and configurations are stored too), a transformers folder, a peft
            adapter, or a weight file.
        output: the folder to create.
        threshold: lambda of the masks, or ``"auto"``: for each task the one of 0.2, 0.4 ... 2 that restores its task
            vector best. No data are needed.
        dtype: storage of the merged task vector, ``"F16"``, ``"BF16"`` or ``"F32"``.
        overwrite: replace ``output`` if it exists.

    Raises:
        InputError: ``output`` exists, an invalid threshold or dtype, models that do not fit the base or were
            fine-tuned from another one, a missing file.

    Example:
        >>> weights = np.ones((100, 100), np.float32)
        >>> for name, factor in (("base", 1), ("depth", 2), ("normals", 3)):
        ...     _ = write_safetensors(f"{name}.safetensors", {"w": factor * weights})
        >>> experts = {"depth": "depth.safetensors", "normals": "normals.safetensors"}
        >>> round(compress("base.safetensors", experts, "compressed").tasks["depth"].task_vector_error, 6)
        0.0
    """
    thresholds = _thresholds(threshold)
    if dtype not in FLOATS:
        raise InputError(f"The merged task vector cannot be stored as {dtype!r}: use one of F16, BF16, F32.")
    foundation, opened = open_experts(base, {file_name(task): path for task, path in experts.items()})
    check_models(TaskArithmetic(), foundation.weights, {task: expert.weights for task, expert in opened.items()})
    check_base(foundation, opened)
    files = {task: _small_files(expert) for task, expert in opened.items()}
    check_output(Path(output), overwrite)
    check_apart(Path(output), [foundation.path, *(expert.path for expert in opened.values())])
    with atomic_folder(output, overwrite) as folder:
        fits = _write_tensors(folder, foundation, opened, thresholds, dtype)
        for task in opened:
            _copy(files[task], folder / "experts" / task)
        description: dict[str, Any] = {
            "format": FORMAT,
            "base": foundation.origin(),
            "dtype": dtype,
            "tasks": {task: {**opened[task].origin(), **asdict(fit)} for task, fit in fits.items()},
            "bytes_before": sum(_expert_size(expert, files[task]) for task, expert in opened.items()),
        }
        check_unchanged([foundation, *opened.values()])
        (folder / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return Compression(description["bytes_before"], _size(Path(output)), fits)


def _thresholds(threshold: float | str) -> tuple[float, ...]:
    if threshold == "auto":
        return THRESHOLDS
    if isinstance(threshold, str) or not (math.isfinite(threshold) and threshold > 0):
        raise InputError(f"threshold is {threshold!r}: give a number above 0, or 'auto'.")
    return (float(threshold),)


def _small_files(expert: Source) -> dict[str, Path]:
    """Everything but weights that a restored folder needs: place in that folder -> file of the expert."""
    files = {}
    if expert.description:
        required = [expert.path / FILE, *(head_file(expert.path, file_name(t)) for t in expert.description["tasks"])]
        required += [expert.path / "adapters.safetensors"] * bool(expert.description["adapters"])
        files = {str(file.relative_to(expert.path)): existing(file) for file in required}
    if expert.path.is_dir():
        configs = [expert.encoder_folder() / name for name in CONFIGS]
        files |= {str(file.relative_to(expert.path)): file for file in configs if file.is_file()}
    return files


def _expert_size(expert: Source, files: Mapping[str, Path]) -> int:
    if is_lora_folder(expert.path):
        return sum(file.stat().st_size for file in expert.path.iterdir() if file.is_file())
    weights = sum(expert.weights.info(name).nbytes for name in expert.weights)
    return weights + sum(file.stat().st_size for file in files.values())


def _write_tensors(
    folder: Path, base: Source, experts: Mapping[str, Source], thresholds: tuple[float, ...], dtype: str
) -> dict[str, Fit]:
    """Write the base, the merged task vector and the masks; by task, how well they restore the expert."""
    assert isinstance(base.weights, Checkpoint)  # only an expert can be an adapter
    write_safetensors(folder / _BASE, base.weights)
    weights = {task: expert.weights for task, expert in experts.items()}
    best = _write_merged(folder, base.weights, TaskVectorStream(base.weights, weights), thresholds, dtype)
    return {
        task: _write_mask(folder, base.weights, task, TaskVectorStream(base.weights, {task: weights[task]}), best[task])
        for task in experts
    }


def _write_merged(
    folder: Path, base: Checkpoint, stream: TaskVectorStream, thresholds: tuple[float, ...], dtype: str
) -> dict[str, float]:
    """Write the sum of the task vectors; by task, the threshold whose mask restores its task vector best."""
    own = canonicalise(separated(base))
    errors = {task: np.zeros(len(thresholds)) for task in stream.experts}

    def merge(name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        task_vectors = stream.read(name)[1]
        merged = _as_stored(reduce(np.add, task_vectors.values()), dtype, own[name])
        return merged, {task: squared_errors(tau, merged, thresholds) for task, tau in task_vectors.items()}

    def pairs() -> Iterator[tuple[str, np.ndarray]]:
        for done, (name, (merged, found)) in enumerate(stream.map(merge), start=1):
            for task, squared in found.items():
                errors[task] += squared
            yield own[name], merged.reshape(stream.shapes[name])
            progress("merged task vector", done, len(stream.names), "")

    layout = {own[name]: TensorInfo(stream.shapes[name], dtype) for name in stream.names}
    write_safetensors(folder / _MERGED, pairs(), layout=layout)
    return {task: thresholds[int(np.argmin(squared))] for task, squared in errors.items()}


def _write_mask(folder: Path, base: Checkpoint, task: str, stream: TaskVectorStream, threshold: float) -> Fit:
    """Write the masks and scales of one task; how well they restore it."""
    merged, parts = open_checkpoint(folder / _MERGED), separated(base)
    own = canonicalise(parts)
    scales: dict[str, float] = {}
    sums = np.zeros(5)

    def fit(name: str) -> tuple[np.ndarray, float, np.ndarray]:
        values, task_vectors = stream.read(name)
        tau, shared = task_vectors[task], merged[own[name]].reshape(values.shape)
        mask = tall_mask(tau, shared, threshold)
        packed = pack_mask(mask)
        scale = least_squares_scale(tau, masked_by(packed, shared))
        restored = _as_stored(_restored(values, packed, scale, shared), tensor_info(parts, own[name]).dtype, own[name])
        expert, approximated = values + tau, masked_by(packed, shared) * np.float32(scale)
        norms = [_square(array) for array in (restored - expert, expert, approximated - tau, tau)]
        return packed, scale, np.array([*norms, np.count_nonzero(mask)])

    def pairs() -> Iterator[tuple[str, np.ndarray]]:
        for done, (name, (packed, scale, found)) in enumerate(stream.map(fit), start=1):
            scales[own[name]] = scale
            sums[:] += found
            yield own[name], packed
            progress(f"mask of {task}", done, len(stream.names), "")
        yield from ((own[name], stream.average(name, {task: 1.0})) for name in stream.averaged)
        yield _SCALES, np.array([scales[name] for name in sorted(scales)], np.float32)

    measured = {own[name]: stream.shapes[name] for name in stream.averaged}
    layout = _mask_layout({own[name]: stream.sizes[name] for name in stream.names}, measured)
    write_safetensors(folder / "masks" / f"{task}.safetensors", pairs(), layout=layout)
    error, norm, tau_error, tau_norm, kept = sums
    density = kept / max(sum(stream.sizes.values()), 1)
    return Fit(threshold, float(density), _relative(error, norm), _relative(tau_error, tau_norm))


def _restored(base: np.ndarray, packed: np.ndarray, scale: float, merged: np.ndarray) -> np.ndarray:
    values = masked_by(packed, merged)
    values *= np.float32(scale)
    values += base
    return values


def _as_stored(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """The float32 values that reading gives after the array was stored as ``dtype``."""
    return decode(encode(array, dtype, name), TensorInfo(array.shape, dtype)).reshape(array.shape)


def _mask_layout(sizes: Mapping[str, int], measured: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    """The tensors of a mask file: packed masks, running statistics, and the scales.

    Args:
        sizes: Name -> number of entries.
        measured: Name -> shape, of the running statistics.
    """
    masks = {name: TensorInfo(((size + 7) // 8,), "U8") for name, size in sizes.items()}
    masks |= {name: TensorInfo(shape, "F32") for name, shape in measured.items()}
    return masks | {_SCALES: TensorInfo((len(sizes),), "F32")}


def _square(array: np.ndarray) -> float:
    return float(np.dot(array.reshape(-1), array.reshape(-1)))


def _relative(squared_error: float, squared_norm: float) -> float:
    # An expert that equals its base has no task vector, and its restoration is exact.
    return math.sqrt(squared_error / squared_norm) if squared_norm > 0 else 0.0


def _copy(files: Mapping[str, Path], target: Path) -> None:
    for place, file in files.items():
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / place)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# Restore ------------------------------------------------------------------------------------------------


def restore(
    folder: str | os.PathLike[str],
    task: str,
    output: str | os.PathLike[str],
    overwrite: bool = False,
) -> Compression:
    """Write one expert from a compressed folder: ``base + scale * mask * merged``, in the base's dtypes.

    Args:
        folder: what :func:`compress` wrote.
        task: the task of the expert.
        output: a folder to create, a model folder or a transformers folder like the original; or a file that ends
            in ``.safetensors``, for the encoder's weights alone.
        overwrite: replace ``output`` if it exists.

    Returns:
        The sizes of the complete compressed folder, and the errors of this task.

    Raises:
        InputError: not a compressed folder, no such task (the message names those it has), a missing or damaged
            file, ``output`` exists.

    Example:
        >>> for name, value in (("base", 1), ("depth", 2)):
        ...     _ = write_safetensors(f"{name}.safetensors", {"w": np.full(3, value, np.float32)})
        >>> _ = compress("base.safetensors", {"depth": "depth.safetensors"}, "one")
        >>> _ = restore("one", "depth", "again.safetensors")
        >>> open_checkpoint("again.safetensors")["w"]
        array([2., 2., 2.], dtype=float32)
    """
    folder, output = Path(folder), Path(output)
    description = _read_compressed(folder)
    if task not in description["tasks"]:
        raise InputError(f"{folder} holds no task {task!r}: choose from {', '.join(description['tasks'])}.")
    entry = description["tasks"][task]
    fit = Fit(**{key: float(entry[key]) for key in Fit.__dataclass_fields__})
    base = open_checkpoint(folder / _BASE)
    tensors = _restored_tensors(folder, base, task)
    layout = {name: base.info(name) for name in base}
    check_output(output, overwrite)
    check_apart(output, [folder])
    if output.suffix == ".safetensors":
        write_safetensors(output, tensors, layout=layout)
    else:
        with atomic_folder(output, overwrite) as target:
            stored = folder / "experts" / task
            if stored.is_dir():
                shutil.copytree(stored, target, copy_function=shutil.copyfile, dirs_exist_ok=True)
            is_model = (target / FILE).is_file()
            place = "encoder/model.safetensors" if is_model else "model.safetensors"
            write_safetensors(target / place, tensors, layout=layout)
            if is_model:  # its description and model card say that the encoder is an approximation
                described = read_description(target)
                described["provenance"]["compression"] = asdict(fit)
                described.pop("evaluation", None)  # it was measured before the compression
                write_description(target, described)
    return Compression(int(description["bytes_before"]), _size(folder), {task: fit})


def _restored_tensors(folder: Path, base: Checkpoint, task: str) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of one expert in the base's order, after checking that the files fit together."""
    file = folder / "masks" / f"{task}.safetensors"
    merged, masks, parts = open_checkpoint(folder / _MERGED), open_checkpoint(file), separated(base)
    # Folders of earlier versions have masks of running statistics too.
    measured = {name: base.info(name).shape for name in base if is_running_statistic(name) and name not in merged}
    layout = _mask_layout({name: merged.info(name).size for name in merged}, measured)
    if {name: masks.info(name) for name in masks} != layout:
        raise InputError(f"{file} does not fit {folder / _MERGED}: {_REMEDY}")
    if any(name not in parts or tensor_info(parts, name).shape != merged.info(name).shape for name in merged):
        raise InputError(f"{folder / _MERGED} does not fit {folder / _BASE}: {_REMEDY}")
    scales = dict(zip(sorted(merged), masks[_SCALES].tolist(), strict=True))

    def value(name: str) -> np.ndarray:
        if name in merged:
            return _restored(parts[name], masks[name], scales[name], merged[name])
        return masks[name] if name in measured else base[name]

    return ((name, joined(name, value)) for name in base)


def _read_compressed(folder: Path) -> dict[str, Any]:
    path = folder / _DESCRIPTION
    if not path.is_file():
        raise InputError(f"{folder} is not a compressed folder (no {_DESCRIPTION} in it): give one of compress.")
    description: dict[str, Any] = read_json(path, _REMEDY, {"format": int})
    if description["format"] > FORMAT:
        raise InputError(f"{path}: format {description['format']} is newer than this simomerge reads; upgrade it.")
    try:
        check(description, {"tasks": {str: dict.fromkeys(Fit.__dataclass_fields__, float)}, "bytes_before": float})
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): {_REMEDY}") from error
    if unnamed := [task for task in description["tasks"] if not is_file_name(task)]:
        raise InputError(f"{path} is damaged (task {shown(unnamed[0])} cannot be a file's name): {_REMEDY}")
    return description
