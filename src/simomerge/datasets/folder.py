"""A dataset of your own: a manifest (CSV or YAML) that names images and their targets on disk. docs/data.md."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simomerge.datasets.base import DenseDataset
from simomerge.errors import InputError
from simomerge.images import read_image, to_tensor
from simomerge.tasks import IGNORE_LABEL, KINDS, Task

MANIFESTS = (".yaml", ".yml", ".csv")
_TOP = ("tasks", "images", "root", "size")
_OF_TASK = ("kind", "classes", "colours", "scale", "ignore")


@dataclass(frozen=True)
class Stored:
    """How the targets of a task are stored.

    Attributes:
        task: what they are targets of.
        scale: stored value -> the task's unit, such as 0.001 for a depth in millimetres; None for the usual one of the
            file's dtype.
        ignore: stored values of pixels that do not count.
    """

    task: Task
    scale: float | None = None
    ignore: tuple[float, ...] = ()

    def read(self, path: Path) -> Tensor:
        """The target in a file, as `simomerge.tasks.KINDS` says. Raises InputError."""
        stored = read_array(path)
        channels = 3 if self.task.kind in ("normals", "autoencoder") else 1
        if stored.ndim == 3 and channels == 3 and stored.shape[0] == 3 != stored.shape[2]:
            stored = stored.transpose(1, 2, 0)
        if stored.ndim == 3 and stored.shape[2] == 1:
            stored = stored[..., 0]
        if stored.ndim != (3 if channels == 3 else 2) or (channels == 3 and stored.shape[2] < 3):
            expected = "(H, W, 3)" if channels == 3 else "(H, W)"
            raise InputError(f"{path}: {self.task.name} of shape {stored.shape}; give {expected}.")
        ignored = np.isin(stored, np.array(self.ignore)) if self.ignore else np.zeros(stored.shape, bool)
        return torch.from_numpy(np.ascontiguousarray(self._decoded(stored, ignored, path)))

    def _decoded(self, stored: np.ndarray, ignored: np.ndarray, path: Path) -> np.ndarray:
        kind = self.task.kind
        if kind == "segmentation":
            return self._labels(stored, ignored, path)
        values = stored.astype(np.float32) * np.float32(self._unit(stored))
        if kind == "normals":
            return _unit_normals(stored, values, np.asarray(ignored.any(-1))).transpose(2, 0, 1)
        if kind in ("depth", "disparity"):
            return np.where(ignored | ~(values > 0) | ~np.isfinite(values), np.float32(0), values)[None]
        invalid = np.float32(-1 if kind == "edges" else np.nan)
        if kind == "autoencoder":
            return np.where(ignored, invalid, values)[..., :3].transpose(2, 0, 1)
        return np.where(ignored | np.isnan(values), invalid, values)[None]

    def _unit(self, stored: np.ndarray) -> float:
        if self.scale is not None:
            return self.scale
        if stored.dtype.kind == "u" and self.task.kind not in ("depth", "disparity"):
            return 1 / float(np.iinfo(stored.dtype).max)
        return 1.0

    def _labels(self, stored: np.ndarray, ignored: np.ndarray, path: Path) -> np.ndarray:
        if stored.dtype.kind not in "uib":
            raise InputError(f"{path}: {self.task.name} of dtype {stored.dtype}; labels are whole numbers.")
        labels = stored.astype(np.int64)
        ignored = ignored | (labels == IGNORE_LABEL)
        strange = labels[~ignored & ((labels < 0) | (labels >= len(self.task.classes)))]
        if strange.size:
            raise InputError(
                f"{path}: label {int(strange[0])} of {self.task.name}, which has classes 0 to"
                f" {len(self.task.classes) - 1}; name it under ignore, or give its class."
            )
        return np.where(ignored, IGNORE_LABEL, labels)


def _unit_normals(stored: np.ndarray, values: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """Unit vectors; integers stand for -1..1, and black for no normal."""
    if stored.dtype.kind == "u":
        values = 2 * values[..., :3] - 1
        ignored = ignored | ~stored[..., :3].any(-1)
    values = np.where(np.isfinite(values[..., :3]), values[..., :3], np.float32(0))
    length = np.linalg.norm(values, axis=-1, keepdims=True)
    return np.where(ignored[..., None] | (length < 0.1), np.float32(0), values / np.maximum(length, 1e-6))


def read_array(path: Path) -> np.ndarray:
    """The numbers in an NPY file or a picture, as stored: palette indices and 16 bits are kept.

    Raises:
        InputError: no such file, or not readable as either.
    """
    from PIL import Image

    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, allow_pickle=False)
        with Image.open(path) as picture:
            array = np.asarray(picture)
            return array.astype(np.uint16) if picture.mode in ("I", "I;16", "I;16B") else array
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a PNG, TIFF, JPEG or NPY file.") from error


@dataclass(frozen=True)
class Row:
    """One image of a manifest: where it is, its split, and where its targets are."""

    image: Path
    split: str
    targets: Mapping[str, Path]


@dataclass(frozen=True)
class Manifest:
    """What a manifest says."""

    path: Path
    stored: Mapping[str, Stored]
    rows: tuple[Row, ...]
    size: tuple[int, int] | None

    def splits(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.split, []).append(row)
        return found


class Folder(DenseDataset):
    """One split of a manifest's images, read when they are asked for.

    Args:
        path: of the manifest, ``*.yaml`` or ``*.csv``; see docs/data.md.
        split: a value of its column ``split``.
        count: the first so many images, or all where fewer are there.
        size: (height, width) to make images and targets; the manifest's ``size`` by default, else as they are.

    Raises:
        InputError: a manifest that is not one (the message names the key, the row or the file), or no such split.

    Example:
        >>> Folder("mine/data.yaml", "train")[0]["depth"].shape                                      # doctest: +SKIP
        torch.Size([1, 480, 640])
    """

    def __init__(
        self, path: str | Path, split: str, count: int | None = None, size: tuple[int, int] | None = None
    ) -> None:
        manifest = read_manifest(path)
        splits = manifest.splits()
        if split not in splits:
            raise InputError(f"{path}: no split {split!r}; it has {', '.join(splits)}.")
        self.rows = splits[split][:count]
        self.stored = manifest.stored
        self.size = size or manifest.size
        self.path = manifest.path
        have = [name for name in manifest.stored if all(name in row.targets for row in self.rows)]
        super().__init__({name: manifest.stored[name].task for name in have}, len(self.rows))

    def image(self, index: int) -> Tensor:
        image = to_tensor(read_image(self.rows[index].image))[0]
        if self.size is None:
            self._check_size(index, image)
            return image
        return F.interpolate(image[None], self.size, mode="bilinear", antialias=True, align_corners=False)[0]

    def _check_size(self, index: int, image: Tensor) -> None:
        """Batches are of one size."""
        from PIL import Image

        with Image.open(self.rows[0].image) as first:
            width, height = first.size
        if sorted(image.shape[1:]) != sorted((height, width)):
            raise InputError(
                f"{self.rows[index].image} is {image.shape[2]} x {image.shape[1]} pixels, the first image {width} x"
                f" {height}: say `size: [{height}, {width}]` in {self.path.name} to make them alike."
            )

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        return {name: self._target(name, self.rows[index]) for name in tasks}

    def _target(self, name: str, row: Row) -> Tensor:
        target = self.stored[name].read(row.targets[name])
        if self.size is None or target.shape[-2:] == self.size:
            return target
        # The nearest one: between two labels, depths or normals lies none that is true.
        four = target.reshape(1, -1, *target.shape[-2:]).double()
        return (
            F.interpolate(four, self.size, mode="nearest-exact")[0]
            .to(target.dtype)
            .reshape(*target.shape[:-2], *self.size)
        )


def read_manifest(path: str | Path) -> Manifest:
    """A manifest, checked but for the files that it names.

    Raises:
        InputError: no such file, a key or column that is unknown or missing, no image.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / f"data{suffix}" for suffix in MANIFESTS if (path / f"data{suffix}").is_file()]
        if not found:
            raise InputError(f"{path}: no data.yaml or data.csv in it; give the path of the manifest.")
        path = found[0]
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a manifest, *.yaml or *.csv (docs/data.md).")
    said = _read_yaml(path) if path.suffix != ".csv" else {"images": path.name}
    _check_keys(said, _TOP, path)
    root = path.parent / str(said.get("root", "."))
    images = said.get("images")
    table = _read_csv(path.parent / images) if isinstance(images, str) else images
    if not isinstance(table, Sequence) or not table or not all(isinstance(row, Mapping) for row in table):
        raise InputError(f"{path}: 'images' is neither a CSV file nor a list of at least one image with its targets.")
    columns = [column for column in table[0] if column not in ("image", "split")]
    tasks = said.get("tasks") or {column: {} for column in columns}
    if not isinstance(tasks, Mapping):
        raise InputError(f"{path}: 'tasks' is a {type(tasks).__name__}; give a mapping from names to what they are.")
    stored = {str(name): _stored(str(name), of or {}, path) for name, of in tasks.items()}
    if strange := [column for column in columns if column not in stored]:
        raise InputError(
            f"{path}: column {strange[0]!r} is no task of it; name it under tasks{_near(strange[0], stored)}."
        )
    rows = tuple(_row(number, row, root, stored, path) for number, row in enumerate(table, start=1))
    return Manifest(path, stored, rows, _size(said.get("size"), path))


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(said, dict):
        raise InputError(f"{path}: holds no mapping; it begins with `images:` and `tasks:` (docs/data.md).")
    return said


