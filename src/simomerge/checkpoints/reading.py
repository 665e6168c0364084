"""Open a checkpoint: names, shapes and dtypes are read at once, values one tensor at a time."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from simomerge.checkpoints.stored import Pieces, WeightFile
from simomerge.checkpoints.tensors import STORAGE, TensorInfo, as_numpy, decode, value_info
from simomerge.checkpoints.training_files import state_dict_in
from simomerge.core.documents import read_json
from simomerge.core.errors import InputError
from simomerge.core.hub import similar
from simomerge.core.model_files import FOLDER_WEIGHTS, TORCH_FILES, WEIGHT_FILES, file_and_key
from simomerge.core.regular import check_regular
from simomerge.core.text import shown


class _Entry(NamedTuple):
    info: TensorInfo
    stored: Any  # a flat array or `Pieces` in the storage dtype, or a torch tensor
    file: WeightFile


class Checkpoint(Mapping[str, np.ndarray]):
    """A read-only, lazy mapping from tensor names to numpy arrays; made by :func:`open_checkpoint`.

    ``checkpoint[name]`` reads one tensor: floats of any storage dtype as float32, all others as stored. The array may
    be a view of the file: treat it as read-only. Names are those in the file.

    Attributes:
        path: the file, with ``::KEY`` if that was given, or the folder that holds the weights.
    """

    def __init__(self, path: Path, entries: dict[str, _Entry]) -> None:
        self.path = path
        self._entries = entries

    def info(self, name: str) -> TensorInfo:
        """Shape and storage dtype of one tensor, without reading its values. Raises KeyError."""
        return self._entries[name].info

    def __getitem__(self, name: str) -> np.ndarray:
        info, stored, _ = self._entries[name]
        if isinstance(stored, (np.ndarray, Pieces)):
            return decode(stored[:], info).reshape(info.shape)
        return as_numpy(stored, name)

    def flat(self, name: str, part: slice = slice(None)) -> np.ndarray:
        """A part of a tensor's flattened values; only this part is read. Raises KeyError."""
        info, stored, _ = self._entries[name]
        if isinstance(stored, (np.ndarray, Pieces)):
            return decode(stored[part], info)
        return as_numpy(stored.reshape(-1)[part], name)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def check_unchanged(self) -> None:
        """Raise InputError if a file is not what it was when it was opened: values may be of two versions."""
        for file in {id(entry.file): entry.file for entry in self._entries.values()}.values():
            file.check_unchanged()

    def only(self, names: Iterable[str]) -> Checkpoint:
        """The same file, reduced to some of its tensors. Raises KeyError."""
        return self.renamed({name: name for name in names})

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The same file, reduced to some of its tensors, under new names: new name -> own name. Raises KeyError."""
        return Checkpoint(self.path, {new: self._entries[own] for new, own in names.items()})

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors)"


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open the weights at ``path`` without reading their values.

    Args:
        path: a ``.safetensors`` file; a transformers folder (one file, or shards with an index); a simomerge model
            folder (its encoder is the checkpoint); a ``.pt``, ``.pth``, ``.pth.tar``, ``.bin`` or ``.ckpt`` file that
            holds a state dict, alone or under a usual key such as ``state_dict`` (see `state_dict_in`). These are
            loaded with ``torch.load(weights_only=True)``, which refuses files that could run code. ``FILE::KEY`` names
            one of several state dicts in a file.

    Raises:
        InputError: nothing there, no weights in the folder, a damaged file, a missing shard, a file that holds more
            than tensors, or several sets of weights of which none is chosen.

    Example:
        >>> from simomerge.checkpoints import write_safetensors
        >>> path = write_safetensors("model.safetensors", {"norm.weight": np.ones(4, np.float16)})
        >>> open_checkpoint(path).info("norm.weight")
        TensorInfo(shape=(4,), dtype='F16')
        >>> open_checkpoint(path)["norm.weight"]
        array([1., 1., 1., 1.], dtype=float32)
    """
    file, key = file_and_key(os.fspath(path))
    if Path(file).is_dir():
        return _open_folder(Path(file))
    return Checkpoint(Path(path), _open_file(Path(file), key))


