"""A peft LoRA adapter, read as the full expert that it makes of its base.

An adapter holds two low-rank factors for some modules of the base; the weight of such a module changes by
``scale * B @ A``. Here the adapter acts like a checkpoint of the complete encoder, under the base's names. The task
vector of a tensor is computed from its factors, which avoids the rounding of adding to the base first.

The conventions are those of peft (checked with 0.21): the scale is ``alpha / r``, or ``alpha / sqrt(r)`` with
``use_rslora``; the keys of ``rank_pattern`` and ``alpha_pattern`` are regular expressions for the end of a module's
name; the factors of an Embedding and of a transposed layer (Conv1D) are multiplied to the transposed weight. peft saves
one ``fan_in_fan_out`` for all layers and decides by the class of each, so here shapes and usual names decide.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.checkpoints.lora_config import CONFIG, not_plain, rank_and_scale, read_config
from simomerge.checkpoints.lora_names import REMEDY, of_base, others_of, own_names
from simomerge.checkpoints.names import canonicalise
from simomerge.checkpoints.parts import parts_of, separated
from simomerge.checkpoints.reading import Checkpoint, open_checkpoint
from simomerge.checkpoints.tensors import TensorInfo, as_numpy, tensor_info
from simomerge.core.errors import InputError

_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<bias>\.bias|\.weight)?$")
_INFIX = re.compile(r"\.(?:base_layer|modules_to_save)(?=\.|$)")  # which peft inserts between a module and its tensors
_UNTRAINED = ".original_module."  # peft's copy of a module from before the training; not needed
_CONV1D = re.compile(r"(?:c_attn|c_proj|c_fc|q_attn|\w*conv1d)$", re.IGNORECASE)  # usual names of Conv1D layers
_LINEAR = re.compile(r"\b(?:lin(?:ear)?\d*|query|key|value|dense|qkv|fc\d*|(?:\w+_)?proj)$")  # and of Linear layers


@dataclass(frozen=True)
class _LowRank:
    """The change of one tensor: ``scale * B @ A``, or ``scale * B`` if there is no A (the bias of B).

    If the base has the tensor as several (see `parts`), ``rows`` is the index of one and their number.
    """

    a: str | None
    b: str
    scale: float
    transposed: bool
    rows: tuple[int, int]

    def shape(self, adapter: Checkpoint) -> tuple[int, ...]:
        b = _part_shape(adapter.info(self.b).shape, self.rows)
        shape = b if self.a is None else (b[0], *adapter.info(self.a).shape[1:])
        return shape[::-1] if self.transposed else shape

    def delta(self, adapter: Checkpoint) -> np.ndarray:
        b = _part(adapter[self.b], self.rows)
        if self.a is None:
            return b * np.float32(self.scale)
        # A convolution's A is (r, in, height, width) and its B (out, r, 1, 1): flattened, the product is the same.
        a = adapter[self.a]
        product = b.reshape(len(b), -1) @ a.reshape(len(a), -1)
        product *= np.float32(self.scale)
        return np.ascontiguousarray(product.T) if self.transposed else product.reshape(len(b), *a.shape[1:])


@dataclass(frozen=True)
class _Full:
    """A tensor that was trained in full: its key in the adapter, and which of its parts it is."""

    key: str
    rows: tuple[int, int]

    def shape(self, adapter: Checkpoint) -> tuple[int, ...]:
        return _part_shape(adapter.info(self.key).shape, self.rows)

    def values(self, adapter: Checkpoint) -> np.ndarray:
        return _part(adapter[self.key], self.rows)


@dataclass(frozen=True, eq=False, repr=False)
class LoraExpert(Mapping[str, np.ndarray]):
    """A base with a LoRA adapter: a read-only, lazy mapping like a Checkpoint; made by :func:`open_lora`.

    ``expert[name]`` computes one tensor, float32: the base's plus the adapter's low-rank change, or the tensor that
    was trained in full instead (``modules_to_save``, biases). All others are the base's. Names are the base's, with
    its parts apart (see `simomerge.checkpoints.parts`). Treat arrays as read-only.

    Attributes:
        path: the adapter's folder.
        base: the mapping it was opened with; ``task_vector`` is relative to it.
        head: the tensors of the adapter that were trained in full and that the base does not have.
    """

    path: Path
    base: Mapping[str, Any]
    head: Checkpoint
    _adapter: Checkpoint
    _low_rank: Mapping[str, _LowRank]
    _replaced: Mapping[str, _Full]
    _parts: Mapping[str, Any]  # the base with its parts apart

    def info(self, name: str) -> TensorInfo:
        """Shape of one tensor and the dtype that holds it: the base's, or F32 where B @ A is added. Raises KeyError."""
        info = tensor_info(self._parts, name)
        if name in self._low_rank:
            return TensorInfo(info.shape, "F32")
        if name in self._replaced:
            return TensorInfo(info.shape, self._adapter.info(self._replaced[name].key).dtype)
        return info

    def check_unchanged(self) -> None:
        """Raise InputError if the adapter's file is not what it was when it was opened."""
        self._adapter.check_unchanged()

    def task_vector(self, name: str) -> np.ndarray | None:
        """The tensor minus the base's, float32, or None if the adapter does not change it. Raises KeyError.

        If only the factors change a tensor, this is ``scale * B @ A`` itself.
        """
        if name not in self._parts:
            raise KeyError(name)
        delta = self._low_rank[name].delta(self._adapter) if name in self._low_rank else None
        if name not in self._replaced:
            return delta
        difference = self._replaced[name].values(self._adapter) - as_numpy(self._parts[name], name)
        return difference if delta is None else difference + delta

    def __getitem__(self, name: str) -> np.ndarray:
        full = self._replaced.get(name)
        start = as_numpy(self._parts[name], name) if full is None else full.values(self._adapter)
        return start + self._low_rank[name].delta(self._adapter) if name in self._low_rank else start

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __repr__(self) -> str:
        changed = len(self._low_rank.keys() | self._replaced.keys())
        return f"LoraExpert({str(self.path)!r}, {changed} of {len(self)} tensors changed)"


