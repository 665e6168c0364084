"""simo.json: what a model folder says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from simomerge.errors import InputError

FORMAT = 1
"""Version of the model folder's format."""

_ENTRIES = ("format", "tasks", "heads", "encoder", "adapters", "provenance")


def read_description(folder: Path) -> dict[str, Any]:
    """simo.json of a model folder, checked.

    Raises:
        InputError: no such folder or file, broken JSON, a missing entry, or a newer format.
    """
    path = folder / "simo.json"
    if not path.is_file():
        raise InputError(f"{folder}: not a model folder (no simo.json in it); give a folder that simomerge wrote.")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); take the model from its source again.") from error
    if not isinstance(description, dict):
        raise InputError(f"{path}: holds no description of a model; take the model from its source again.")
    missing = [key for key in _ENTRIES if key not in description]
    if missing:
        raise InputError(f"{path}: entry {missing[0]!r} is missing; take the model from its source again.")
    if not isinstance(description["format"], int) or description["format"] > FORMAT:
        raise InputError(f"{path}: format {description['format']} is newer than this simomerge reads; upgrade it.")
    without = [name for name in description["tasks"] if name not in description["heads"]]
    if without:
        raise InputError(f"{path}: task {without[0]!r} has no head in it; take the model from its source again.")
    return description
