"""A dataset of your own: a manifest (CSV or YAML) that names images and their targets on disk. docs/data.md."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simomerge.core.errors import InputError
from simomerge.core.schema import nearest, read_yaml
from simomerge.datasets.rows import Manifest, Row, Rows, Stored, read_array, read_picture
from simomerge.datasets.tasks import KINDS, Task

MANIFESTS = (".yaml", ".yml", ".csv")
HINT = "give a manifest, *.yaml or *.csv; it begins with `images:` and `tasks:` (docs/data.md)."
_TOP = ("tasks", "images", "root", "size")
_OF_TASK = ("kind", "classes", "colours", "scale", "ignore")


class Folder(Rows):
    """One split of a manifest's images, read when they are asked for.

    Args:
        path: of the manifest, ``*.yaml`` or ``*.csv``; see docs/data.md.
        split: a value of its column ``split``.
        count: so many images, evenly over the split, or all where fewer are there.
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
        super().__init__(read_manifest(path), split, count, size)


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
        raise InputError(f"{path}: no such file; {HINT}")
    said = read_yaml(path, HINT) if path.suffix.lower() != ".csv" else {"images": path.name}
    _check_keys(said, _TOP, path)
    said = {key: value for key, value in said.items() if value is not None}  # a key without a value says nothing
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
    if reserved := {"image", "split"} & stored.keys():
        raise InputError(f"{path}: no task can be called {min(reserved)!r}; give it another name.")
    if strange := [column for column in columns if column not in stored]:
        raise InputError(
            f"{path}: column {strange[0]!r} is no task of it; name it under tasks{_near(strange[0], stored)}"
        )
    rows = tuple(_row(number, row, root, stored, path) for number, row in enumerate(table, start=1))
    return Manifest(path, stored, rows, _size(said.get("size"), path))


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
    of = {key: value for key, value in of.items() if value is not None}
    kind = str(of.get("kind", name))
    if kind not in KINDS:
        raise InputError(f"{path}: task {name!r} is of unknown kind {kind!r}{_near(kind, KINDS)}")
    ignore, classes = of.get("ignore", ()), of.get("classes", ())
    ignore = ignore if isinstance(ignore, (list, tuple)) else (ignore,)
    if not all(isinstance(value, (int, float)) for value in ignore):
        raise InputError(f"{path}: task {name!r}: ignore {of['ignore']!r}; give numbers, such as [255].")
    if not isinstance(classes, (list, tuple)) or len(set(map(str, classes))) != len(classes):
        raise InputError(f"{path}: task {name!r}: classes {classes!r}; give a list of names, each once.")
    try:
        scale = float(of["scale"]) if "scale" in of else None  # YAML reads 1e-3 as text
    except (TypeError, ValueError):
        scale = -1.0
    if scale is not None and not scale > 0:
        raise InputError(f"{path}: task {name!r}: scale {of['scale']!r}; give a number above 0.")
    try:
        task = Task(name, kind, tuple(map(str, classes)), tuple(of.get("colours", ())))
        array = read_picture if kind == "autoencoder" else read_array
        return Stored(task, scale, tuple(float(value) for value in ignore), array)
    except (InputError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error


def _row(number: int, row: Mapping[str, Any], root: Path, stored: Mapping[str, Stored], path: Path) -> Row:
    if not row.get("image"):
        raise InputError(f"{path}: image {number} has no 'image' (its columns are {', '.join(map(str, row))}).")
    _check_keys(row, ("image", "split", *stored), path, f"image {number}: ")
    targets = {name: root / str(row[name]) for name in stored if row.get(name)}
    split = row.get("split")
    return Row(root / str(row["image"]), "test" if split in (None, "") else str(split), targets)


def _size(value: Any, path: Path) -> tuple[int, int] | None:
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(v, int) and v > 0 for v in value)):
        raise InputError(f"{path}: size {value!r}; give [height, width] in pixels.")
    return value[0], value[1]


def _check_keys(said: Mapping[Any, Any], known: Iterable[str], path: Path, place: str = "") -> None:
    for key in said:
        if key not in known:
            raise InputError(f"{path}: {place}unknown key {key!r}{_near(str(key), known)}")


def _near(name: str, known: Iterable[str]) -> str:
    close = nearest(name, known)
    return f"; did you mean {close!r}?" if close else f"; known are {', '.join(known)}."