def _open_folder(folder: Path) -> Checkpoint:
    if (folder / "simo.json").is_file():
        folder = folder / "encoder"
    for name in FOLDER_WEIGHTS:
        file = folder / name
        if file.is_file():
            entries = _open_shards(file) if name.endswith(".index.json") else _open_file(file)
            return Checkpoint(folder, entries)
    raise InputError(
        f"{folder} holds no weights (looked for {', '.join(FOLDER_WEIGHTS)}): "
        "give a transformers folder, a simomerge model or a weight file."
    )


def _open_file(file: Path, key: str = "") -> dict[str, _Entry]:
    check_regular(file, "give a weight file.")
    if not file.exists():
        raise InputError(f"{file} does not exist: check the path.{similar(file)}")
    if file.name.endswith(TORCH_FILES):
        return _open_torch(file, key)
    if key:
        raise InputError(f"{file} holds one set of weights: leave '::{key}' out.")
    if file.suffix == ".safetensors":
        return _open_safetensors(file)
    known = ", ".join(WEIGHT_FILES)
    raise InputError(f"{file} is not a weight file: give a folder or a file that ends in {known}.")


def check_safetensors(file: Path) -> None:
    """Compare the header of a file with its size: offsets, overlaps and length.

    Raises:
        InputError: The file is truncated or is not a safetensors file.
    """
    check_regular(file, "give a safetensors file.")
    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a complete safetensors file ({error}): copy or download it again.") from error


def _open_safetensors(file: Path) -> dict[str, _Entry]:
    check_safetensors(file)  # The code below can trust the header.
    with file.open("rb") as handle:
        header_length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(header_length))
    weights = WeightFile(file)
    entries = {}
    for name, spec in header.items():
        if name == "__metadata__":
            continue
        if spec["dtype"] not in STORAGE:
            raise InputError(f"{file}: '{name}' is stored as {spec['dtype']}: convert it to F32, F16 or BF16.")
        info = TensorInfo(tuple(spec["shape"]), spec["dtype"])
        stored = weights.array(8 + header_length + spec["data_offsets"][0], STORAGE[info.dtype], info.size)
        entries[name] = _Entry(info, stored, weights)
    return entries


def _open_shards(index: Path) -> dict[str, _Entry]:
    weight_map = read_json(index, "download it again.", {"weight_map": {str: str}})["weight_map"]
    opened, present = {}, {entry.name for entry in index.parent.iterdir()}
    for shard in sorted(set(weight_map.values())):
        if shard not in present:  # nor may an index lead out of its folder
            raise InputError(f"{index} names the shard {shown(shard)}, which is not next to it: download it again.")
        if shard.endswith(".json"):
            raise InputError(f"{index} names the shard {shown(shard)}, which holds no weights: download it again.")
        opened[shard] = _open_file(index.parent / shard)
    for name, shard in weight_map.items():
        if name not in opened[shard]:
            raise InputError(f"{index} places '{name}' in '{shard}', which does not hold it: download both again.")
    return {name: opened[shard][name] for name, shard in weight_map.items()}


def _open_torch(file: Path, key: str) -> dict[str, _Entry]:
    import torch

    try:
        is_zip = zipfile.is_zipfile(file)
    except zipfile.BadZipFile:
        is_zip = False
    with file.open("rb") as handle:
        if handle.read(2) == b"PK" and not is_zip:
            raise InputError(f"{file} is not a complete torch file (its end is missing): copy or save it again.")
    try:
        # Files from before torch 1.6 are not zip files and cannot be memory-mapped.
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        holds = f"it holds a {culprit[1]}" if culprit else "it is not a torch file of tensors"
        raise InputError(
            f"{file} was refused: {holds}, and loading it could run code. "
            "Save the state dict alone, best as safetensors."
        ) from error
    except Exception as error:  # torch raises many kinds of errors for damaged files
        # The first sentence: torch goes on with advice for its developers.
        reason = re.split(r"\.\s|\n", str(error))[0].rstrip(".") if str(error) else type(error).__name__
        raise InputError(f"{file} is not a complete torch file ({reason}): copy or save it again.") from error
    state = state_dict_in(loaded, file, key)
    weights = WeightFile(file)
    return {name: _Entry(value_info(tensor, name), tensor, weights) for name, tensor in state.items()}
