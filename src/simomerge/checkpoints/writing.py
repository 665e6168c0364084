"""Write safetensors files, one or in shards: atomically, streaming, and the same bytes for the same input."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from fractions import Fraction
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from simomerge.checkpoints.tensors import FLOATS, STORAGE, TensorInfo, as_numpy, encode, tensor_info
from simomerge.core.errors import InputError
from simomerge.core.files import atomic_file, atomic_write_text, check_room
from simomerge.core.parallel import ordered_map
from simomerge.core.progress import progress

if TYPE_CHECKING:
    from huggingface_hub.serialization import StateDictSplit

Tensors = Mapping[str, Any] | Iterable[tuple[str, Any]]
"""Name -> numpy array or torch tensor, or an iterable of such pairs."""

_Layout = Mapping[str, TensorInfo]
_Dtypes = str | Mapping[str, str] | None
_Write = Callable[[str, Any, int | None], None]
"""Writes a tensor; or, with a place in the flattened tensor, values over a part of one that is written."""

_UNITS = {"": 1, "B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS |= {f"{_prefix}B": 1000**_power, f"{_prefix}IB": 1024**_power}


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Tensors,
    dtypes: _Dtypes = None,
    layout: _Layout | None = None,
    threads: int | None = None,
    durable: bool = True,
    check: Callable[[], None] | None = None,
) -> Path:
    """Write named tensors to one safetensors file, with one tensor per thread in memory.

    The header comes first in the file, so shapes and dtypes must be known before the first value. They come from
    ``tensors`` itself if it is a mapping (a Checkpoint knows them without reading values), else from ``layout``. The
    bytes depend only on the tensors, not on their order.

    Args:
        path: the file to write or replace; it appears complete or not at all.
        tensors: name -> numpy array or torch tensor, or an iterable of such pairs in any order. Several threads read
            a mapping, which may compute its tensors when they are read. If it has a method ``corrections()``, this is
            called when all tensors are written, and yields what to write over them: the name, the place in the
            flattened tensor, and the values.
        dtypes: storage dtype of the floats, ``"F32"``, ``"F16"`` or ``"BF16"``, for all or by name. By default each
            keeps its dtype. Tensors that are not floats always do.
        layout: name -> TensorInfo of everything that ``tensors`` delivers; required for an iterable.
        threads: threads that read a mapping; all cores by default.
        durable: see `simomerge.core.files.atomic_file`.
        check: called when all tensors are written, before the file appears; an exception discards it.

    Raises:
        InputError: an unknown dtype, a value too large for it, a tensor that is missing in ``layout`` or has another
            shape there, no space left (the message names the needed bytes).

    Example:
        >>> write_safetensors("w.safetensors", {"w": np.ones(3, np.float32)}, "BF16").name
        'w.safetensors'
    """
    path = Path(path)
    layout = storage_layout(tensors, dtypes, layout)
    with _open(path, layout, durable) as write:
        _write_all(path, write, tensors, layout, threads)
        if check is not None:
            check()
    return path


def write_sharded(
    folder: str | os.PathLike[str],
    tensors: Tensors,
    dtypes: _Dtypes = None,
    layout: _Layout | None = None,
    max_shard_size: int | None = None,
    threads: int | None = None,
    durable: bool = True,
) -> list[Path]:
    """Write named tensors into a folder as transformers does, with one tensor per thread in memory.

    Tensors that fit go into ``model.safetensors``. More go into ``model-00001-of-0000N.safetensors`` and so on, with
    ``model.safetensors.index.json`` next to them. huggingface_hub assigns the tensors in the order of ``layout``: the
    first tensor that has no room in a shard closes it, and a tensor larger than the limit is a shard of its own. Each
    file appears complete or not at all, but parts of tensors that come with a place are written into it later. To make
    all of them appear together, write into a folder of :func:`~simomerge.core.files.atomic_folder`.

    Args:
        folder: where to write; it is created if needed, and should hold no other weights.
        tensors, dtypes, layout, threads, durable: see :func:`write_safetensors`.
        max_shard_size: bytes of tensors in one file; no limit by default. See :func:`parse_size`.

    Returns:
        The weight files, first to last, without the index.

    Raises:
        InputError: see :func:`write_safetensors`; a limit below 1.

    Example:
        >>> tensors = {"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)}
        >>> [path.name for path in write_sharded("encoder", tensors, max_shard_size=12)]
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    folder = Path(folder)
    layout = storage_layout(tensors, dtypes, layout)
    split = None if max_shard_size is None else _split(layout, max_shard_size)
    if split is None or not split.is_sharded:
        return [write_safetensors(folder / "model.safetensors", tensors, None, layout, threads, durable)]
    folder.mkdir(parents=True, exist_ok=True)
    check_room(folder, split.metadata["total_size"])  # for all shards, before the first one is written
    with ExitStack() as opened:
        files = split.filename_to_tensors.items()
        layouts = {folder / file: {name: layout[name] for name in names} for file, names in files}
        _write_all(folder, _Shards(folder, layouts, durable, opened).write, tensors, layout, threads)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    content = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    atomic_write_text(folder / "model.safetensors.index.json", content)
    return list(layouts)


def storage_layout(tensors: Tensors, dtypes: _Dtypes = None, layout: _Layout | None = None) -> dict[str, TensorInfo]:
    """The shape and storage dtype of each tensor, in order, without reading a value.

    Args:
        tensors, dtypes, layout: see :func:`write_safetensors`.

    Raises:
        InputError: an unknown dtype, or a value that is not a tensor.

    Example:
        >>> storage_layout({"w": np.ones(3, np.float32)}, "BF16")
        {'w': TensorInfo(shape=(3,), dtype='BF16')}
    """
    if layout is None:
        if not isinstance(tensors, Mapping):
            raise TypeError("an iterable of tensors needs a layout: its shapes are not known beforehand")
        layout = {name: tensor_info(tensors, name) for name in tensors}
    return {name: TensorInfo(info.shape, _dtype(name, info, dtypes)) for name, info in layout.items()}


def parse_size(size: str | int) -> int:
    """A size in bytes from text such as ``"5GB"``, ``"500 MB"`` or ``"1.5GiB"``; a plain number means bytes.

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


class _Shards:
    """The shard files. Each is open from its first tensor to its last, because the number of open files is limited.

    Args:
        folder: the folder of the shards, for messages.
        layouts: file -> the tensors in it.
        durable: see :func:`write_safetensors`.
        opened: closes the files that are still open when an error ends the writing.
    """

    def __init__(self, folder: Path, layouts: Mapping[Path, _Layout], durable: bool, opened: ExitStack) -> None:
        self.folder, self.layouts, self.durable, self.opened = folder, layouts, durable, opened
        self.file_of = {name: file for file, layout in layouts.items() for name in layout}
        self.missing = {file: len(layout) for file, layout in layouts.items()}
        self.writers: dict[Path, tuple[ExitStack, _Write]] = {}
        self.lock = Lock()

    def write(self, name: str, value: Any, place: int | None = None) -> None:
        """Write one tensor to its shard, or a part of one; several threads may call it."""
        file = self.file_of.get(name)
        if file is None:
            raise InputError(f"{self.folder}: got '{name}', expected no such tensor.")
        if place is not None:  # Every tensor is written, so the file is complete.
            layout = self.layouts[file]
            with file.open("r+b") as handle:
                _positional(handle)(*_stored_part(layout, _header(layout), name, value, place))
            return
        with self.lock:
            if file not in self.writers:
                stack = self.opened.enter_context(ExitStack())
                self.writers[file] = stack, stack.enter_context(_open(file, self.layouts[file], self.durable))
        stack, write = self.writers[file]
        write(name, value, None)
        with self.lock:
            self.missing[file] -= 1
            last = not self.missing[file]
        if last:
            stack.close()


def _write_all(path: Path, write: _Write, tensors: Tensors, layout: _Layout, threads: int | None) -> None:
    """Write every tensor: several threads read and write a mapping, one thread an iterable."""

    def put(pair: tuple[str, Any]) -> str:
        name, value = pair
        write(name, tensors[name] if isinstance(tensors, Mapping) else value, None)
        return name

    pairs = ((name, None) for name in tensors) if isinstance(tensors, Mapping) else tensors
    began, missing = time.monotonic(), set(layout)
    # Closing waits for the threads even after an error: the file that they write to stays open until then.
    with closing(ordered_map(put, pairs, threads if isinstance(tensors, Mapping) else 1)) as finished:
        for name in finished:
            missing.remove(name)
            if time.monotonic() - began > 1:  # short work reports no progress
                progress("write", len(layout) - len(missing), len(layout), "")
    if missing:
        raise InputError(f"{path}: {len(missing)} of {len(layout)} tensors never came, the first is '{min(missing)}'.")
    corrections = getattr(tensors, "corrections", None)
    for name, place, values in corrections() if callable(corrections) else ():
        write(name, values, place)


@contextmanager
def _open(path: Path, layout: _Layout, durable: bool) -> Iterator[_Write]:
    """Yield a function that writes one tensor to its place in the file, from any thread."""
    header, offsets = _header(layout)
    pending = set(layout)
    size = len(header) + sum(info.nbytes for info in layout.values())
    with atomic_file(path, size, durable) as handle:
        write_at = _positional(handle)

        def write(name: str, value: Any, place: int | None) -> None:
            if place is not None:
                write_at(*_stored_part(layout, (header, offsets), name, value, place))
                return
            array = as_numpy(value, name)
            if name not in pending or array.shape != layout[name].shape:
                expected = f"{layout[name].shape} once" if name in layout else "no such tensor"
                raise InputError(f"{path}: got '{name}' of shape {array.shape}, expected {expected}.")
            write_at(*_stored_part(layout, (header, offsets), name, array, 0))
            pending.remove(name)

        write_at(memoryview(header), 0)
        yield write


def _stored_part(
    layout: _Layout, header: tuple[bytes, Mapping[str, int]], name: str, values: np.ndarray, place: int
) -> tuple[memoryview, int]:
    """The bytes of values from a place in the flattened tensor on, and where they begin in the file."""
    # This passes on the memory of the array itself: a float32 array is written without a copy.
    stored = encode(values, layout[name].dtype, name).reshape(-1)
    return stored.view(np.uint8).data, len(header[0]) + header[1][name] + place * stored.itemsize


def _positional(handle: BinaryIO) -> Callable[[memoryview, int], None]:
    """A function that writes bytes at a position of an open file, without waiting for other threads if possible."""
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


def _split(layout: _Layout, limit: int) -> StateDictSplit:
    if limit < 1:
        raise InputError(f"A shard of at most {limit} bytes holds nothing: give a size such as 5GB.")
    from huggingface_hub import split_state_dict_into_shards_factory

    pattern = "model{suffix}.safetensors"
    return split_state_dict_into_shards_factory(
        dict(layout), get_storage_size=lambda info: info.nbytes, filename_pattern=pattern, max_shard_size=limit
    )


def _dtype(name: str, info: TensorInfo, dtypes: _Dtypes) -> str:
    if not info.is_float or dtypes is None:
        return info.dtype
    dtype = dtypes if isinstance(dtypes, str) else dtypes.get(name, info.dtype)
    if dtype not in FLOATS:
        raise InputError(f"'{name}' cannot be stored as {dtype!r}: use one of {', '.join(sorted(FLOATS))}.")
    return dtype


def _header(layout: _Layout) -> tuple[bytes, dict[str, int]]:
    """The length-prefixed JSON header, and where each tensor begins after it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires this entry
    offsets, position = {}, 0
    # Wide dtypes come first, as in the safetensors library: then every tensor is aligned to its own width.
    for name in sorted(layout, key=lambda name: (-int(STORAGE[layout[name].dtype][2:]), name)):
        info = layout[name]
        offsets[name], position = position, position + info.nbytes
        span = [offsets[name], position]
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": span}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded, offsets
