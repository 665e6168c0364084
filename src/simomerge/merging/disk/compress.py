"""Many experts in one folder: the base, the merged task vector, and one bit per parameter and task.

The folder holds ``base.safetensors`` (as the base is stored), ``merged.safetensors`` (the sum of the task vectors),
``masks/TASK.safetensors`` (per tensor the packed mask, and one scale per tensor), ``experts/TASK/`` (the small files
around an expert's encoder: heads, configuration) and ``compressed.json``. An expert is restored as
``base + scale * mask * merged``. It is an approximation: the folder says of each task how good.
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

from simomerge.checkpoints import (
    Checkpoint,
    TensorInfo,
    canonicalise,
    is_lora_folder,
    model_card,
    open_checkpoint,
    read_description,
    tensor_info,
    write_safetensors,
)
from simomerge.checkpoints.tensors import FLOATS, decode, encode
from simomerge.core.errors import InputError
from simomerge.core.files import atomic_folder
from simomerge.core.progress import progress
from simomerge.merging import TaskArithmetic, TaskVectorStream, check_models
from simomerge.merging.compression import THRESHOLDS, least_squares_scale, masked_by, pack_mask, squared_errors
from simomerge.merging.consensus import tall_mask
from simomerge.merging.disk.merge import CONFIGS, Source, open_source

FORMAT = 1
"""Version of the compressed folder's format."""

_DESCRIPTION, _BASE, _MERGED = "compressed.json", "base.safetensors", "merged.safetensors"
_SCALES = "simomerge.scales"  # in a mask file: float32, one per mask, in the order of their sorted names


@dataclass(frozen=True)
class Fit:
    """How one expert is restored.

    Attributes:
        threshold: lambda of its mask.
        density: the fraction of the parameters in its mask.
        weights_error: ``||restored - expert|| / ||expert||`` over the encoder's weights.
        task_vector_error: ``||s * m * tau_MTL - tau|| / ||tau||``; 0 is exact, 1 as good as the base.
    """

    threshold: float
    density: float
    weights_error: float
    task_vector_error: float