def is_lora_folder(path: str | os.PathLike[str]) -> bool:
    """True for a folder that peft wrote: it holds an ``adapter_config.json``.

    Example:
        >>> is_lora_folder(".")
        False
    """
    return (Path(path) / CONFIG).is_file()


def open_lora(folder: str | os.PathLike[str], base: Mapping[str, Any], others: Sequence[str] = ()) -> LoraExpert:
    """Open a peft LoRA adapter as the expert that it makes of ``base``, without reading values.

    The adapter's names may be those in memory or on disk, behind ``base_model.model.`` and wrappers such as
    ``backbone.``; :func:`~simomerge.checkpoints.names.canonical_name` matches them with the base's. If all of them
    share one more prefix, it is left out. Modules in ``modules_to_save`` that the base does not have, such as a
    head, are apart in ``head``.

    Args:
        folder: ``adapter_config.json`` with ``adapter_model.safetensors`` or ``.bin``.
        base: the model that the adapter was trained on: name -> numpy array or torch tensor, or a Checkpoint.
        others: prefixes of more tensors that belong to no module of the base. Their factors are left out.

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
    config = read_config(folder / CONFIG)
    file = next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise InputError(f"{folder} holds no adapter weights (looked for {', '.join(_WEIGHT_FILES)}): copy them there.")
    adapter = open_checkpoint(file)
    factors, replaced = _sort(file, adapter)
    low_rank: dict[str, _LowRank] = {}
    for module, sides in factors.items():
        low_rank |= _changes(file, adapter, config, module, sides)
    parts = separated(base)
    known = canonicalise(parts)
    low_rank, replaced = of_base(known, low_rank, others), of_base(known, replaced)
    extra = others_of(known, config, replaced, others)
    head = adapter.renamed({name: replaced.pop(name).key for name in extra})
    own = own_names(file, known, [*low_rank, *replaced])
    shapes = {name: tensor_info(parts, own[name]).shape for name in own}
    low_rank = _oriented(file, adapter, config, low_rank, shapes)
    changed = {name: change.shape(adapter) for name, change in low_rank.items()}
    for name, shape in (*changed.items(), *((name, full.shape(adapter)) for name, full in replaced.items())):
        if shape != shapes[name]:
            raise InputError(
                f"{file} changes '{name}' by a tensor of shape {shape}, but the base's has {shapes[name]}: give the"
                " base that the adapter was trained on."
            )
    changes = {own[name]: change for name, change in low_rank.items()}
    in_full = {own[name]: full for name, full in replaced.items()}
    return LoraExpert(folder, base, head, adapter, changes, in_full, parts)


def _sort(file: Path, adapter: Checkpoint) -> tuple[dict[str, dict[str, str]], dict[str, _Full]]:
    """Sort the adapter's keys.

    Returns:
        For each module its factors, such as {"A": key, "B": key, "B.bias": key}, and for each tensor that was trained
        in full its place.
    """
    factors: dict[str, dict[str, str]] = {}
    replaced: dict[str, _Full] = {}
    for key in adapter:
        name = key.removeprefix("base_model.model.")
        if ".lora_magnitude_vector" in name:
            raise not_plain(file, "DoRA")
        if match := _FACTOR.match(name):
            side = (match["embedding"] or "") + match["side"] + (".bias" if match["bias"] == ".bias" else "")
            factors.setdefault(match["module"], {})[side] = key
        elif ".lora_" in name:
            raise InputError(f"{file}: '{key}' is not a tensor of a plain LoRA adapter: save it again with peft.")
        elif _UNTRAINED not in name:
            # If modules_to_save and biases name the same tensor, peft writes it twice, with the same values.
            for part, rows in _parts_and_rows(_INFIX.sub("", name)):
                replaced.setdefault(part, _Full(key, rows))
    if not factors and not replaced:
        raise InputError(f"{file} holds no tensors: save the adapter again.")
    return factors, replaced


def _changes(
    file: Path, adapter: Checkpoint, config: Mapping[str, Any], module: str, sides: Mapping[str, str]
) -> dict[str, _LowRank]:
    """The tensors of a module that its factors change: the weight, and the bias if B has one.

    Whether a weight is stored transposed is not known yet, except for embeddings; see `_oriented`.
    """
    embedding = "embedding_A" in sides or "embedding_B" in sides
    a, b = (sides.get(("embedding_" if embedding else "") + side) for side in "AB")
    if a is None or b is None:
        missing, given = ("A", "B") if a is None else ("B", "A")
        raise InputError(f"{file}: '{module}' has lora_{given} but no lora_{missing}: save the adapter again.")
    # The output projection inside an nn.MultiheadAttention takes the rank of the attention. peft adds its change twice,
    # in the forward pass of the training as in its merge.
    outer, inside, _ = module.partition(".base_layer.out_proj")
    rank, scale = rank_and_scale(file.with_name(CONFIG), config, outer)
    scale *= 2 if inside else 1
    shapes = adapter.info(a).shape, adapter.info(b).shape
    if len(shapes[0]) > 2 and shapes[0][0] == rank and shapes[1][1:2] < (rank,) and rank % max(shapes[1][1], 1) == 0:
        raise InputError(
            f"{file}: '{module}' is a grouped convolution, which peft cannot merge either: train without it."
        )
    if len(shapes[0]) < 2 or len(shapes[0]) != len(shapes[1]) or {shapes[0][0], shapes[1][1]} != {rank}:
        raise InputError(
            f"{file}: the factors of '{module}' have the shapes {shapes[0]} and {shapes[1]}, which do not fit the "
            f"rank {rank} of {CONFIG}: take both files from one training."
        )
    name = _INFIX.sub("", module)
    changes = {part: _LowRank(a, b, scale, embedding, rows) for part, rows in _parts_and_rows(f"{name}.weight")}
    if "B.bias" in sides:
        bias = sides["B.bias"]
        changes |= {part: _LowRank(None, bias, scale, False, rows) for part, rows in _parts_and_rows(f"{name}.bias")}
    return changes


def _parts_and_rows(name: str) -> list[tuple[str, tuple[int, int]]]:
    parts = parts_of(name)
    return [(part, (index, len(parts))) for index, part in enumerate(parts)]


def _part_shape(shape: tuple[int, ...], rows: tuple[int, int]) -> tuple[int, ...]:
    return shape if rows[1] == 1 else (shape[0] // rows[1], *shape[1:])


def _part(array: np.ndarray, rows: tuple[int, int]) -> np.ndarray:
    count = len(array) // rows[1] if array.ndim else 1
    return array if rows[1] == 1 else array[rows[0] * count : (rows[0] + 1) * count]


def _oriented(
    file: Path,
    adapter: Checkpoint,
    config: Mapping[str, Any],
    low_rank: Mapping[str, _LowRank],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, _LowRank]:
    """The changes, transposed where the base stores a layer as (in, out).

    The shape of the base's tensor decides. For a square one the usual names decide, and else all the other layers.
    """
    plain = {name: change.shape(adapter) for name, change in low_rank.items() if change.a and not change.transposed}
    matrices = {name: shape for name, shape in plain.items() if len(shape) == 2}
    turned = {name: shapes[name] == shape[::-1] for name, shape in matrices.items() if shape[0] != shape[1]}
    others = set(turned.values())
    for name in matrices.keys() - turned.keys():
        module = name.removesuffix(".weight")
        usually_turned = _CONV1D.search(module) is not None
        is_linear = _LINEAR.search(module) is not None and not usually_turned
        some_turned = config.get("fan_in_fan_out") or True in others or module.lower().endswith("conv1d")
        if is_linear or not some_turned:
            turned[name] = False
        elif usually_turned:
            turned[name] = True
        elif len(others) == 1:
            turned[name] = True in others
        else:
            raise InputError(
                f"{file}: {CONFIG} says fan_in_fan_out, and '{module}' is square, so it may be stored either way:"
                f" {REMEDY}."
            )
    return {name: replace(change, transposed=turned.get(name, change.transposed)) for name, change in low_rank.items()}
