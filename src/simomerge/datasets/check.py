"""Check a dataset on disk before training on it: counts, value ranges and common mistakes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from simomerge.core.errors import InputError
from simomerge.core.progress import progress
from simomerge.datasets.groups import evenly
from simomerge.datasets.rows import Manifest, Row
from simomerge.datasets.stored import Source, Stored, may_be_truncated, read_array
from simomerge.datasets.tasks import Task

MILLIMETRES = 200.0
"""If the median depth is above this many metres, depths are stored in millimetres."""


@dataclass
class TargetSummary:
    """The values of one task's targets in one split."""

    task: Task
    images: int = 0
    valid: int = 0
    pixels: int = 0
    low: float = np.inf
    high: float = -np.inf
    total: float = 0.0
    classes: Counter[int] = field(default_factory=Counter)
    medians: list[float] = field(default_factory=list)

    def add(self, target: Tensor) -> None:
        kind = self.task.kind
        # Edges and masks below 0 other than -1 are mistakes, which must be found.
        behaviour = self.task.behaviour
        marked = behaviour.bounded and behaviour.invalid == -1
        valid = (target != -1 if marked else self.task.valid(target[None])[0]).numpy()
        values = target.numpy()[..., valid]
        self.images += 1
        self.pixels += valid.size
        self.valid += int(valid.sum())
        if not values.size:
            return
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        self.total += float(values.sum(dtype=np.float64))
        if kind == "segmentation":
            labels, counts = np.unique(values, return_counts=True)
            self.classes.update(dict(zip(labels.tolist(), counts.tolist(), strict=True)))
        if kind == "depth":
            self.medians.append(float(np.median(values)))

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"images": self.images, "valid": round(self.valid / max(self.pixels, 1), 4)}
        if self.task.kind == "segmentation":
            total = max(self.classes.total(), 1)
            return {**found, "classes": {c: round(self.classes[i] / total, 4) for i, c in enumerate(self.task.classes)}}
        if self.valid:
            found |= {"low": self.low, "mean": self.total / self.valid, "high": self.high}
        return found

    def problems(self, place: str, available: int) -> Iterable[str]:
        """What is wrong with the values; ``available`` is the number of images in the split."""
        if not self.valid:
            yield f"{place}: no valid pixel in {self.images} images."
        elif self.task.kind == "depth" and (median := float(np.median(self.medians))) > MILLIMETRES:
            yield f"{place}: median depth {median:,.0f} m; if these are millimetres, add `scale: 0.001`."
        elif self.task.behaviour.bounded and (self.low < 0 or self.high > 1):
            yield f"{place}: values from {self.low:.3g} to {self.high:.3g}, not in [0, 1]."
        elif self.task.behaviour.bounded and 0 < self.high <= 1 / 255 + 1e-9:
            yield f"{place}: no value above {self.high:.3g}; if 0 and 1 are stored, add `scale: 1`."
        elif self.task.range and (self.low < self.task.range[0] or self.high > self.task.range[1]):
            low, high = self.task.range
            yield f"{place}: values from {self.low:.3g} to {self.high:.3g}, not in its range [{low:g}, {high:g}]."
        unused = [name for label, name in enumerate(self.task.classes) if not self.classes[label]]
        if self.task.kind == "segmentation" and self.valid and unused:
            which = "" if self.images == available else f" in the {self.images} of {available} images read"
            yield f"{place}: no pixel of {', '.join(unused)}{which}."