def _read_csv(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; 'images' names a CSV beside the manifest.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            rows = list(csv.DictReader(handle))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV file in UTF-8 ({error}).") from error
    if any(None in row or None in row.values() for row in rows):
        line = next(n for n, row in enumerate(rows, start=2) if None in row or None in row.values())
        raise InputError(f"{path}: line {line} has more or fewer values than the first line has names.")
    return rows


def _stored(name: str, of: Any, path: Path) -> Stored:
    if not isinstance(of, Mapping):
        raise InputError(f"{path}: task {name!r} is a {type(of).__name__}; give kind, classes and so on as a mapping.")
    _check_keys(of, _OF_TASK, path, f"task {name!r}: ")
    kind = str(of.get("kind", name))
    if kind not in KINDS:
        raise InputError(f"{path}: task {name!r} is of unknown kind {kind!r}{_near(kind, KINDS)}.")
    ignore = of.get("ignore", ())
    ignore = ignore if isinstance(ignore, Sequence) else (ignore,)
    scale = of.get("scale")
    if scale is not None and not (isinstance(scale, (int, float)) and scale > 0):
        raise InputError(f"{path}: task {name!r}: scale {scale!r}; give a number above 0.")
    try:
        task = Task(name, kind, tuple(map(str, of.get("classes", ()))), tuple(of.get("colours", ())))
        return Stored(task, scale, tuple(float(value) for value in ignore))
    except (InputError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error


def _row(number: int, row: Mapping[str, Any], root: Path, stored: Mapping[str, Stored], path: Path) -> Row:
    if not row.get("image"):
        raise InputError(f"{path}: image {number} has no 'image' (its columns are {', '.join(map(str, row))}).")
    _check_keys(row, ("image", "split", *stored), path, f"image {number}: ")
    targets = {name: root / str(row[name]) for name in stored if row.get(name)}
    return Row(root / str(row["image"]), str(row.get("split") or "test"), targets)


def _size(value: Any, path: Path) -> tuple[int, int] | None:
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(v, int) and v > 0 for v in value)):
        raise InputError(f"{path}: size {value!r}; give [height, width] in pixels.")
    return value[0], value[1]


def _check_keys(said: Mapping[Any, Any], known: Iterable[str], path: Path, place: str = "") -> None:
    for key in said:
        if key not in known:
            raise InputError(f"{path}: {place}unknown key {key!r}{_near(str(key), known)}.")


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
