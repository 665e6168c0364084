"""Rooms on disk: rendered once per machine, then memory-mapped.

A finished set is a folder with one .npy file per modality. It is written under a temporary name beside its
place and renamed at the end, so a set is whole or absent; two processes may render the same set at once, and
the second to finish takes the first one's.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from simomerge.core.errors import InputError
from simomerge.core.progress import progress
from simomerge.datasets.rooms.generate import check_request, render_rooms
from simomerge.datasets.rooms.labels import MODALITIES

# Raise this whenever the same request would give other numbers: old caches are then left aside.
RENDER_VERSION = 1
_CHUNK = 64
_STALE_SECONDS = 7 * 24 * 3600
_LAYOUT: dict[str, tuple[str, tuple[int, ...]]] = {
    "image": ("uint8", (3,)),
    "segmentation": ("uint8", ()),
    "depth": ("float16", ()),
    "normals": ("int8", (3,)),
    "edges": ("uint8", ()),
    "texture": ("uint8", ()),
    "keypoints": ("uint8", ()),
}


def load_rooms(
    split: str,
    count: int,
    height: int = 64,
    width: int = 80,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    workers: int | None = None,
) -> dict[str, np.ndarray]:
    """The first rooms of a split, from the cache folder or rendered into it now.

    Args:
        split: One of ``SPLITS``; scenes of different splits are independent.
        count: How many scenes (N).
        height, width: Size of the pictures in pixels (H, W).
        seed: Seed of the data set, 0 or more.
        cache_dir: Where to keep the arrays; by default the environment variable SIMOMERGE_CACHE, else the
            user's cache folder.
        workers: Processes to render with; by default one per core, and 1 renders in this process.

    Returns:
        Read-only memory-mapped arrays: image (N, H, W, 3) uint8, segmentation (N, H, W) uint8, depth
        (N, H, W) float16 in metres, normals (N, H, W, 3) int8 (unit vector times 127), edges, texture and
        keypoints (N, H, W) uint8. See ``dense_labels`` for their meaning.

    Raises:
        InputError: If the split is unknown or a number is out of range.

    Example:
        >>> rooms = load_rooms("val", 128, workers=1)
        >>> float(rooms["depth"].min()) > 0
        True
    """
    check_request(split, height, width, seed)
    if count < 1:
        raise InputError(f"The count of rooms is {count}: ask for 1 or more.")
    if workers is not None and workers < 1:
        raise InputError(f"The number of workers is {workers}: give 1 or more.")
    parent = cache_folder(cache_dir) / "rooms" / f"v{RENDER_VERSION}-seed{seed}-{split}-{height}x{width}"
    found = _find(parent, count, height, width)
    if found is not None:
        return found
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"Cannot write to the cache folder {parent} ({error.strerror}): set SIMOMERGE_CACHE to another."
        ) from error
    _remove_stale(parent)
    temporary = parent / f".{count}-{uuid.uuid4().hex}"
    try:
        _create(temporary, count, height, width)
        _fill(temporary, (seed, split, height, width), count, workers)
        return _publish(temporary, parent, count, height, width)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder for things that can be made again: the argument, SIMOMERGE_CACHE, or the user's."""
    chosen = cache_dir or os.environ.get("SIMOMERGE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("simomerge"))


# Finding ------------------------------------------------------------------------------------------------


def _find(parent: Path, count: int, height: int, width: int) -> dict[str, np.ndarray] | None:
    """The smallest whole set with at least ``count`` scenes, cut to ``count``."""
    sizes = sorted(int(folder.name) for folder in parent.glob("[0-9]*") if folder.name.isdecimal())
    for size in sizes:
        if size >= count:
            arrays = _open(parent / str(size), size, height, width)
            if arrays is not None:
                return {name: array[:count] for name, array in arrays.items()}
    return None


def _open(folder: Path, count: int, height: int, width: int) -> dict[str, np.ndarray] | None:
    """Memory-map a set; None if a file is missing, cut short or of another shape."""
    arrays = {}
    for name, (dtype, channels) in _LAYOUT.items():
        try:
            array = np.load(folder / f"{name}.npy", mmap_mode="r")
        except (OSError, ValueError, EOFError, SyntaxError):
            return None
        if array.shape != (count, height, width, *channels) or array.dtype != dtype:
            return None
        arrays[name] = array
    return arrays


# Making -------------------------------------------------------------------------------------------------


def _create(folder: Path, count: int, height: int, width: int) -> None:
    folder.mkdir()
    needed = count * height * width * sum(np.dtype(d).itemsize * math.prod(c) for d, c in _LAYOUT.values())
    free = shutil.disk_usage(folder).free
    if needed > free:  # a full disk under a memory map would kill the process
        raise InputError(
            f"{count} rooms need {needed / 1e9:.1f} GB in {folder.parent}, {free / 1e9:.1f} GB are free:"
            " make room, or set SIMOMERGE_CACHE to a folder on another disk."
        )
    for name, (dtype, channels) in _LAYOUT.items():
        shape = (count, height, width, *channels)
        np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.dtype(dtype), shape=shape)


