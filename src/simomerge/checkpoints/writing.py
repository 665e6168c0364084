"""Write safetensors files, one or in shards: atomically, streaming, the same bytes for the same input."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from fractions import Fraction
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np

from simomerge.checkpoints.tensors import FLOATS, STORAGE, TensorInfo, as_numpy, encode, tensor_info
from simomerge.core.errors import InputError
from simomerge.core.files import atomic_file, atomic_write_text, check_room
from simomerge.core.parallel import ordered_map
from simomerge.core.progress import progress

_Tensors = Mapping[str, Any] | Iterable[tuple[str, Any]]

_UNITS = {"": 1, "B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS |= {f"{_prefix}B": 1000**_power, f"{_prefix}IB": 1024**_power}


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
    dtypes: str | Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    layout: Mapping[str, TensorInfo] | None = None,
    threads: int | None = None,
    durable: bool = True,
) -> Path:
    """Write named tensors to one safetensors file; a tensor per thread is in memory at a time.

    The header comes first in the file, so shapes and dtypes must be known before the first value: from
    ``tensors`` itself when it is a mapping (a Checkpoint answers without reading), else from ``layout``. The
    bytes depend on the tensors only, not on their order.

    Args:
        path: the file to write or replace; it appears complete or not at all.
        tensors: name -> numpy array or torch tensor, or an iterable of such pairs in any order. A mapping is read by
            several threads, and so is one that computes its tensors when they are read.
        dtypes: storage dtype of the floats, ``"F32"``, ``"F16"`` or ``"BF16"``, for all or by name; by
            default each keeps the dtype it has. Tensors that are not floats always do.
        metadata: text entries of the header; ``format: pt`` is added, which transformers asks for.
        layout: name -> TensorInfo of everything that ``tensors`` will deliver; needed for an iterable.
        threads: that read a mapping; all cores by default.
        durable: see `simomerge.checkpoints.atomic_file`.

    Raises:
        InputError: an unknown dtype, a value too large for it, a tensor that ``layout`` lacks or shapes
            otherwise, no space left (the needed bytes are named).

    Example:
        >>> write_safetensors("w.safetensors", {"w": np.ones(3, np.float32)}, "BF16").name
        'w.safetensors'
    """
    path = Path(path)
    layout = _layout(tensors, dtypes, layout)
    with _open(path, layout, metadata, durable) as write:
        _write_all(path, write, tensors, layout, threads)
    return path


def write_sharded(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
    dtypes: str | Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    layout: Mapping[str, TensorInfo] | None = None,
    max_shard_size: int | None = None,
    threads: int | None = None,
    durable: bool = True,
) -> list[Path]:
    """Write named tensors into a folder as transformers does; a tensor per thread is in memory at a time.

    What fits goes into ``model.safetensors``. More goes into ``model-00001-of-0000N.safetensors`` and so on, with
    ``model.safetensors.index.json`` beside them. Tensors are dealt out in the order of ``layout`` as
    huggingface_hub does: a shard is closed by the first tensor that it has no room for, and a tensor larger than
    the limit is a shard by itself. Each file appears complete or not at all; for all of them to appear together,
    write into a folder of :func:`~simomerge.core.files.atomic_folder`.

    Args:
        folder: where to write; it is made if it is not there, and should hold no other weights.
        tensors, dtypes, metadata, layout, threads, durable: see :func:`write_safetensors`.
        max_shard_size: bytes of tensors in one file; no limit by default. See :func:`parse_size`.

    Returns:
        The weight files, first to last; the index is not among them.

    Raises:
        InputError: see :func:`write_safetensors`; a limit below 1.

    Example:
        >>> tensors = {"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)}
        >>> [path.name for path in write_sharded("encoder", tensors, max_shard_size=12)]
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    folder = Path(folder)
    layout = _layout(tensors, dtypes, layout)
    shards = _partition(layout, max_shard_size)
    if len(shards) < 2:
        path = folder / "model.safetensors"
        return [write_safetensors(path, tensors, dtypes, metadata, layout, threads, durable)]
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    file_of = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    folder.mkdir(parents=True, exist_ok=True)
    check_room(folder, sum(info.nbytes for info in layout.values()))  # of all together, before the first
    layouts = {file: {name: layout[name] for name in names} for file, names in zip(files, shards, strict=True)}
    with ExitStack() as opened:
        held = _Shards(folder, layouts, lambda path, shard: _open(path, shard, metadata, durable), opened)

        def write(name: str, value: Any) -> None:
            if name not in file_of:
                raise InputError(f"{folder}: got '{name}', expected no such tensor.")
            held.write(file_of[name], name, value)

        _write_all(folder, write, tensors, layout, threads)
    index = {"metadata": {"total_size": sum(info.nbytes for info in layout.values())}, "weight_map": file_of}
    content = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    atomic_write_text(folder / "model.safetensors.index.json", content)
    return [folder / file for file in files]


class _Shards:
    """The files of the shards, each open from its first tensor to its last: a process may not open any number."""

    def __init__(
        self,
        folder: Path,
        layouts: Mapping[str, Mapping[str, TensorInfo]],
        open_one: Callable[[Path, Mapping[str, TensorInfo]], AbstractContextManager[Callable[[str, Any], None]]],
        opened: ExitStack,
    ) -> None:
        self.folder, self.layouts, self.open_one, self.opened = folder, layouts, open_one, opened
        self.missing = {file: len(layout) for file, layout in layouts.items()}
        self.live: dict[str, tuple[ExitStack, Callable[[str, Any], None]]] = {}
        self.lock = Lock()

    def write(self, file: str, name: str, value: Any) -> None:
        with self.lock:
            if file not in self.live:
                stack = self.opened.enter_context(ExitStack())  # which an error elsewhere unwinds
                self.live[file] = stack, stack.enter_context(self.open_one(self.folder / file, self.layouts[file]))
        stack, write = self.live[file]
        write(name, value)
        with self.lock:
            self.missing[file] -= 1
            last = not self.missing[file]
        if last:
            stack.close()


def parse_size(size: str | int) -> int:
    """A size in bytes from text such as ``"5GB"``, ``"500 MB"`` or ``"1.5GiB"``; a plain number is bytes.

    KB, MB, GB and TB are powers of 1000, KiB, MiB, GiB and TiB of 1024, in upper or lower case.

    Raises:
        InputError: not a size, or less than one byte.

    Example:
        >>> parse_size("5GB"), parse_size("1GiB"), parse_size(4096)
        (5000000000, 1073741824, 4096)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    if not match or match[2] not in _UNITS:
        raise InputError(f"{size!r} is not a size: give one such as 5GB, 500MB or 1GiB, or a number of bytes.")
    parsed = int(Fraction(match[1]) * _UNITS[match[2]])
    if parsed < 1:
        raise InputError(f"{size!r} is less than one byte: give a size such as 5GB, 500MB or 1GiB.")
    return parsed


def _layout(
    tensors: _Tensors, dtypes: str | Mapping[str, str] | None, layout: Mapping[str, TensorInfo] | None
) -> dict[str, TensorInfo]:
    """The shape and storage dtype of each tensor, in order, before any is read."""
    if layout is None:
        if not isinstance(tensors, Mapping):
            raise TypeError("an iterable of tensors needs a layout: its shapes are not known beforehand")
        layout = {name: tensor_info(tensors, name) for name in tensors}
    return {name: TensorInfo(info.shape, _dtype(name, info, dtypes)) for name, info in layout.items()}


def _write_all(
    path: Path,
    write: Callable[[str, Any], None],
    tensors: _Tensors,
    layout: Mapping[str, TensorInfo],
    threads: int | None,
) -> None:
    """Every tensor to its place: of a mapping read and written by several threads, else one by one."""

    def put(pair: tuple[str, Any]) -> str:
        name, value = pair
        write(name, tensors[name] if isinstance(tensors, Mapping) else value)
        return name

    pairs = ((name, None) for name in tensors) if isinstance(tensors, Mapping) else tensors
    began, missing = time.monotonic(), set(layout)
    # Closing waits for the threads, whatever happens here: the file that they write to is open until then.
    with closing(ordered_map(put, pairs, threads if isinstance(tensors, Mapping) else 1)) as finished:
        for name in finished:
            missing.remove(name)
            if time.monotonic() - began > 1:  # short work says nothing
                progress("write", len(layout) - len(missing), len(layout), "")
    if missing:
        raise InputError(f"{path}: {len(missing)} of {len(layout)} tensors never came, the first is '{min(missing)}'.")


@contextmanager
def _open(
    path: Path, layout: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None, durable: bool = True
) -> Iterator[Callable[[str, Any], None]]:
    """Yield a function that writes one tensor to its place in the file, whichever thread calls it."""
    header, offsets = _header(layout, metadata)
    pending = set(layout)
    size = len(header) + sum(info.nbytes for info in layout.values())
    with atomic_file(path, size, durable) as handle:
        write_at = _positional(handle)

        def write(name: str, value: Any) -> None:
            array = as_numpy(value, name)
            if name not in pending or array.shape != layout[name].shape:
                expected = f"{layout[name].shape} once" if name in layout else "no such tensor"
                raise InputError(f"{path}: got '{name}' of shape {array.shape}, expected {expected}.")
            # The memory of the array itself is handed over: a float32 array is written without a copy.
            stored = encode(array, layout[name].dtype, name).reshape(-1).view(np.uint8)
            write_at(stored.data, len(header) + offsets[name])
            pending.remove(name)

        write_at(memoryview(header), 0)
        yield write


def _positional(handle: BinaryIO) -> Callable[[memoryview, int], None]:
    """A function that writes bytes to a place in an open file; threads do so side by side where the system can."""
    lock, number = Lock(), handle.fileno()

    def write(content: memoryview, place: int) -> None:
        while content and hasattr(os, "pwrite"):
            written = os.pwrite(number, content, place)
            content, place = content[written:], place + written
        if content:
            with lock:
                handle.seek(place)
                handle.write(content)

    return write


def _partition(layout: Mapping[str, TensorInfo], limit: int | None) -> list[list[str]]:
    """The names in each shard, exactly as huggingface_hub deals them out."""
    if limit is None:
        return [list(layout)]
    if limit < 1:
        raise InputError(f"A shard of at most {limit} bytes holds nothing: give a size such as 5GB.")
    shards: list[list[str]] = []
    current: list[str] = []
    size = 0
    for name, info in layout.items():
        if info.nbytes > limit:
            # The shard that was being filled goes on after it.
            shards.append([name])
            continue
        if size + info.nbytes > limit:
            shards.append(current)
            current, size = [], 0
        current.append(name)
        size += info.nbytes
    return [*shards, current] if current else shards


def _dtype(name: str, info: TensorInfo, dtypes: str | Mapping[str, str] | None) -> str:
    if not info.is_float or dtypes is None:
        return info.dtype
    dtype = dtypes if isinstance(dtypes, str) else dtypes.get(name, info.dtype)
    if dtype not in FLOATS:
        raise InputError(f"'{name}' cannot be stored as {dtype!r}: use one of {', '.join(sorted(FLOATS))}.")
    return dtype


def _header(layout: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int]]:
    """The length-prefixed JSON header, and where each tensor begins after it."""
    # Wide dtypes first (as the safetensors library does), so that every tensor is aligned to its own width.
    names = sorted(layout, key=lambda name: (-int(STORAGE[layout[name].dtype][2:]), name))
    text = {"format": "pt"} | dict(metadata or {})
    header: dict[str, Any] = {"__metadata__": {key: str(text[key]) for key in sorted(text)}}
    offsets = {}
    position = 0
    for name in names:
        info = layout[name]
        offsets[name] = position
        position += info.nbytes
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offsets[name], position],
        }
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded, offsets
