"""The model folder: its description in simo.json, the model card made from it, and where its files are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simomerge.checkpoints.card import PICTURE, is_model_card, model_card
from simomerge.core.caution import warn
from simomerge.core.documents import check, read_json
from simomerge.core.errors import InputError
from simomerge.core.files import atomic_folder, atomic_write_text, check_absent, check_not_current
from simomerge.core.model_files import DESCRIPTION
from simomerge.core.normalisation import check_normalisation
from simomerge.core.text import shown

FORMAT = 1
"""Version of the model folder's format, if all tasks share one encoder."""

TREE_FORMAT = 2
"""Version of the format if the encoder is a tree of shared blocks, which older versions of simomerge cannot read."""

RANK_FORMAT = 3
"""Version of the format if own blocks of a tree are low-rank differences: ``encoder/`` is then no complete path."""

FILE = DESCRIPTION
"""The file of the description; a folder that holds it is a model folder."""

_MARKS = (FILE, "compressed.json", "config.json", "model.safetensors", "model.safetensors.index.json")
"""One of these is in every folder that simomerge or transformers writes."""
_FOLDERS = ("encoder", "heads", "branches", "masks", "experts")
_NAMES = (
    r"(?:simo|compressed|config|(?:pre)?processor_config|generation_config|adapter_config)\.json|README\.md"
    r"|(?:model|base|merged|adapters|stitches|adapter_model)\.safetensors|model-\d{5}-of-\d{5}\.safetensors"
    r"|model\.safetensors\.index\.json|picture\.png|pytorch_model\.bin"
)
_FILES = re.compile(
    rf"{_NAMES}|\.gitattributes|\.DS_Store|Thumbs\.db|\.(?:{_NAMES})\.(?:lock|[0-9a-f]{{12}}\.tmp)", re.ASCII
)
"""Names in these folders, and what killed writers of these files leave (see `simomerge.core.exclusive`)."""
_ORIGIN = {"source?": str, "fingerprint?": str, "license?": str}
_TASK = {
    "name?": str,
    "kind?": str,
    "classes?": [str],
    "colours?": [[int]],
    "channels?": int,
    "unit?": str,
    "range?": [float],
    "norm?": str,
}
_METRIC = {
    "task": str,
    "metric": str,
    "unit": str,
    "value": float,
    "higher_is_better": bool,
    "expert?": (float, type(None)),
}
_SCHEMA = {
    "tasks": {str: _TASK},
    "heads": {str: {"kind": str, "settings": dict}},
    "encoder": {
        "taps?": [int],
        "mean?": [float],
        "std?": [float],
        "apply_layernorm?": bool,
        "class?": str,
        "settings?": dict,
        "tree?": str,
        "branch_rank?": int,
        "kept?": [str],
        "blocks?": [str],
    },
    "adapters": (dict, type(None)),
    "provenance": {
        "base?": _ORIGIN,
        "experts?": {str: _ORIGIN},
        "merge?": {"method?": str, "cost?": float},
        "realign?": dict,
    },
    "evaluation?": {
        "data": str,
        "split": str,
        "images": int,
        "metrics": [_METRIC],
        "delta_mtl?": (float, type(None)),
        "weights?": str,
    },
}
_ADAPTERS = {"rank": int, "activation?": str, "last?": int}
_POOLS_MEAN = ("beit", "data2vec-vision", "internvl_vision", "qianfan_ocr_vision")
"""Model types of transformers that have no final layer norm with ``use_mean_pooling``, their default."""
_REMEDY = "take the model from its source again."

MOST_TASKS = 1000
"""Descriptions with more tasks are refused."""

_MOST = {"tree": 1_000_000, "kept": MOST_TASKS, "taps": 1000, "blocks": 10_000}
"""Characters of the text, and entries of the lists, that ``encoder`` may have."""


