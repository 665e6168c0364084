"""Datasets of your own: a manifest (CSV or YAML) names images and their targets on disk. docs/data.md."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simomerge.core.assets import expanded
from simomerge.core.documents import read_yaml
from simomerge.core.errors import InputError
from simomerge.core.schema import nearest
from simomerge.core.task_names import COLUMNS
from simomerge.datasets.base import check_size
from simomerge.datasets.rows import SPLIT_NAMES, SPLITS, Manifest, Row, known_split
from simomerge.datasets.stored import Stored, read_array, read_picture
from simomerge.datasets.tables import read_table
from simomerge.datasets.tasks import KINDS, Task

MANIFESTS = (".yaml", ".yml", ".csv")
HINT = "give a manifest, *.yaml or *.csv; it begins with `images:` and `tasks:` (docs/data.md)."
_KEYS = ("tasks", "images", "root", "size")
_TASK_KEYS = ("kind", "classes", "colours", "scale", "ignore", "channels", "unit", "range", "norm")


def read_manifest(path: str | Path, size: tuple[int, int] | None = None) -> Manifest:
    """Read and check a manifest, without looking at the files that it names.

    Args:
        path: the file, ``*.yaml`` or ``*.csv``, or a folder that holds ``data.yaml`` or ``data.csv``.
        size: (height, width) to resize images and targets to; the manifest's own by default.

    Raises:
        InputError: the file is missing, a key or column is unknown or missing, or there is no image.
    """
    path = _find(Path(path))
    keys = read_yaml(path, HINT) if path.suffix.lower() != ".csv" else {"images": path.name}
    _check_keys(keys, _KEYS, f"{path}: ")
    keys = {key: value for key, value in keys.items() if value is not None}  # a key without a value is as if left out
    images = keys.get("images")
    table = _read_csv(path.parent / images) if isinstance(images, str) else images
    if not isinstance(table, Sequence) or not table or not all(isinstance(row, Mapping) for row in table):
        raise InputError(f"{path}: 'images' is neither a CSV file nor a list of at least one image with its targets.")
    table = table if keys.get("tasks") else _lower(table, KINDS, path)
    columns = [column for column in table[0] if column not in COLUMNS]
    tasks = keys.get("tasks") or {column: {} for column in columns}
    if not isinstance(tasks, Mapping):
        raise InputError(f"{path}: 'tasks' is a {type(tasks).__name__}; give a mapping from names to descriptions.")
    names = [str(name) for name in tasks]
    stored = [_stored(str(name), description or {}, path) for name, description in tasks.items()]
    if unknown := [column for column in columns if column not in names]:
        raise InputError(
            f"{path}: column {unknown[0]!r} is not one of its tasks; name it under tasks{_near(unknown[0], names)}"
        )
    root = path.parent / expanded(str(keys.get("root", ".")))
    _check_split_names(table, path)
    rows: dict[str, list[Row]] = {}
    for number, row in enumerate(table, start=1):
        split = _split(row, f"{path}: image {number}")
        rows.setdefault(split, []).append(_row(row, root, names, f"{path}: image {number}"))
    if "size" in keys:
        check_size(keys["size"], f"{path}: ")
        size = size or tuple(keys["size"])
    return Manifest(path, stored, rows, size, table=path.parent / images if isinstance(images, str) else None)


def _find(path: Path) -> Path:
    if path.is_dir():
        found = [path / f"data{suffix}" for suffix in MANIFESTS if (path / f"data{suffix}").is_file()]
        if not found:
            raise InputError(f"{path}: no data.yaml or data.csv in it; give the path of the manifest.")
        return found[0]
    if not path.is_file():
        raise InputError(f"{path}: no such file; {HINT}")
    return path


def _read_csv(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; 'images' names a CSV in the folder of the manifest.")
    rows = read_table(path, "image")
    return _lower(rows, COLUMNS, path)


def _lower(table: Sequence[Mapping[Any, Any]], known: Container[str], path: Path) -> list[dict[Any, Any]]:
    """A table whose columns of known names are in lower case. Raises InputError for two that are the same then."""
    columns = list(map(str, table[0])) if table else []
    for name in columns:
        alike = [other for other in columns if other.lower() == name.lower()]
        if name.lower() in known and len(alike) > 1:
            raise InputError(f"{path}: the columns {alike[0]!r} and {alike[1]!r} are the same; remove one of them.")
    return [
        {str(key).lower() if str(key).lower() in known else key: value for key, value in row.items()} for row in table
    ]


def _stored(name: str, description: Any, path: Path) -> Stored:
    place = f"{path}: task {name!r}"
    if not isinstance(description, Mapping):
        raise InputError(f"{place} is a {type(description).__name__}; give kind, classes and so on as a mapping.")
    _check_keys(description, _TASK_KEYS, f"{place}: ")
    keys = {key: value for key, value in description.items() if value is not None}
    kind = str(keys.get("kind", name))
    if kind not in KINDS:
        raise InputError(f"{place} is of unknown kind {kind!r}{_near(kind, KINDS)}")
    ignore, classes = keys.get("ignore", ()), keys.get("classes", ())
    ignore = ignore if isinstance(ignore, (list, tuple)) else (ignore,)
    colours = [value for value in ignore if isinstance(value, (list, tuple))]
    ignore = [value for value in ignore if not isinstance(value, (list, tuple))]
    whole = [value for colour in colours for value in colour]
    if not all(isinstance(v, (int, float)) for v in [*ignore, *whole]) or any(len(colour) != 3 for colour in colours):
        raise InputError(f"{place}: ignore {keys['ignore']!r}; give numbers, such as [255], or colours [[0, 0, 0]].")
    if not isinstance(classes, (list, tuple)) or len(set(map(str, classes))) != len(classes):
        raise InputError(f"{place}: classes {classes!r}; give a list of names, each once.")
    try:
        scale = float(keys["scale"]) if "scale" in keys else None  # YAML reads 1e-3 as a string
    except (TypeError, ValueError):
        scale = -1.0
    if scale is not None and not scale > 0:
        raise InputError(f"{place}: scale {keys['scale']!r}; give a number above 0.")
    try:
        more = {key: keys[key] for key in ("channels", "unit", "range", "norm") if key in keys}
        task = Task(name, kind, tuple(map(str, classes)), tuple(keys.get("colours", ())), **more)
        array = read_picture if kind == "autoencoder" else read_array
        ignored = tuple((int(r), int(g), int(b)) for r, g, b in colours)
        return Stored(task, scale, tuple(float(value) for value in ignore), array, ignored)
    except (InputError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error


def _split(row: Mapping[str, Any], place: str) -> str:
    """The split of a row. A word that is nearly one of the known names is a mistake."""
    word = "test" if row.get("split") in (None, "") else str(row["split"])
    split = known_split(word)
    near = nearest(split.lower(), (*SPLITS, *SPLIT_NAMES))
    if split not in SPLITS and near and _is_misspelt(split.lower(), near):
        raise InputError(f"{place} is in split {word!r}; did you mean {known_split(near)!r}?")
    return split


def _check_split_names(table: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Refuse two names of one split, such as val and dev: one of them may be meant as another split."""
    words = dict.fromkeys(str(row["split"]).strip().lower() for row in table if row.get("split") not in (None, ""))
    first: dict[str, str] = {}
    for word in words:
        other = first.setdefault(known_split(word), word)
        if other != word:
            raise InputError(
                f"{path}: its images are in the splits {other!r} and {word!r}, which both mean {known_split(word)!r};"
                " use one name for them, or another one for a split of its own."
            )


def _is_misspelt(word: str, near: str) -> bool:
    """Whether a word is a known name with few letters changed, unlike names such as train2017, trainval or rain."""
    return word.isalpha() and word[0] == near[0] and abs(len(word) - len(near)) <= 2


def _row(row: Mapping[str, Any], root: Path, tasks: Sequence[str], place: str) -> Row:
    if not row.get("image"):
        raise InputError(f"{place} has no 'image' (its columns are {', '.join(map(str, row))}).")
    _check_keys(row, (*COLUMNS, *tasks), f"{place}: ")
    targets = {name: root / str(row[name]) for name in tasks if row.get(name)}
    return Row(root / str(row["image"]), targets)


def _check_keys(keys: Iterable[Any], known: Iterable[str], place: str) -> None:
    for key in keys:
        if key not in known:
            raise InputError(f"{place}unknown key {key!r}{_near(str(key), known)}")


def _near(name: str, known: Iterable[str]) -> str:
    close = nearest(name, known)
    return f"; did you mean {close!r}?" if close else f"; known are {', '.join(known)}."
