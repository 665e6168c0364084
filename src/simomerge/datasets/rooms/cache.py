"""Rooms on disk: rendered once per machine, then memory-mapped.

A finished set is a folder with one .npy file per modality. It is written under a temporary name next to its final place
and renamed at the end, so a set is complete or absent. Two processes may render the same set at once: the second to
finish uses the set of the first.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simomerge.core.errors import InputError
from simomerge.core.files import cache_folder
from simomerge.core.kept import kept_array
from simomerge.core.parallel import available_cores
from simomerge.core.progress import progress
from simomerge.datasets.rooms.generate import check_request, render_rooms
from simomerge.datasets.rooms.labels import MODALITIES

RENDER_VERSION = 1
"""Raise this whenever the same request would give other numbers: caches of other versions are not used."""
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
"""By modality, the dtype and the channels of a pixel."""


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
        count: Number of scenes (N).
        height, width: Size of the images in pixels (H, W).
        seed: Seed of the data set, 0 or more.
        cache_dir: Folder to keep the arrays in; by default the environment variable SIMOMERGE_CACHE, else the user's
            cache folder.
        workers: Processes that render; one per core by default. With 1, this process renders.

    Returns:
        Read-only memory-mapped arrays: image (N, H, W, 3) uint8, segmentation (N, H, W) uint8, depth (N, H, W) float16
        in metres, normals (N, H, W, 3) int8 (unit vector times 127), edges, texture and keypoints (N, H, W) uint8. See
        ``dense_labels`` for their meaning.

    Raises:
        InputError: The split is unknown, a number is out of range, or the cache folder cannot be written.

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
    sets = _Sets(cache_folder(cache_dir) / "rooms", seed, split, height, width)
    return sets.find(count) or sets.make(count, workers)


@dataclass(frozen=True)
class _Sets:
    """The cached sets of one kind of rooms, which differ in their number of scenes."""

    cache: Path
    seed: int
    split: str
    height: int
    width: int

    @property
    def folder(self) -> Path:
        return self.cache / f"v{RENDER_VERSION}-seed{self.seed}-{self.split}-{self.height}x{self.width}"

    def find(self, count: int) -> dict[str, np.ndarray] | None:
        """The smallest complete set with at least ``count`` scenes, cut to ``count``."""
        sizes = sorted(int(found.name) for found in self.folder.glob("[0-9]*") if found.name.isdecimal())
        for size in sizes:
            if size >= count and (arrays := self._open(size)) is not None:
                return {name: array[:count] for name, array in arrays.items()}
        return None

    def make(self, count: int, workers: int | None) -> dict[str, np.ndarray]:
        """Render a set and put it in its place."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"Cannot write to the cache folder {self.folder} ({error.strerror}): set SIMOMERGE_CACHE to another."
            ) from error
        self._remove_stale()
        temporary = self.folder / f".{count}-{uuid.uuid4().hex}"
        try:
            self._create_files(temporary, count)
            done = 0
            for rendered in self._render(temporary, count, workers):
                done += rendered
                progress(f"render {self.split}", done, count)
            return self._publish(temporary, count)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _open(self, count: int) -> dict[str, np.ndarray] | None:
        """Memory-map a set; None if a file is missing, truncated or of another shape."""
        folder, shape = self.folder / str(count), (count, self.height, self.width)
        try:
            return {
                name: kept_array(folder / f"{name}.npy", "it is rendered again.", dtype, (*shape, *channels))
                for name, (dtype, channels) in _LAYOUT.items()
            }
        except InputError:
            return None

    def _create_files(self, folder: Path, count: int) -> None:
        folder.mkdir()
        shape = (count, self.height, self.width)
        needed = math.prod(shape) * sum(np.dtype(d).itemsize * math.prod(c) for d, c in _LAYOUT.values())
        free = shutil.disk_usage(folder).free
        if needed > free:  # writing to a memory map on a full disk would kill the process
            raise InputError(
                f"{count} rooms need {needed / 1e9:.1f} GB in {folder.parent}, {free / 1e9:.1f} GB are free:"
                " make room, or set SIMOMERGE_CACHE to a folder on another disk."
            )
        for name, (dtype, channels) in _LAYOUT.items():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.dtype(dtype), (*shape, *channels))

    def _render(self, folder: Path, count: int, workers: int | None) -> Iterator[int]:
        """Render all scenes into the files of a folder, yielding the size of each chunk when it is done."""
        chunks = [(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
        processes = min(workers or available_cores(), len(chunks))
        if processes == 1:
            yield from (self._render_chunk(folder, *chunk) for chunk in chunks)
            return
        from loky import ProcessPoolExecutor

        # loky does not run the caller's script again in each process, so a script needs no main guard. After Ctrl-C,
        # only this process shows a traceback.
        pool = ProcessPoolExecutor(
            processes, timeout=10, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
        )
        try:
            futures = [pool.submit(self._render_chunk, folder, *chunk) for chunk in chunks]
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise InputError("Rendering rooms failed (a worker process ended): try workers=1.") from error
        finally:
            pool.shutdown(wait=True, kill_workers=True)

    def _render_chunk(self, folder: Path, start: int, stop: int) -> int:
        """Render scenes ``start`` to ``stop - 1`` into the files of a folder; runs in a worker process."""
        rooms = render_rooms(self.seed, self.split, start, stop, self.height, self.width)
        for name in MODALITIES:
            target = np.lib.format.open_memmap(folder / f"{name}.npy", mode="r+")
            target[start:stop] = rooms[name]
            target.flush()
        return stop - start

    def _publish(self, temporary: Path, count: int) -> dict[str, np.ndarray]:
        """Move a finished set to its place, unless another process has put a complete set there meanwhile."""
        final = self.folder / str(count)
        for _ in range(10):
            try:
                temporary.rename(final)
            except OSError:
                if not final.exists():
                    raise
            arrays = self._open(count)
            if arrays is not None:
                return arrays
            # A damaged set is in the way. If another process is moving it aside too, try again.
            aside = self.folder / f".damaged-{uuid.uuid4().hex}"
            with contextlib.suppress(OSError):
                final.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        raise InputError(f"The cached rooms in {final} are damaged and cannot be replaced: delete that folder.")

    def _remove_stale(self) -> None:
        """Delete the temporary folders of killed processes, once no running process can still be writing them."""
        for folder in self.folder.glob(".*-*"):
            with contextlib.suppress(OSError):
                if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)