def read_description(folder: Path) -> dict[str, Any]:
    """Read and validate simo.json of a model folder.

    Raises:
        InputError: no such folder or file, broken JSON, a missing entry, or a newer format.
    """
    path = folder / FILE
    if not path.is_file():
        raise InputError(f"{folder}: not a model folder (no {FILE} in it); give a folder that simomerge wrote.")
    description: dict[str, Any] = read_json(path, _REMEDY, {"format": int})
    if description["format"] > RANK_FORMAT:
        raise InputError(f"{path}: format {description['format']} is newer than this simomerge reads; upgrade it.")
    try:
        _check(description)
    except ValueError as error:
        raise InputError(f"{path}: {str(error).rstrip('.')}; {_REMEDY}") from error
    encoder = description["encoder"]
    if encoder.get("apply_layernorm") and _norm_is_identity(folder / "encoder" / "config.json"):
        encoder["apply_layernorm"] = False  # earlier versions recorded true
    return description


def _norm_is_identity(file: Path) -> bool:
    """Whether an encoder of transformers has an identity in place of its final layer norm."""
    try:
        config = read_json(file, _REMEDY)
    except (InputError, OSError):  # reported when the encoder is read
        return False
    return config.get("model_type") in _POOLS_MEAN and bool(config.get("use_mean_pooling", True))


def _check(description: Mapping[str, Any]) -> None:
    """Raise ValueError for a description that no model has."""
    check(description, _SCHEMA)
    if description["adapters"]:
        check(description["adapters"], _ADAPTERS, "adapters")
    _check_encoder(description["encoder"])
    if (count := len(description["tasks"])) > MOST_TASKS:
        raise ValueError(f"it has {count:,} tasks, and a model has at most {MOST_TASKS:,}")
    if unnamed := [name for name in description["tasks"] if not name.isidentifier()]:  # it is the name of a file
        raise ValueError(f"{shown(unnamed[0])} cannot be the name of a task")
    if headless := [name for name in description["tasks"] if name not in description["heads"]]:
        raise ValueError(f"task {headless[0]!r} has no head in it")


def _check_encoder(encoder: Mapping[str, Any]) -> None:
    """Raise ValueError for an entry ``encoder`` that is incomplete or that no model has."""
    needed = ("settings",) if "class" in encoder else ("taps", "mean", "std", "apply_layernorm")
    if missing := [key for key in needed if key not in encoder]:
        raise ValueError(f"entry 'encoder.{missing[0]}' is missing")
    for key, most in _MOST.items():
        if (count := len(encoder.get(key, ""))) > most:
            unit = "characters" if key == "tree" else "entries"
            raise ValueError(f"encoder.{key} has {count:,} {unit}, and that of a model has at most {most:,}")
    check_normalisation(encoder.get("mean", (0, 0, 0)), encoder.get("std", (1, 1, 1)), "encoder.")