def _render_into(folder: Path, request: tuple[int, str, int, int], start: int, stop: int) -> int:
    """Render some scenes into the files of a folder; runs in a worker process."""
    seed, split, height, width = request
    rooms = render_rooms(seed, split, start, stop, height, width)
    for name in MODALITIES:
        target = np.lib.format.open_memmap(folder / f"{name}.npy", mode="r+")
        target[start:stop] = rooms[name]
        target.flush()
    return stop - start


def _fill(
    folder: Path,
    request: tuple[int, str, int, int],
    count: int,
    workers: int | None,
) -> None:
    chunks = [(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    processes = min(workers or os.cpu_count() or 1, len(chunks))
    done = 0
    for finished in _run(folder, request, chunks, processes):
        done += finished
        progress(f"render {request[1]}", done, count)


def _run(
    folder: Path, request: tuple[int, str, int, int], chunks: list[tuple[int, int]], processes: int
) -> Iterator[int]:
    """Render chunks, yielding the size of each when it is done.

    In interpreters of their own, not by multiprocessing: that would run the caller's script once more in each
    process, which a script without a main guard does not survive.
    """
    if processes == 1:
        yield from (_render_into(folder, request, *chunk) for chunk in chunks)
        return
    done: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
    started = [_start(folder, request, chunks[share::processes]) for share in range(processes)]
    threads = [threading.Thread(target=_listen, args=(process, done), daemon=True) for process in started]
    for thread in threads:
        thread.start()
    try:
        running = processes
        while running:
            message = done.get()
            if isinstance(message, BaseException):
                raise message
            if message is None:
                running -= 1
            else:
                yield message
    finally:
        for process in started:
            process.kill()
            process.wait()


def _start(folder: Path, request: tuple[int, str, int, int], chunks: list[tuple[int, int]]) -> subprocess.Popen[str]:
    code = "import sys; from simomerge.datasets.rooms.cache import render_share; render_share(sys.argv[1])"
    share = json.dumps({"folder": str(folder), "request": request, "chunks": chunks})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-c", code, share], stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def render_share(share: str) -> None:
    """Render chunks and print the size of each; what a process of `load_rooms` runs."""
    work = json.loads(share)
    for start, stop in work["chunks"]:
        print(_render_into(Path(work["folder"]), tuple(work["request"]), start, stop), flush=True)


def _listen(process: subprocess.Popen[str], done: queue.SimpleQueue[int | BaseException | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        done.put(int(line))
    status = process.wait()
    done.put(InputError(f"Rendering rooms failed (exit status {status}): try workers=1.") if status else None)


def _publish(temporary: Path, parent: Path, count: int, height: int, width: int) -> dict[str, np.ndarray]:
    """Move a finished set to its place, unless another process has put a whole one there meanwhile."""
    final = parent / str(count)
    for _ in range(10):
        try:
            temporary.rename(final)
        except OSError:
            if not final.exists():
                raise
        arrays = _open(final, count, height, width)
        if arrays is not None:
            return arrays
        # A damaged set is in the way. Another process may be moving it aside too: then just try again.
        aside = parent / f".damaged-{uuid.uuid4().hex}"
        with contextlib.suppress(OSError):
            final.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    raise InputError(f"The cached rooms in {final} are damaged and cannot be replaced: delete that folder.")


def _remove_stale(parent: Path) -> None:
    """Delete what killed processes left behind, once it is old enough to be nobody's work."""
    for folder in parent.glob(".*-*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
