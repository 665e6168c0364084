"""A peft LoRA adapter, read as the full expert that it makes of its base.

An adapter holds two low-rank factors for some modules of the base; the weight of such a module changes by
``scale * B @ A``. Here the adapter acts like a checkpoint of the complete encoder, under the base's names. The task
vector of a tensor is computed from its factors, which avoids the rounding of adding to the base first.

The conventions are those of peft (checked with 0.21): the scale is ``alpha / r``, or ``alpha / sqrt(r)`` with
``use_rslora``; the keys of ``rank_pattern`` and ``alpha_pattern`` are regular expressions for the end of a module's
name; the factors of an Embedding and of a layer with ``fan_in_fan_out`` are multiplied to the transposed weight.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.checkpoints.names import canonical_name, canonicalise
from simomerge.checkpoints.reading import Checkpoint, open_checkpoint
from simomerge.checkpoints.tensors import TensorInfo, as_numpy, tensor_info
from simomerge.core.errors import InputError

_CONFIG = "adapter_config.json"
_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_REMEDY = "call merge_and_unload() in peft and give the merged model"
_SHOWN = 3  # the most names in a message; it also has their number

#: Options with which the weights are more than base + scale * B @ A, or belong to more than the base's modules.
_VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer replication",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trainable tokens",
}
#: Initialisations that subtract the first B @ A from the base: the adapter fits only the changed base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<bias>\.bias|\.weight)?$")
_INFIX = re.compile(r"\.(?:base_layer|modules_to_save)(?=\.)")  # which peft inserts between a module and its tensors
_UNTRAINED = ".original_module."  # peft's copy of a module from before the training; not needed
_WRAPPERS = ("encoder.", "model.")  # possible prefixes of the encoder's own names; names.py knows the others


@dataclass(frozen=True)
class _LowRank:
    """The change of one tensor: ``scale * B @ A``, or ``scale * B`` if there is no A (the bias of B)."""

    a: str | None
    b: str
    scale: float
    transposed: bool

    def shape(self, adapter: Checkpoint) -> tuple[int, ...]:
        b = adapter.info(self.b).shape
        shape = b if self.a is None else (b[0], *adapter.info(self.a).shape[1:])
        return shape[::-1] if self.transposed else shape

    def delta(self, adapter: Checkpoint) -> np.ndarray:
        b = adapter[self.b]
        if self.a is None:
            return b * np.float32(self.scale)
        # A convolution's A is (r, in, height, width) and its B (out, r, 1, 1): flattened, the product is the same.
        a = adapter[self.a]
        product = b.reshape(len(b), -1) @ a.reshape(len(a), -1)
        product *= np.float32(self.scale)
        return np.ascontiguousarray(product.T) if self.transposed else product.reshape(len(b), *a.shape[1:])


@dataclass(frozen=True, eq=False, repr=False)
class LoraExpert(Mapping[str, np.ndarray]):
    """A base with a LoRA adapter: a read-only, lazy mapping like a Checkpoint; made by :func:`open_lora`.

    ``expert[name]`` computes one tensor, float32: the base's plus the adapter's low-rank change, or the tensor that
    was trained in full instead (``modules_to_save``, biases). All others are the base's. Names are the base's. Treat
    arrays as read-only.

    Attributes:
        path: the adapter's folder.
        base: the mapping it was opened with; ``task_vector`` is relative to it.
    """

    path: Path
    base: Mapping[str, Any]
    _adapter: Checkpoint
    _low_rank: Mapping[str, _LowRank]
    _replaced: Mapping[str, str]  # the base's name of a tensor trained in full -> its key in the adapter

    def info(self, name: str) -> TensorInfo:
        """Shape of one tensor and the dtype that holds it: the base's, or F32 where B @ A is added. Raises KeyError."""
        info = tensor_info(self.base, name)
        if name in self._low_rank:
            return TensorInfo(info.shape, "F32")
        return self._adapter.info(self._replaced[name]) if name in self._replaced else info

    def task_vector(self, name: str) -> np.ndarray | None:
        """The tensor minus the base's, float32, or None if the adapter does not change it. Raises KeyError.

        If only the factors change a tensor, this is ``scale * B @ A`` itself.
        """
        if name not in self.base:
            raise KeyError(name)
        delta = self._low_rank[name].delta(self._adapter) if name in self._low_rank else None
        if name not in self._replaced:
            return delta
        difference = self._adapter[self._replaced[name]] - as_numpy(self.base[name], name)
        return difference if delta is None else difference + delta

    def __getitem__(self, name: str) -> np.ndarray:
        start = self._adapter[self._replaced[name]] if name in self._replaced else as_numpy(self.base[name], name)
        return start + self._low_rank[name].delta(self._adapter) if name in self._low_rank else start

    def __contains__(self, name: object) -> bool:
        return name in self.base

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    def __repr__(self) -> str:
        changed = len(self._low_rank.keys() | self._replaced.keys())
        return f"LoraExpert({str(self.path)!r}, {changed} of {len(self)} tensors changed)"


