"""All checks on experts and their base, and what a merged model records about them.

Models in memory (`simomerge.models.model.SimoModel`) and files on disk (`simomerge.merging.disk.sources.Source`) use
the same functions. These work on plain data: the content of simo.json and fingerprints.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from simomerge.core.caution import warn
from simomerge.core.errors import InputError
from simomerge.core.model_files import file_and_key
from simomerge.core.remote import is_url, last_name
from simomerge.core.schema import nearest
from simomerge.core.task_names import check_task_name

_SETTINGS = {
    "architecture": ("architecture",),
    "patch size": ("patch_size",),
    "taps": ("taps",),
    "final layer norm": ("apply_layernorm",),
    "image normalisation": ("mean", "std"),
}
"""What experts of one encoder must agree in -> the keys of these values in the encoder's settings."""

OTHER_SIZE = 2.0
"""Images with this number of times more, or fewer, pixels than the training images are a warning."""


class Recorded(Protocol):
    """A base, an expert or a merged model, in memory or on disk."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where its weights come from, as simo.json records it; empty if unknown."""

    @property
    def place(self) -> str:
        """Where it was read from, for messages; "the given model" if it was not read."""

    def origin(self) -> dict[str, Any]:
        """What other models record about it, as `origin_of` gives it."""


# The task of an expert ----------------------------------------------------------------------------------


KIND_NAMES = frozenset(
    [
        "segmentation",
        "binary",
        "depth",
        "disparity",
        "log_depth",
        "normals",
        "edges",
        "flow",
        "albedo",
        "texture",
        "keypoints",
        "autoencoder",
        "regression",
    ]
)
"""The names of the kinds of tasks (the keys of `simomerge.datasets.tasks.KINDS`), which needs no torch here."""


def own_task(tasks: Collection[str], task: str) -> str:
    """Choose the task of an expert that is given as ``task=EXPERT``.

    An expert with one task accepts any name for it, unless that is another kind of task, or nearly its own: such names
    are mistakes. An ending such as ``depth_2`` or ``depth_indoor`` is not. An expert with several tasks must have a
    task of that name.

    Raises:
        InputError: the expert has several tasks and none has this name, the name is another kind of task or a
            misspelling of its own task, or `check_task_name` refuses it.

    Example:
        >>> own_task(["depth"], "distance"), own_task(["depth", "normals"], "normals")
        ('depth', 'normals')
    """
    check_task_name(task)
    if task in tasks:
        return task
    if len(tasks) != 1:
        raise InputError(f"expert {task!r} has the tasks {', '.join(tasks) or 'none'}; name one of them.")
    own = next(iter(tasks))
    if {own, task} <= KIND_NAMES:
        raise InputError(f"expert {task!r} is a model of {own}: write {own}=..., or a name that is no kind of task.")
    if nearest(task, [own]) and not re.fullmatch(rf"(\w+_)?{own}(_\w+|\d+)?", task):
        raise InputError(f"expert {task!r} is one of {own!r}: write {own}=..., or give it a name that is less alike.")
    return own


def only_task(description: Mapping[str, Any], task: str) -> dict[str, Any]:
    """The description of a model reduced to one task, which is renamed to ``task``. Raises like :func:`own_task`."""
    tasks = description["tasks"]
    own = own_task(tasks, task)
    renamed = tasks[own] if own == task else {"kind": own, **tasks[own], "name": task}
    kept = {key: value for key, value in description.items() if key != "evaluation"}  # figures of the whole model
    return {**kept, "tasks": {task: renamed}, "heads": {task: description["heads"][own]}}


# Experts of one encoder ---------------------------------------------------------------------------------


def without_additions(description: Mapping[str, Any]) -> dict[str, Any]:
    """A description without the adapters and branches that an expert must not have."""
    return {**description, "adapters": None, "encoder": {**description["encoder"], "tree": None}}