def format_of(encoder: Mapping[str, Any]) -> int:
    """The version of the format of a model folder with this entry ``encoder``."""
    if not encoder.get("tree"):
        return FORMAT
    return TREE_FORMAT if encoder.get("branch_rank") is None else RANK_FORMAT


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Write simo.json and the model card README.md into a folder. Raises InputError if they could not be read again."""
    text = _written(description, "the model cannot be saved")
    (folder / FILE).write_text(text, encoding="utf-8")
    card = model_card(description, (folder / PICTURE).is_file())
    (folder / "README.md").write_text(card, encoding="utf-8")


def _written(description: Mapping[str, Any], problem: str) -> str:
    """The text of a simo.json. Raises InputError with the problem if it could not be read again."""
    try:
        text = json.dumps(description, indent=2, allow_nan=False) + "\n"
        _check(json.loads(text))
    except ValueError as error:
        raise InputError(f"{problem}, for it could not be read again: {str(error).rstrip('.')}.") from error
    return text


def record_evaluation(folder: Path, evaluation: Mapping[str, Any], measured: Mapping[str, Any] | None = None) -> None:
    """Enter measured figures into simo.json and the model card of an existing model folder; both are replaced.

    A README.md that a person wrote stays, with a warning.

    Args:
        evaluation: ``data``, ``split``, ``images``, ``metrics`` and perhaps ``delta_mtl`` (docs/formats.md).
        measured: What `read_description` gave for the model that was measured.

    Raises:
        InputError: The folder holds another model by now, or figures that are no numbers. Nothing is written then.
    """
    present = read_description(folder)
    if measured is not None and {**measured, "evaluation": None} != {**present, "evaluation": None}:
        raise InputError(f"{folder}: holds another model than the one that was measured; evaluate it again.")
    description = {**present, "evaluation": dict(evaluation)}
    atomic_write_text(folder / FILE, _written(description, f"{folder}: the figures cannot be recorded"))
    card = folder / "README.md"
    if card.exists() and not is_model_card(card):
        warn(f"{card} is no model card of simomerge and stays as it is: the figures are in {FILE} only.")
        return
    atomic_write_text(card, model_card(description, (folder / PICTURE).is_file()))


def check_output(path: Path, overwrite: bool) -> None:
    """Check that a model or weights may be written to a path.

    Raises:
        InputError: It exists and ``overwrite`` is false, or is a folder that holds something that neither simomerge nor
            transformers writes, or it lies inside a model folder, or is the current folder.
    """
    check_not_current(path)
    target = path.resolve()
    for parent in target.parents:
        if (parent / FILE).is_file():
            raise InputError(f"{path} lies inside the model folder {parent}: choose a path outside it.")
    check_absent(path, overwrite)
    if not target.is_dir():
        return
    entries = [entry.relative_to(target) for entry in target.rglob("*")]
    if entries and not any((target / name).is_file() for name in _MARKS):
        raise InputError(f"{path} holds no model that could be replaced: choose another path.")
    if foreign := [entry for entry in entries if not _is_ours(entry, target)]:
        raise InputError(
            f"{path} holds {shown(str(foreign[0]))}, which simomerge did not write and would delete: move it, or choose"
            " another path."
        )


def _is_ours(entry: Path, folder: Path) -> bool:
    """Whether an entry of a model folder is one that simomerge, transformers or a file manager writes."""
    if (folder / entry).is_dir() and not (folder / entry).is_symlink():
        return entry.parts[0] in _FOLDERS
    if entry.name == "README.md":  # a person may have written it
        return is_model_card(folder / entry)
    in_own_folder = len(entry.parts) > 1 and entry.parts[0] in _FOLDERS[1:]
    return bool(_FILES.fullmatch(entry.name)) or (in_own_folder and entry.suffix == ".safetensors")


@contextmanager
def model_folder(
    path: str | Path, description: Mapping[str, Any], overwrite: bool = False, durable: bool = True
) -> Iterator[Path]:
    """Yield a temporary folder that becomes the model folder ``path`` when the block ends without an exception.

    It holds simo.json and README.md. The block writes ``encoder/``, a file for each head (see :func:`head_file`) and,
    where the description has adapters, ``adapters.safetensors``.

    Args:
        path, overwrite, durable: see `simomerge.core.files.atomic_folder`.
        description: the content of simo.json.
    """
    check_output(Path(path), overwrite)
    with atomic_folder(path, overwrite, durable) as folder:
        write_description(folder, description)
        (folder / "heads").mkdir()
        yield folder


def head_file(folder: Path, task: str) -> Path:
    """The file of one head in a model folder."""
    return folder / "heads" / f"{task}.safetensors"


def branch_file(folder: Path, task: str) -> Path:
    """The file of a branch of a tree in a model folder; the task is the first one of its leaf."""
    return folder / "branches" / f"{task}.safetensors"


def is_file_name(task: str) -> bool:
    """Whether a task can name a file, which must not lead out of its folder."""
    return bool(task) and Path(task).name == task and "\0" not in task and len(task.encode()) < 200


def file_name(task: str) -> str:
    """The task, which is to become the name of a file. Raises InputError if it cannot be one."""
    if not is_file_name(task):
        raise InputError(f"{task!r} cannot be the name of a task, for it becomes the name of a file: choose another.")
    return task


def existing(path: Path) -> Path:
    """The path of a file of a model folder. Raises InputError if there is no such file."""
    if not path.is_file():
        raise InputError(f"{path}: missing; {_REMEDY}")
    return path
