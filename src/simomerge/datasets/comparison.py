"""Whether two tasks of one name are the same task, so that one's predictions can be compared with the other's."""

from __future__ import annotations

import re

from simomerge.core.errors import InputError
from simomerge.datasets.tasks import Task

_GENERATED = re.compile(r"((class|category|label|cls|id)?\d+)?")
"""A spelling that says nothing of what a class is, such as class_0 of `simomerge data new` or LABEL_0."""


def check_same_task(ours: Task, theirs: Task, owner: str, other: str) -> None:
    """Check that two tasks of one name have one kind, as many channels, and one order of classes.

    A label is the number of its class. Capitals, spaces, underscores and hyphens in the name of a class do not matter,
    and a generated name (`class_0`) fits every other.

    Args:
        ours, theirs: the two tasks.
        owner, other: what has them, such as "model" and "data", for the message.

    Raises:
        InputError: they differ; the message names the first difference.

    Example:
        >>> street = Task("street", "segmentation", classes=("road", "traffic light"))
        >>> named = Task("street", "segmentation", classes=("class_0", "Traffic_Light"))
        >>> check_same_task(street, named, "model", "data")
    """
    name = ours.name
    if (ours.kind, ours.channels) != (theirs.kind, theirs.channels):
        raise InputError(
            f"task {name!r} is {ours.kind} of {ours.channels} channels in the {owner}, but {theirs.kind} of"
            f" {theirs.channels} in the {other}; use a model or an expert of that task."
        )
    here, there = ([_spelling(each) for each in task.classes] for task in (ours, theirs))
    for index, (one, two) in enumerate(zip(here, there, strict=False)):  # only segmentations need classes
        if one == two or _says_nothing(one) or _says_nothing(two):
            continue
        difference = (
            f"task {name!r}: class {index} is {ours.classes[index]!r} in the {owner}, but {theirs.classes[index]!r} in"
            f" the {other}"
        )
        if sorted(here) == sorted(there):
            raise InputError(
                f"{difference}, which has the same classes in another order. A label is the number of its class: list"
                f" the classes of the {other} in the order of the {owner}, and number its labels by it."
            )
        raise InputError(
            f"{difference}. If both mean the same class, give it one name; otherwise use a model or an expert of the"
            f" classes of the {other}."
        )


def _spelling(name: str) -> str:
    return re.sub(r"[\s_-]", "", str(name)).casefold()


def _says_nothing(spelling: str) -> bool:
    return _GENERATED.fullmatch(spelling) is not None