def is_lora_folder(path: str | os.PathLike[str]) -> bool:
    """True for a folder that peft wrote: it holds an ``adapter_config.json``.

    Example:
        >>> is_lora_folder(".")
        False
    """
    return (Path(path) / _CONFIG).is_file()


def open_lora(folder: str | os.PathLike[str], base: Mapping[str, Any]) -> LoraExpert:
    """Open a peft LoRA adapter as the expert that it makes of ``base``, without reading values.

    The adapter's names may be those in memory or on disk, behind ``base_model.model.`` and wrappers such as
    ``backbone.``; :func:`~simomerge.checkpoints.names.canonical_name` matches them with the base's.

    Args:
        folder: ``adapter_config.json`` with ``adapter_model.safetensors`` or ``.bin``.
        base: the model that the adapter was trained on: name -> numpy array or torch tensor, or a Checkpoint.

    Raises:
        InputError: no adapter or no weights there, a damaged file, an adapter that is not plain LoRA (DoRA and other
            variants, another peft type, an initialisation that changed the base), a tensor that is missing in the
            base or has another shape there, one factor without the other, factors of another rank than configured.

    Example:
        >>> from simomerge.checkpoints import write_safetensors
        >>> a, b = np.array([[1, 2]], np.float32), np.array([[10], [0]], np.float32)
        >>> name = "base_model.model.backbone.layernorm"
        >>> _ = write_safetensors(
        ...     "adapter/adapter_model.safetensors", {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        ... )
        >>> _ = Path("adapter/adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 2}')
        >>> open_lora("adapter", {"layernorm.weight": np.ones((2, 2))}).task_vector("layernorm.weight")
        array([[20., 40.],
               [ 0.,  0.]], dtype=float32)
    """
    folder = Path(folder)
    config = _read_config(folder / _CONFIG)
    file = next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise InputError(f"{folder} holds no adapter weights (looked for {', '.join(_WEIGHT_FILES)}): copy them there.")
    adapter = open_checkpoint(file)
    factors, replaced = _sort(file, adapter)
    low_rank: dict[str, _LowRank] = {}
    for module, sides in factors.items():
        low_rank |= _changes(file, adapter, config, module, sides)
    own = _own_names(file, base, [*low_rank, *replaced])
    shapes = {name: change.shape(adapter) for name, change in low_rank.items()}
    for name, shape in [*shapes.items(), *((name, adapter.info(key).shape) for name, key in replaced.items())]:
        expected = tensor_info(base, own[name]).shape
        if shape != expected:
            raise InputError(
                f"{file} changes '{name}' by a tensor of shape {shape}, but the base's has {expected}: give the base"
                " that the adapter was trained on."
            )
    changes = {own[name]: change for name, change in low_rank.items()}
    return LoraExpert(folder, base, adapter, changes, {own[name]: key for name, key in replaced.items()})


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path} does not exist: give the folder of a peft adapter.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not JSON ({error}): copy or save the adapter again.") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise InputError(f"{path} is not the configuration of a peft adapter (no 'peft_type'): save it again.")
    if config["peft_type"] != "LORA":
        raise InputError(f"{path} holds an adapter of type {config['peft_type']}, not LORA: {_REMEDY}.")
    for option, variant in _VARIANTS.items():
        if config.get(option):
            raise _not_plain(path, variant)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise InputError(
            f"{path}: it began as '{start}', which also changes the base: save it with peft's "
            "path_initial_model_for_weight_conversion, which makes it plain LoRA."
        )
    return config


