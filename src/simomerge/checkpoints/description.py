"""simo.json: what a model folder says of itself, and the model card made from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simomerge.core.errors import InputError

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


def only_task(description: Mapping[str, Any], task: str) -> dict[str, Any]:
    """The description of a model as an expert in one task, which is called ``task``.

    A model of one task lends it under any name, one of several must have a task of that name.

    Raises:
        InputError: it has several tasks and none is called so, or no task can be called so.
    """
    if not task.isidentifier():  # it becomes the name of a file
        raise InputError(f"{task!r} cannot be the name of a task: use letters, digits and underscores.")
    tasks = description["tasks"]
    own = task if task in tasks else next(iter(tasks), "")
    if task not in tasks and len(tasks) != 1:
        raise InputError(f"expert {task!r} has the tasks {', '.join(tasks) or 'none'}; name one of them.")
    renamed = {"kind": own, **tasks[own], "name": task} if own != task else tasks[own]
    return {**description, "tasks": {task: renamed}, "heads": {task: description["heads"][own]}}


def check_same_encoder(descriptions: Mapping[str, Mapping[str, Any]]) -> None:
    """Experts can share one encoder only if their heads read the same taps of equally normalised images.

    Args:
        descriptions: by task, of the experts; what is no identifier, such as "the model", is shown as it is.

    Raises:
        InputError: an expert with adapters, or two that differ in taps, final layer norm or normalisation.
    """
    first = next(iter(descriptions))
    for task, description in descriptions.items():
        if description["adapters"]:
            raise InputError(f"expert {task!r} has adapters beside its blocks: a weight merge would lose them.")
        ours, theirs = description["encoder"], descriptions[first]["encoder"]
        for what, keys in (
            ("taps", ("taps",)),
            ("final layer norm", ("apply_layernorm",)),
            ("image normalisation", ("mean", "std")),
        ):
            values = [[settings[key] for key in keys] for settings in (theirs, ours)]
            if values[0] != values[1]:
                shown = [value[0] if len(value) == 1 else value for value in values]
                raise InputError(f"{_who(first, task)} differ in {what}: {shown[0]} and {shown[1]}.")


def _who(first: str, task: str) -> str:
    return f"experts {first!r} and {task!r}" if first.isidentifier() else f"{first} and expert {task!r}"


def model_card(description: Mapping[str, Any]) -> str:
    """The README.md of a model folder: what it predicts, from what it was made, how to use it."""
    tasks, heads = description["tasks"], description["heads"]
    rows = "\n".join(f"| {name} | {task.get('kind', name)} | {heads[name]['kind']} |" for name, task in tasks.items())
    return f"""---
library_name: simomerge
tags: [model-merging, dense-prediction, multi-task]
---
# One encoder, {len(tasks)} task{"s" if len(tasks) != 1 else ""}

| task | kind | head |
| --- | --- | --- |
{rows}

```python
import simomerge as sm

model = sm.load("this/folder")
maps = model.predict("photo.jpg")  # one array per task, at the photo's size
```

`encoder/` is a plain transformers folder. Where the weights come from:

```json
{json.dumps(description["provenance"], indent=2)}
```
"""
