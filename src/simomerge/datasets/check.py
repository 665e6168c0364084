"""Look at a dataset on disk before training on it: counts, ranges, and the usual mistakes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simomerge.core.errors import InputError
from simomerge.core.progress import progress
from simomerge.datasets.rows import Manifest, Row, Source, Stored
from simomerge.datasets.tasks import IGNORE_LABEL, colourise

MILLIMETRES = 200.0
"""A median depth above this many metres is none: it was stored in millimetres."""
_UNIT_INTERVAL = ("edges", "texture", "keypoints", "autoencoder", "log_depth")


@dataclass
class Seen:
    """What the targets of one task in one split are like."""

    images: int = 0
    valid: int = 0
    pixels: int = 0
    low: float = np.inf
    high: float = -np.inf
    total: float = 0.0
    classes: dict[int, int] = field(default_factory=dict)
    medians: list[float] = field(default_factory=list)

    def add(self, stored: Stored, target: np.ndarray) -> None:
        self.images += 1
        kind = stored.task.kind
        valid = {
            "segmentation": lambda t: t != IGNORE_LABEL,
            "depth": lambda t: t > 0,
            "disparity": lambda t: t > 0,
            "normals": lambda t: np.broadcast_to((t != 0).any(0), t.shape),
            "edges": lambda t: t != -1,  # other values below 0 are mistakes
        }.get(kind, np.isfinite)(target)
        values = target[valid]
        self.pixels += valid.size
        self.valid += values.size
        if not values.size:
            return
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        self.total += float(values.sum(dtype=np.float64))
        if kind == "segmentation":
            for label, count in zip(*np.unique(values, return_counts=True), strict=True):
                self.classes[int(label)] = self.classes.get(int(label), 0) + int(count)
        if kind == "depth":
            self.medians.append(float(np.median(values)))


@dataclass
class Checked:
    """What was found: per split the images and their sizes, per split and task `Seen`; and mistakes, in plain words."""

    images: dict[str, int]
    sizes: dict[str, dict[tuple[int, int], int]]
    seen: dict[str, dict[str, Seen]]
    problems: list[str]

    def to_dict(self, manifest: Manifest) -> dict[str, Any]:
        """As plain data."""
        splits = {}
        for split, count in self.images.items():
            sizes = {f"{width}x{height}": n for (height, width), n in self.sizes[split].items()}
            tasks = {name: _described(manifest.stored[name], seen) for name, seen in self.seen[split].items()}
            splits[split] = {"images": count, "sizes": sizes, "tasks": tasks}
        return {"splits": splits, "problems": self.problems}


def check(manifest: Manifest, count: int = 100) -> Checked:
    """Read some images of every split with their targets, and say what is wrong.

    Args:
        manifest: of `simomerge.datasets.load.find_manifest`.
        count: images of each split that are read, evenly over it; that all files are there is always checked.

    Returns:
        What was found. Files that are missing or cannot be read, labels out of range, sizes that differ, images in two
        splits, depth in millimetres, normals that are not of unit length and classes that never occur are among its
        problems.
    """
    splits = manifest.splits()
    checked = Checked({split: len(rows) for split, rows in splits.items()}, {}, {}, list(manifest.lacking))
    _check_files(manifest.rows, checked.problems)
    _check_leaks(splits, checked.problems)
    _check_holes(splits, manifest, checked.problems)
    for split, rows in splits.items():
        chosen = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))]
        checked.sizes[split], checked.seen[split] = {}, {}
        for done, row in enumerate(chosen, start=1):
            _look(row, manifest, split, checked)
            progress(f"check {split}", done, len(chosen), "")
    sizes = {size for found in checked.sizes.values() for size in found}
    if len(sizes) > 1 and manifest.size is None:
        shown = ", ".join(f"{width} x {height}" for height, width in sorted(sizes)[:4])
        checked.problems.append(f"images of {len(sizes)} sizes ({shown}): say `size: [height, width]` in the manifest.")
    _check_values(manifest, checked)
    return checked


def _check_files(rows: Iterable[Row], problems: list[str]) -> None:
    named = [path for row in rows for path in (row.image, *row.targets.values(), *row.others)]
    missing = [path for path in dict.fromkeys(named) if not path.is_file()]
    if missing:
        shown = ", ".join(map(str, missing[:3])) + (", ..." if len(missing) > 3 else "")
        problems.append(f"{len(missing)} of {len(named)} files are not there: {shown}")


def _check_leaks(splits: Mapping[str, Sequence[Row]], problems: list[str]) -> None:
    where: dict[Source, str] = {}
    leaks = []
    for split, rows in splits.items():
        for row in rows:
            if where.setdefault(row.image.resolve(), split) != split:
                leaks.append(f"{row.image} ({where[row.image.resolve()]} and {split})")
    if leaks:
        problems.append(f"{len(leaks)} images are in two splits, first {leaks[0]}.")


def _check_holes(splits: Mapping[str, Sequence[Row]], manifest: Manifest, problems: list[str]) -> None:
    """A task of which some images of a split have no target cannot be trained or measured on it."""
    for split, rows in splits.items():
        for name in manifest.stored:
            without = [row for row in rows if name not in row.targets]
            if len(without) == len(rows):
                problems.append(f"split {split} has no targets of {name}.")
            elif without:
                share = f"{len(without)} of {len(rows)} images of {split}"
                problems.append(f"{share} have no target of {name}, first {without[0].image}.")


def _look(row: Row, manifest: Manifest, split: str, checked: Checked) -> None:
    try:
        height, width = manifest.image(row.image).shape[:2]
    except InputError as error:
        if row.image.is_file():  # else it has been told
            checked.problems.append(str(error))
        return
    sizes = checked.sizes[split]
    sizes[height, width] = sizes.get((height, width), 0) + 1
    for name, path in row.targets.items():
        stored = manifest.stored[name]
        try:
            target = stored.read(path).numpy()
        except InputError as error:
            if path.is_file():
                checked.problems.append(str(error))
            continue
        checked.seen[split].setdefault(name, Seen()).add(stored, target)
        if target.shape[-2:] != (height, width):
            checked.problems.append(
                f"{path} is {target.shape[-1]} x {target.shape[-2]} pixels, its image {width} x {height}."
            )
        if stored.task.kind == "normals":
            _check_lengths(stored, path, checked.problems)


def _check_lengths(stored: Stored, path: Source, problems: list[str]) -> None:
    """Reading makes normals unit vectors; whether they were is told from the numbers themselves."""
    values = stored.array(path)
    integers = values.dtype.kind == "u"
    if values.ndim == 3 and values.shape[0] == 3 != values.shape[2]:
        values = values.transpose(1, 2, 0)
    scaled = values[..., :3].astype(np.float32)  # without a picture's transparency
    scaled *= np.float32(stored.scale or (1 / np.iinfo(values.dtype).max if integers else 1))
    length = np.linalg.norm(2 * scaled - 1 if integers else scaled, axis=-1)
    length = length[(length > 0.1) & (length < 1.7)] if integers else length[length > 0.1]  # black is 1.73
    if length.size and abs(float(np.median(length)) - 1) > 0.1:
        problems.append(
            f"{path}: normals of length {float(np.median(length)):.2f}, not 1; another thing, or another code?"
        )


def _check_values(manifest: Manifest, checked: Checked) -> None:
    for split, tasks in checked.seen.items():
        for name, seen in tasks.items():
            task, place = manifest.stored[name].task, f"{name} ({split})"
            if not seen.valid:
                checked.problems.append(f"{place}: no valid pixel in {seen.images} images.")
            elif task.kind == "depth" and (median := float(np.median(seen.medians))) > MILLIMETRES:
                checked.problems.append(
                    f"{place}: median depth {median:,.0f} m; if these are millimetres, say `scale: 0.001`."
                )
            elif task.kind in _UNIT_INTERVAL and (seen.low < 0 or seen.high > 1):
                checked.problems.append(f"{place}: values from {seen.low:.3g} to {seen.high:.3g}, not in [0, 1].")
            unused = [c for label, c in enumerate(task.classes) if label not in seen.classes]
            if task.kind == "segmentation" and seen.valid and unused:
                read, there = seen.images, checked.images[split]
                which = "" if read == there else f" in the {read} of {there} images read"
                checked.problems.append(f"{place}: no pixel of {', '.join(unused)}{which}.")


def _described(stored: Stored, seen: Seen) -> dict[str, Any]:
    found: dict[str, Any] = {"images": seen.images, "valid": round(seen.valid / max(seen.pixels, 1), 4)}
    if stored.task.kind == "segmentation":
        total = max(sum(seen.classes.values()), 1)
        shares = {c: round(seen.classes.get(i, 0) / total, 4) for i, c in enumerate(stored.task.classes)}
        return {**found, "classes": shares}
    if seen.valid:
        found |= {"low": seen.low, "mean": seen.total / seen.valid, "high": seen.high}
    return found


def contact_sheet(manifest: Manifest, images: int = 6, height: int = 120) -> Any:
    """A PIL image: a row per image that can be read, from all splits in turn, with its targets in colour."""
    from PIL import Image

    rows = []
    splits = manifest.splits()
    turns = [row for group in zip(*(_cycled(rows, images) for rows in splits.values()), strict=True) for row in group]
    for row in {row.image: row for row in turns}.values():
        shown = []
        for name, path in (("", row.image), *row.targets.items()):
            try:
                shown.append(_cell(manifest, name, path))
            except InputError:  # it is among the problems; the rest of the row can be looked at
                if not name:
                    break
        if not shown:
            continue
        cells = [Image.fromarray(cell) for cell in shown]
        rows.append([cell.resize((max(1, cell.width * height // cell.height), height)) for cell in cells])
        if len(rows) == images:
            break
    if not rows:
        raise InputError(f"{manifest.path}: no image can be shown with its targets; mend what is reported first.")
    width = max(sum(cell.width + 4 for cell in row) for row in rows)
    sheet = Image.new("RGB", (width, (height + 4) * len(rows)), "white")
    for number, row in enumerate(rows):
        left = 0
        for cell in row:
            sheet.paste(cell, (left, number * (height + 4)))
            left += cell.width + 4
    return sheet


def _cell(manifest: Manifest, name: str, source: Source) -> np.ndarray:
    """An image, or a target in colour, as uint8 RGB."""
    if not name:
        return _as_bytes(manifest.image(source))
    stored = manifest.stored[name]
    return colourise(stored.task, stored.read(source).numpy())


def _as_bytes(image: np.ndarray) -> np.ndarray:
    return image if image.dtype == np.uint8 else (np.nan_to_num(image).clip(0, 1) * 255).round().astype(np.uint8)


def _cycled(rows: Sequence[Row], count: int) -> list[Row]:
    return [rows[i * len(rows) // count % len(rows)] for i in range(count)]