@dataclass(frozen=True)
class Compression:
    """What a compressed folder takes and how well it restores.

    Attributes:
        bytes_before: the experts' weights, heads and configurations. The base is not counted: it was not needed.
        bytes_after: the compressed folder, which has the base in it.
        tasks: by task, how it is restored.
    """

    bytes_before: int
    bytes_after: int
    tasks: dict[str, Fit]

    @property
    def ratio(self) -> float:
        """How many times smaller."""
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
    """Store experts of one base in one folder, from which :func:`restore` makes each of them again, nearly.

    The merged task vector is written in a first pass over all models, the masks in one pass per expert. One
    tensor of each model is in memory, for each of a few threads.

    Args:
        base: what the experts were fine-tuned from: a weight file, a transformers or a model folder.
        experts: by task a model folder of simomerge (its heads and configurations are stored as well), a
            transformers folder, a peft adapter, or a weight file.
        output: the folder to make.
        threshold: lambda of the masks, or ``"auto"``: for each task the one of 0.2, 0.4 ... 2 that restores its
            task vector best. No data are needed.
        dtype: storage of the merged task vector, ``"F16"``, ``"BF16"`` or ``"F32"``.
        overwrite: replace ``output`` where it exists.

    Raises:
        InputError: ``output`` exists, a threshold or a dtype that cannot be, models that do not fit the base or
            were fine-tuned from another one, a missing file.

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
    foundation = open_source(base)
    weights = foundation.weights
    assert isinstance(weights, Checkpoint), "only an expert can be an adapter"
    opened = {_file_name(task): open_source(path, weights) for task, path in experts.items()}
    check_models(TaskArithmetic(), weights, {task: expert.weights for task, expert in opened.items()})
    origin = foundation.origin()
    _check_base(opened, origin["fingerprint"])
    beside = {task: _files(expert) for task, expert in opened.items()}
    with atomic_folder(output, overwrite) as folder:
        write_safetensors(folder / _BASE, weights)
        chosen = _write_merged(folder, weights, opened, thresholds, dtype)
        fits = {task: _write_mask(folder, weights, task, expert, chosen[task]) for task, expert in opened.items()}
        for task, files in beside.items():
            _copy(files, folder / "experts" / task)
        description: dict[str, Any] = {
            "format": FORMAT,
            "base": origin,
            "dtype": dtype,
            "tasks": {task: {**opened[task].origin(), **asdict(fit)} for task, fit in fits.items()},
            "bytes_before": sum(_expert_size(expert, beside[task]) for task, expert in opened.items()),
        }
        (folder / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return Compression(description["bytes_before"], _size(Path(output)), fits)


def _thresholds(threshold: float | str) -> tuple[float, ...]:
    if threshold == "auto":
        return THRESHOLDS
    if isinstance(threshold, str) or not (math.isfinite(threshold) and threshold > 0):
        raise InputError(f"threshold is {threshold!r}: give a number above 0, or 'auto'.")
    return (float(threshold),)


def _file_name(task: str) -> str:
    if not task or Path(task).name != task:  # it must not lead out of the folder
        raise InputError(f"{task!r} cannot be the name of a task, for it becomes the name of a file: choose another.")
    return task


def _check_base(experts: Mapping[str, Source], given: str) -> None:
    for task, expert in experts.items():
        recorded = (expert.description or {"provenance": {}})["provenance"].get("base", {})
        if recorded.get("fingerprint", given) != given:
            raise InputError(
                f"expert {task!r} was fine-tuned from another base (its base {recorded['fingerprint'][:12]}, the given "
                f"one {given[:12]}); give {recorded.get('source', 'that base')}."
            )


def _files(expert: Source) -> dict[str, Path]:
    """What a restored folder needs besides weights, by its place in there."""
    files = {}
    if expert.description:
        places = ["simo.json", *(f"heads/{_file_name(task)}.safetensors" for task in expert.description["tasks"])]
        places += ["adapters.safetensors"] * bool(expert.description["adapters"])
        files = {place: expert.path / place for place in places}
        if missing := [file for file in files.values() if not file.is_file()]:
            raise InputError(f"{missing[0]}: missing; take the model from its source again.")
    if expert.path.is_dir():
        configs = {name: expert.encoder_folder() / name for name in CONFIGS}
        inside = "encoder/" if expert.description else ""
        files |= {f"{inside}{name}": file for name, file in configs.items() if file.is_file()}
    return files


def _expert_size(expert: Source, files: Mapping[str, Path]) -> int:
    if is_lora_folder(expert.path):
        return sum(file.stat().st_size for file in expert.path.iterdir() if file.is_file())
    weights = sum(tensor_info(expert.weights, name).nbytes for name in expert.weights)
    return weights + sum(file.stat().st_size for file in files.values())


def _write_merged(
    folder: Path,
    base: Checkpoint,
    experts: Mapping[str, Source],
    thresholds: tuple[float, ...],
    dtype: str,
) -> dict[str, float]:
    """Write the sum of the task vectors; by task the threshold whose mask restores the task vector best."""
    stream = TaskVectorStream(base, {task: expert.weights for task, expert in experts.items()})
    own = canonicalise(base)
    errors = {task: np.zeros(len(thresholds)) for task in experts}

    def look(name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        task_vectors = stream.read(name)[1]
        merged = _as_stored(reduce(np.add, task_vectors.values()), dtype, own[name])
        return merged, {task: squared_errors(tau, merged, thresholds) for task, tau in task_vectors.items()}

    def pairs() -> Iterator[tuple[str, np.ndarray]]:
        for done, (name, (merged, found)) in enumerate(stream.map(look), start=1):
            for task, squared in found.items():
                errors[task] += squared
            yield own[name], merged.reshape(stream.shapes[name])
            progress("merged task vector", done, len(stream.names), "")

    layout = {own[name]: TensorInfo(stream.shapes[name], dtype) for name in stream.names}
    write_safetensors(folder / _MERGED, pairs(), layout=layout)
    return {task: thresholds[int(np.argmin(squared))] for task, squared in errors.items()}


def _write_mask(folder: Path, base: Checkpoint, task: str, expert: Source, threshold: float) -> Fit:
    """Write the masks and scales of one task; how well they restore it."""
    stream = TaskVectorStream(base, {task: expert.weights})
    merged, own = open_checkpoint(folder / _MERGED), canonicalise(base)
    scales: dict[str, float] = {}
    sums = np.zeros(5)

    def look(name: str) -> tuple[np.ndarray, float, np.ndarray]:
        values, task_vectors = stream.read(name)
        tau, shared = task_vectors[task], merged[own[name]].reshape(values.shape)
        mask = tall_mask(tau, shared, threshold)
        packed = pack_mask(mask)
        scale = least_squares_scale(tau, masked_by(packed, shared))
        restored = _as_stored(_restored(values, packed, scale, shared), base.info(own[name]).dtype, own[name])
        whole, approximated = values + tau, masked_by(packed, shared) * np.float32(scale)
        norms = [_square(array) for array in (restored - whole, whole, approximated - tau, tau)]
        return packed, scale, np.array([*norms, np.count_nonzero(mask)])

    def pairs() -> Iterator[tuple[str, np.ndarray]]:
        for done, (name, (packed, scale, found)) in enumerate(stream.map(look), start=1):
            scales[own[name]] = scale
            sums[:] += found
            yield own[name], packed
            progress(f"mask of {task}", done, len(stream.names), "")
        yield _SCALES, np.array([scales[name] for name in sorted(scales)], np.float32)

    layout = {own[name]: _mask_info(stream.sizes[name]) for name in stream.names}
    layout[_SCALES] = TensorInfo((len(stream.names),), "F32")
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
    """The float32 values that are read back when the array is stored as ``dtype``."""
    info = TensorInfo(array.shape, dtype)
    return decode(encode(array, dtype, name), info).reshape(array.shape)


def _mask_info(size: int) -> TensorInfo:
    return TensorInfo(((size + 7) // 8,), "U8")


def _square(array: np.ndarray) -> float:
    return float(np.dot(array.reshape(-1), array.reshape(-1)))


def _relative(squared_error: float, squared_norm: float) -> float:
    # An expert equal to its base has no task vector, and nothing is lost of it.
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
    """Write one expert out of a compressed folder: ``base + scale * mask * merged``, in the base's dtypes.

    Args:
        folder: what :func:`compress` made.
        task: which expert.
        output: a folder to make, a model folder or a transformers folder as the expert was; or a file that ends
            in ``.safetensors``, for the encoder's weights alone.
        overwrite: replace ``output`` where it exists.

    Returns:
        The sizes of the whole compressed folder, and the errors of this task.

    Raises:
        InputError: not a compressed folder, no such task (those it has are named), a missing or damaged file,
            ``output`` exists.

    Example:
        >>> for name, value in (("base", 1), ("depth", 2)):
        ...     _ = write_safetensors(f"{name}.safetensors", {"w": np.full(3, value, np.float32)})
        >>> _ = compress("base.safetensors", {"depth": "depth.safetensors"}, "one")
        >>> _ = restore("one", "depth", "again.safetensors")
        >>> open_checkpoint("again.safetensors")["w"]
        array([2., 2., 2.], dtype=float32)
    """
    folder, output = Path(folder), Path(output)
    description = _read_description(folder)
    if task not in description["tasks"]:
        raise InputError(f"{folder} holds no task {task!r}: choose from {', '.join(description['tasks'])}.")
    entry = description["tasks"][task]
    fit = Fit(**{key: float(entry[key]) for key in Fit.__dataclass_fields__})
    base = open_checkpoint(folder / _BASE)
    tensors = _restored_tensors(folder, base, task)
    layout = {name: base.info(name) for name in base}
    if output.suffix == ".safetensors":
        if output.exists() and not overwrite:
            raise InputError(f"{output} already exists: choose another path, or pass overwrite to replace it.")
        write_safetensors(output, tensors, layout=layout)
    else:
        with atomic_folder(output, overwrite) as target:
            stored = folder / "experts" / task
            _copy({str(file.relative_to(stored)): file for file in stored.rglob("*") if file.is_file()}, target)
            is_model = (target / "simo.json").is_file()
            place = "encoder/model.safetensors" if is_model else "model.safetensors"
            write_safetensors(target / place, tensors, layout=layout)
            if is_model:
                _say_so(target, fit)
    return Compression(int(description["bytes_before"]), _size(folder), {task: fit})


def _restored_tensors(folder: Path, base: Checkpoint, task: str) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of one expert in the base's order; the files are checked against each other first."""
    file = folder / "masks" / f"{task}.safetensors"
    merged, masks = open_checkpoint(folder / _MERGED), open_checkpoint(file)
    expected = {name: _mask_info(merged.info(name).size) for name in merged}
    expected[_SCALES] = TensorInfo((len(merged),), "F32")
    if {name: masks.info(name) for name in masks} != expected:
        raise InputError(f"{file} does not fit {folder / _MERGED}: copy the folder from its source again.")
    if any(name not in base or base.info(name).shape != merged.info(name).shape for name in merged):
        raise InputError(f"{folder / _MERGED} does not fit {folder / _BASE}: copy the folder from its source again.")
    scales = dict(zip(sorted(merged), masks[_SCALES].tolist(), strict=True))
    return (
        (name, _restored(base[name], masks[name], scales[name], merged[name]) if name in merged else base[name])
        for name in base
    )


def _say_so(model: Path, fit: Fit) -> None:
    """Write into the model's description and card that its encoder is an approximation."""
    description = read_description(model)
    description["provenance"]["compression"] = asdict(fit)
    (model / "simo.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    (model / "README.md").write_text(model_card(description), encoding="utf-8")


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / _DESCRIPTION
    if not path.is_file():
        raise InputError(f"{folder} is not a compressed folder (no {_DESCRIPTION} in it): give one of compress.")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if description["format"] > FORMAT:
            raise InputError(f"{path}: format {description['format']} is newer than this simomerge reads; upgrade it.")
        for task, entry in description["tasks"].items():
            if Path(task).name != task or not all(math.isfinite(entry[key]) for key in Fit.__dataclass_fields__):
                raise ValueError(f"of task {task!r}")
        int(description["bytes_before"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}): copy the folder from its source again.") from error
    return description