@dataclass
class Check:
    """The result of `check`: by split the number of images, their sizes and a summary of each task; and problems."""

    images: dict[str, int]
    problems: list[str]
    sizes: dict[str, Counter[tuple[int, int]]] = field(default_factory=dict)
    summaries: dict[str, dict[str, TargetSummary]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        splits = {}
        for split, count in self.images.items():
            sizes = {f"{width}x{height}": n for (height, width), n in self.sizes[split].items()}
            tasks = {name: summary.to_dict() for name, summary in self.summaries[split].items()}
            splits[split] = {"images": count, "sizes": sizes, "tasks": tasks}
        return {"splits": splits, "problems": self.problems}


def check(manifest: Manifest, count: int = 100) -> Check:
    """Read some images of every split with their targets, and report what is wrong.

    Problems are: files that are missing or cannot be read, labels out of range, sizes that differ, images in two
    splits, depth in millimetres, normals that are not of unit length, and classes that never occur.

    Args:
        manifest: as `simomerge.datasets.load.find_manifest` returns.
        count: number of images to read of each split, evenly over it. All files are checked for existence.
    """
    splits = {split: rows for split, rows in manifest.rows.items() if rows}
    missing = (manifest.missing(split) for split in manifest.rows)
    result = Check({split: len(rows) for split, rows in splits.items()}, [message for message in missing if message])
    result.problems += [*_missing_files(manifest), *_images_in_two_splits(manifest), *_missing_targets(manifest)]
    found: list[tuple[Source, str]] = []
    read: set[Source] = set()
    for split, rows in splits.items():
        chosen = evenly(rows, count)
        result.sizes[split], result.summaries[split] = Counter(), {}
        for done, row in enumerate(chosen, start=1):
            found += _check_row(row, manifest, result.sizes[split], result.summaries[split])
            read |= {row.image, *row.targets.values()}
            progress(f"check {split}", done, len(chosen), "")
    found += _truncated_files(manifest, read)
    result.problems += _counted(found)
    sizes = {size for found in result.sizes.values() for size in found}
    if len(sizes) > 1 and manifest.size is None:
        shown = ", ".join(f"{width} x {height}" for height, width in sorted(sizes)[:4])
        result.problems.append(f"images of {len(sizes)} sizes ({shown}): add `size: [height, width]` to the manifest.")
    for split, summaries in result.summaries.items():
        for name, summary in summaries.items():
            result.problems += summary.problems(f"{name} ({split})", result.images[split])
    return result


def _counted(found: Iterable[tuple[Source, str]]) -> Iterable[str]:
    """Problems of files. Those that differ in nothing but names and numbers are one problem with their count."""
    alike: dict[str, list[str]] = {}
    for path, message in found:
        kind = re.sub(r"\d+(\.\d+)?", "0", message.replace(str(path), ""))
        alike.setdefault(kind, []).append(message)
    for messages in alike.values():
        yield messages[0] + (f" This is the first of {len(messages)} such files." if len(messages) > 1 else "")


def _missing_files(manifest: Manifest) -> Iterable[str]:
    rows = chain.from_iterable(manifest.rows.values())
    files = [path for row in rows for path in (row.image, *row.targets.values(), *row.others)]
    if missing := [path for path in dict.fromkeys(files) if not path.is_file()]:
        shown = ", ".join(map(str, missing[:3])) + (", ..." if len(missing) > 3 else "")
        yield f"{len(missing)} of {len(files)} files are not there: {shown}"


def _truncated_files(manifest: Manifest, read: Container[Source]) -> Iterable[tuple[Source, str]]:
    """The files that are damaged among those that were not read, from their first and last bytes."""
    rows = chain.from_iterable(manifest.rows.values())
    for path in dict.fromkeys(path for row in rows for path in (row.image, *row.targets.values())):
        if path in read or not isinstance(path, Path) or not path.is_file() or path.suffix == ".mat":
            continue
        try:
            if may_be_truncated(path):
                read_array(path)
        except (InputError, OSError) as error:
            yield path, str(error)


def _images_in_two_splits(manifest: Manifest) -> Iterable[str]:
    first_split: dict[Source, str] = {}
    leaks = []
    for split, rows in manifest.rows.items():
        for row in rows:
            first = first_split.setdefault(row.image.resolve(), split)
            if first != split:
                leaks.append(f"{row.image} ({first} and {split})")
    if leaks:
        yield f"{len(leaks)} images are in two splits, first {leaks[0]}."


def _missing_targets(manifest: Manifest) -> Iterable[str]:
    """Without a target for every image, a split cannot be used for a task."""
    for split, rows in manifest.rows.items():
        for name in manifest.stored:
            without = [row for row in rows if name not in row.targets]
            if without and len(without) == len(rows):
                yield f"split {split} has no targets of {name}."
            elif without:
                share = f"{len(without)} of {len(rows)} images of {split}"
                yield f"{share} have no target of {name}, first {without[0].image}."


def _check_row(
    row: Row, manifest: Manifest, sizes: Counter[tuple[int, int]], summaries: dict[str, TargetSummary]
) -> Iterable[tuple[Source, str]]:
    """The problems of an image and its targets, each with its file."""
    try:
        height, width = manifest.image(row.image).shape[:2]
    except InputError as error:
        if row.image.is_file():  # missing files are reported already
            yield row.image, str(error)
        return
    sizes[height, width] += 1
    for name, path in row.targets.items():
        stored = manifest.stored[name]
        try:
            target = stored.read(path, image=row.image)
        except InputError as error:
            if path.is_file():
                yield path, str(error)
            continue
        summaries.setdefault(name, TargetSummary(stored.task)).add(target)
        if target.shape[-2:] != (height, width):
            yield path, f"{path} is {target.shape[-1]} x {target.shape[-2]} pixels, its image {width} x {height}."
        if stored.task.kind == "normals":
            yield from ((path, problem) for problem in _wrong_lengths(stored, path))


def _wrong_lengths(stored: Stored, path: Source) -> Iterable[str]:
    """Check the lengths of normals as stored, because reading makes them unit vectors."""
    values = stored.as_stored(path)
    integers = values.dtype.kind == "u"
    scaled = values[..., :3].astype(np.float32)  # without a picture's transparency
    scaled *= np.float32(stored.scale or (1 / np.iinfo(values.dtype).max if integers else 1))
    length = np.linalg.norm(2 * scaled - 1 if integers else scaled, axis=-1)
    length = length[(length > 0.1) & (length < 1.7)] if integers else length[length > 0.1]  # black has length 1.73
    if length.size and abs((median := float(np.median(length))) - 1) > 0.1:
        yield f"{path}: normals of length {median:.2f}, not 1; not normals, or stored in another way?"