def _not_plain(path: Path, variant: str) -> InputError:
    return InputError(f"{path}: the adapter uses {variant}, which is more than base + B @ A: {_REMEDY}.")


def _sort(file: Path, adapter: Checkpoint) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Sort the adapter's keys.

    Returns:
        For each module its factors, such as {"A": key, "B": key, "B.bias": key}, and for each tensor that was trained
        in full its key.
    """
    factors: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for key in adapter:
        name = key.removeprefix("base_model.model.")
        if ".lora_magnitude_vector" in name:
            raise _not_plain(file, "DoRA")
        if match := _FACTOR.match(name):
            side = (match["embedding"] or "") + match["side"] + (".bias" if match["bias"] == ".bias" else "")
            factors.setdefault(match["module"], {})[side] = key
        elif ".lora_" in name:
            raise InputError(f"{file}: '{key}' is not a tensor of a plain LoRA adapter: save it again with peft.")
        elif _UNTRAINED not in name:
            # If modules_to_save and biases name the same tensor, peft writes it twice, with the same values.
            replaced.setdefault(_INFIX.sub("", name), key)
    if not factors and not replaced:
        raise InputError(f"{file} holds no tensors: save the adapter again.")
    return factors, replaced


def _changes(
    file: Path, adapter: Checkpoint, config: Mapping[str, Any], module: str, sides: Mapping[str, str]
) -> dict[str, _LowRank]:
    """The tensors of a module that its factors change: the weight, and the bias if B has one."""
    embedding = "embedding_A" in sides or "embedding_B" in sides
    a, b = (sides.get(("embedding_" if embedding else "") + side) for side in "AB")
    if a is None or b is None:
        missing, given = ("A", "B") if a is None else ("B", "A")
        raise InputError(f"{file}: '{module}' has lora_{given} but no lora_{missing}: save the adapter again.")
    rank, scale = _rank_and_scale(file.with_name(_CONFIG), config, module)
    shapes = adapter.info(a).shape, adapter.info(b).shape
    if len(shapes[0]) < 2 or len(shapes[0]) != len(shapes[1]) or {shapes[0][0], shapes[1][1]} != {rank}:
        raise InputError(
            f"{file}: the factors of '{module}' have the shapes {shapes[0]} and {shapes[1]}, which do not fit the "
            f"rank {rank} of {_CONFIG}: take both files from one training."
        )
    # peft transposes for layers that store (in, out); a convolution never does.
    transposed = embedding or (bool(config.get("fan_in_fan_out")) and len(shapes[0]) == 2)
    changes = {f"{module}.weight": _LowRank(a, b, scale, transposed)}
    if "B.bias" in sides:
        changes[f"{module}.bias"] = _LowRank(None, sides["B.bias"], scale, False)
    return changes


def _rank_and_scale(path: Path, config: Mapping[str, Any], module: str) -> tuple[int, float]:
    try:
        rank = _by_pattern(config.get("rank_pattern") or {}, module, config.get("r", 8))
        alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if isinstance(rank, int) and math.isfinite(scale):
            return rank, float(scale)
    except (ArithmeticError, AttributeError, TypeError, ValueError, re.error):
        pass
    raise InputError(f"{path}: no rank and alpha for '{module}' can be read from it: copy or save the adapter again.")


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    # As peft does: the first expression that matches the end of the name, from the start or after a dot.
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _own_names(file: Path, base: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """The adapter's tensor names -> the base's own."""
    known = canonicalise(base)
    found: dict[str, str] = {}
    unknown = []
    for name in names:
        inner = name
        while (canonical := canonical_name(inner)) not in known and inner.startswith(_WRAPPERS):
            inner = inner.partition(".")[2]
        if canonical in known:
            found[name] = known[canonical]
        else:
            unknown.append(name)
    if unknown:
        shown = ", ".join(unknown[:_SHOWN]) + (", ..." if len(unknown) > _SHOWN else "")
        tensors = f"{len(unknown)} tensor{'s' if len(unknown) > 1 else ''}"
        raise InputError(
            f"{file} changes {tensors} that the base does not have: {shown}."
            " Give the base that the adapter was trained on, and an adapter without a head."
        )
    return found