def check_plain(task: str, description: Mapping[str, Any]) -> None:
    """Raise InputError if an expert has adapters in addition to its blocks, or is a tree of shared blocks."""
    if description.get("encoder", {}).get("tree"):
        raise InputError(
            f"expert {task!r} is a tree of shared blocks, which cannot be merged again: give the experts that it was"
            " made from."
        )
    if description.get("adapters"):
        raise InputError(
            f"expert {task!r} has adapters in addition to its blocks, and merging weights would lose them: give an"
            " expert without adapters."
        )


def check_same_encoder(descriptions: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that experts can share one encoder: heads must read the same taps of equally normalised images.

    Args:
        descriptions: task -> ``encoder`` (its settings) and ``adapters``, as in simo.json. A model in memory may add
            ``architecture`` and ``patch_size`` to the settings. A key that is not an identifier, such as "the model",
            appears in messages as it is.

    Raises:
        InputError: an expert with adapters, or two that differ in a setting.
    """
    for task, description in descriptions.items():
        check_plain(task, description)
    first = next(iter(descriptions))
    reference = descriptions[first]["encoder"]
    for task, description in descriptions.items():
        for what, keys in _SETTINGS.items():
            expected, given = ([settings.get(key) for key in keys] for settings in (reference, description["encoder"]))
            if expected != given:
                both = f"experts {first!r} and {task!r}" if first.isidentifier() else f"{first} and expert {task!r}"
                cure = ", or import them with the same --taps" if what == "taps" else ""
                shown = " and ".join(str(values if len(values) > 1 else values[0]) for values in (expected, given))
                raise InputError(f"{both} differ in {what}: {shown}. Give experts that were trained alike{cure}.")


# Where weights come from --------------------------------------------------------------------------------


def source_name(source: str | Path) -> str:
    """What provenance calls a source: the name of a file or folder without its path or URL, or a hub id.

    A shared model must not reveal where files were on the machine that made it.
    """
    if is_url(source):
        return last_name(str(source))
    file, _ = file_and_key(source)
    return Path(file).name + str(source)[len(file) :] if Path(file).exists() else str(source)


def origin_of(source: str, fingerprint: str, licence: str, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What other models record about a model.

    Returns:
        ``source``, a name without its folder, ``fingerprint`` of its encoder, and, if they are known, ``license`` and
        ``size``, the height and width of its training images.
    """
    size = trained_size(provenance)
    known = {"license": licence or None, "size": list(size) if size else None}
    return {"source": source, "fingerprint": fingerprint, **{key: each for key, each in known.items() if each}}


def trained_size(provenance: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) of the images that a model, or all experts of a merged model, were trained on; None if unknown.

    Example:
        >>> trained_size({"training": {"size": [480, 640]}})
        (480, 640)
    """
    records = [provenance.get("training", {})]
    if isinstance(experts := provenance.get("experts"), Mapping):
        records = list(experts.values())
    sizes = {_size(record.get("size")) if isinstance(record, Mapping) else None for record in records}
    return sizes.pop() if len(sizes) == 1 else None


def _size(recorded: Any) -> tuple[int, int] | None:
    valid = isinstance(recorded, list) and len(recorded) == 2 and all(type(n) is int and n > 0 for n in recorded)
    return (recorded[0], recorded[1]) if valid else None


def is_other_size(size: tuple[int, int], trained: tuple[int, int]) -> bool:
    """Whether an image, (height, width), has `OTHER_SIZE` times more, or fewer, pixels than the training images."""
    times = size[0] * size[1] / (trained[0] * trained[1])
    return not 1 / OTHER_SIZE <= times <= OTHER_SIZE


def as_many_pixels(size: tuple[int, int], trained: tuple[int, int]) -> tuple[int, int]:
    """The size, (height, width), with the shape of an image and the number of pixels of the training images.

    Example:
        >>> as_many_pixels((100, 400), (64, 100))
        (40, 160)
    """
    scale = (trained[0] * trained[1] / (size[0] * size[1])) ** 0.5
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def check_base(base: Recorded, experts: Mapping[str, Recorded]) -> list[str]:
    """Check that the base is the one that every expert records.

    Returns:
        The experts that do not record the fingerprint of their base. The base is hashed only if one does.

    Raises:
        InputError: an expert was fine-tuned from another base.
    """
    recorded = {task: expert.provenance.get("base", {}) for task, expert in experts.items()}
    for task, theirs in recorded.items():
        expected = theirs.get("fingerprint")
        if expected and expected != (given := base.origin()["fingerprint"]):
            raise InputError(
                f"expert {task!r} ({experts[task].place}) was fine-tuned from another base (its base {expected[:12]},"
                f" the given one {given[:12]}); give {theirs.get('source', 'that base')}."
            )
    return [task for task, theirs in recorded.items() if not theirs.get("fingerprint")]


def warn_of_unrecorded_base(task: str, distance: float) -> None:
    """Warn that an expert does not record its base, with ``||expert - base|| / ||base||`` as evidence."""
    verdict = "this looks like another base" if distance > 0.5 else "plausible for a fine-tuning"
    share = f"{100 * distance:.2g}% of their norm: {verdict}" if distance else "nothing: they are equal"
    warn(f"expert {task!r} does not record its base. Its weights differ from the given one by {share}.")


def check_merged_from(
    provenance: Mapping[str, Any], experts: Mapping[str, Recorded], base: Recorded | None = None
) -> None:
    """Check that experts, and the base, are those that a merged model records. Those without a record pass.

    Args:
        provenance: of the merged model.

    Raises:
        InputError: other weights than recorded.
    """
    recorded = provenance.get("experts", {})
    given = [(f"expert {task!r}", expert, recorded.get(task, {})) for task, expert in experts.items()]
    if base is not None:
        given.insert(0, ("the base", base, provenance.get("base", {})))
    for what, model, expected in given:
        fingerprint = expected.get("fingerprint")
        if fingerprint and fingerprint != (given_one := model.origin()["fingerprint"]):
            raise InputError(
                f"{model.place} (fingerprint {given_one[:12]}) is not what the model was merged from as {what}; give"
                f" {expected.get('source', 'that one')} (fingerprint {fingerprint[:12]})."
            )


def check_plain_merge(model: Recorded) -> None:
    """Raise InputError if a re-alignment changed the encoder of a merged model, which is to be edited."""
    if method := changed_by(model.provenance):
        raise InputError(
            f"{model.place}: the re-alignment {method!r} changed its encoder, which is no longer the plain merge. Edit"
            " the merge from before the re-alignment, and re-align the result again."
        )


def merge_provenance(
    base: Mapping[str, Any], experts: Mapping[str, Mapping[str, Any]], merge: Mapping[str, Any]
) -> dict[str, Any]:
    """What a merged model records.

    Args:
        base: the origin of the base, see `Recorded.origin`.
        experts: task -> the origin of its expert.
        merge: the method and its parameters, as `simomerge.merging.describe_method` gives them.
    """
    return {
        "base": dict(base),
        "experts": {task: dict(origin) for task, origin in experts.items()},
        "merge": dict(merge),
    }


def of_group(provenance: Mapping[str, Any], group: Collection[str]) -> dict[str, Any]:
    """What is left of the record of a tree for a group of tasks that shares no block with others.

    Example:
        >>> of_group({"experts": {"a": {}, "b": {}}, "merge": {"tree": "4: a, b", "groups": {}}}, ["a"])
        {'experts': {'a': {}}}
    """
    found = {key: value for key, value in provenance.items() if key != "merge"}
    if "experts" in found:
        found["experts"] = {task: origin for task, origin in found["experts"].items() if task in group}
    merge = provenance.get("merge", {}).get("groups", {}).get("+".join(group))
    return {**found, "merge": dict(merge)} if merge else found


def changed_by(provenance: Mapping[str, Any]) -> str | None:
    """The method of a re-alignment that changed a merged model's encoder, or None if the encoder is the merge."""
    record = provenance.get("realign")
    while record:
        # Records that were written before `changes_encoder` existed name LoRA in one of two places.
        if record.get("changes_encoder", "lora" in (record.get("method"), record.get("adapters"))):
            return str(record.get("method"))
        record = record.get("after")
    return None
