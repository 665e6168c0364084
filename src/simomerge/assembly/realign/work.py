"""The inputs of a work folder: what is in it goes on only under the re-alignment that began it.

A user chooses the folder by its name alone, so a small file in it records what its content was made from. A stage of a
recipe needs no such file: the name of its folder is a key of all its inputs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from simomerge.assembly.realign.method import Inputs, Realignment
from simomerge.core import distributed
from simomerge.core.documents import read_json
from simomerge.core.errors import InputError
from simomerge.core.files import atomic_write_text

if TYPE_CHECKING:
    from simomerge.models.model import SimoModel

RECORD = "inputs.json"

_SHOWN = 3
"""Differences that a message names."""


def check_same_inputs(method: Realignment, model: SimoModel, inputs: Inputs) -> None:
    """Record what a re-alignment starts from in its work folder, or compare it with the record that is there.

    Parameters that decide only about resources, such as memory, may change. A folder without work takes any inputs, and
    one of an earlier version, which has no record, gets one.

    Raises:
        InputError: The work in the folder was begun with other inputs, or the record is damaged.
    """
    message = _compared(method, model, inputs) if distributed.is_first() else ""
    if message := distributed.from_first(message):
        raise InputError(message)


def _compared(method: Realignment, model: SimoModel, inputs: Inputs) -> str:
    """What differs from the record, as a message; "" if nothing does. Only the first process calls this."""
    folder, now = inputs.work_folder, _record(method, model, inputs)
    remedy = f"give another work folder (--work), or remove {folder / RECORD} and the work beside it to start again."
    file = folder / RECORD
    if file.exists() and any(each.name != RECORD for each in folder.iterdir()):
        try:
            before = read_json(file, remedy)
        except InputError as error:
            return str(error)
        differences = [_difference(key, before, now) for key in {**now, **before} if before.get(key) != now.get(key)]
        if differences:
            shown = ", ".join(differences[:_SHOWN]) + (", ..." if len(differences) > _SHOWN else "")
            return f"{folder}: this work was begun with other inputs: {shown}; {remedy}"
        return ""
    atomic_write_text(file, json.dumps(now, indent=2) + "\n")
    return ""


def _record(method: Realignment, model: SimoModel, inputs: Inputs) -> dict[str, Any]:
    from simomerge.datasets.pictures import as_images
    from simomerge.models.fingerprints import encoder_identity, fingerprint_of

    labels = {"labels": _labels(inputs.data)} if method.teacher == "labels" else {}
    images = as_images(inputs.data if method.teacher == "labels" else inputs.images)
    bases = {"base": inputs.base} if inputs.base is not None else {}
    models = {"model": model, **{f"expert {task}": expert for task, expert in inputs.experts.items()}, **bases}
    found = {
        "method": method.name,
        **method.used_parameters(),
        "number of images": len(images),
        "images": _identity(images),
        **labels,
        **{name: f"{fingerprint_of(each)} {encoder_identity(each.encoder)}" for name, each in models.items()},
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _identity(images: Any) -> str:
    """A sha256 of the fingerprint of the images and of the pixels of the first and the last one."""
    digest = hashlib.sha256(images.fingerprint().encode())
    for index in (0, len(images) - 1):  # arrays in memory have no fingerprint
        if (image := images.try_image(index)) is not None:
            digest.update(json.dumps(list(image.shape)).encode() + image.numpy().tobytes())
    return digest.hexdigest()


def _labels(data: Any) -> str:
    """A sha256 of the targets of the first and the last image."""
    digest = hashlib.sha256()
    for index in (0, len(data) - 1):
        for task, target in sorted(data[index].items()):
            digest.update(task.encode() + target.numpy().tobytes())
    return digest.hexdigest()


def _difference(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """For example "steps (6, now 3)", or the name alone of what only fingerprints describe."""
    if key in ("images", "labels", "model", "base") or key.startswith("expert "):
        return f"{key} (other content)" if key in before and key in now else key
    return f"{key} ({before.get(key, 'none')}, now {now.get(key, 'none')})"
