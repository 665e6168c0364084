"""What is wrong with a recipe whose fields have the right types."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from simomerge.assembly.realign import get_realignment, realignments
from simomerge.core.errors import InputError
from simomerge.core.schema import nearest
from simomerge.core.task_names import check_task_name
from simomerge.core.text import first_line
from simomerge.datasets.groups import LEAST_IMAGES
from simomerge.merging import get_method
from simomerge.models.heads import HEADS, build_head
from simomerge.recipes.row import AUTO, LABEL_FREE, Row, joint_row
from simomerge.training.choices import AUGMENTATIONS, WEIGHTINGS

Recipe = Any
"""`simomerge.recipes.recipe.Recipe`, which calls this module."""


def problems_of(recipe: Recipe, unknown: Collection[str] = ()) -> Iterator[str]:
    """Every problem, a sentence each without its full stop.

    Args:
        recipe: The recipe to check.
        unknown: Keys whose values are not known, because they have a wrong type. Checks that need them are left out.
    """
    for check, *keys in _CHECKS:
        if not any(key in unknown for key in keys):
            yield from check(recipe)


def _align(recipe: Recipe) -> Iterator[str]:
    for name in recipe.align_splits:
        if name == "test":
            yield "align_split names the test split, which is used only for the reported figures"
        elif not name or (recipe.data == "rooms" and name not in ("train", "val")):
            yield f"align_split is {recipe.align_split!r}; use 'train+val', 'train' or 'val'"
    if len(set(recipe.align_splits)) < len(recipe.align_splits):
        yield f"align_split is {recipe.align_split!r}; name each split once"
    for key in ("choose_images", "auto_images"):
        if getattr(recipe, key) < LEAST_IMAGES:
            yield f"{key} is {getattr(recipe, key)}; a choice without labels takes at least {LEAST_IMAGES} images"


def _lists(recipe: Recipe) -> Iterator[str]:
    for name in ("tasks", "seeds", "joint_weightings", "merges", "realigned", "gallery"):
        values = getattr(recipe, name)
        if len(set(values)) < len(values):
            yield f"{name} has {next(v for v in values if values.count(v) > 1)!r} twice"
    for name, one in (("tasks", "task"), ("seeds", "seed")):
        if not getattr(recipe, name):
            yield f"{name} is empty; give at least one {one}"
    if wrong := [seed for seed in recipe.seeds if not 0 <= seed < 2**63]:
        yield f"seed {wrong[0]}; use 0 to {2**63 - 1}"
    try:
        for task in recipe.tasks:
            check_task_name(task)
    except InputError as error:
        yield str(error).rstrip(".")


def _trainings(recipe: Recipe) -> Iterator[str]:
    yield from _unknown("augmentation", [recipe.augmentation], AUGMENTATIONS)
    yield from _unknown("loss weighting", recipe.joint_weightings, WEIGHTINGS)
    if "equal" not in recipe.joint_weightings:
        yield "joint_weightings needs 'equal', the joint MTL that everything is compared with"


def _relate(recipe: Recipe) -> Iterator[str]:
    if recipe.relate and (recipe.val_images < 16 or len(recipe.tasks) < 2):
        yield "relate needs at least two tasks, and 16 images of the validation split"


def _rows(recipe: Recipe) -> Iterator[str]:
    wrong_steps = list(_steps_known(recipe))
    yield from wrong_steps
    for row in recipe.realigned:
        yield from _row(recipe, row, check_parameters=not wrong_steps)


def _unknown(what: str, names: Sequence[str], known: Collection[str]) -> Iterator[str]:
    for name in names:
        if name not in known:
            yield f"unknown {what} {name!r}; choose among: {', '.join(known)}"


def _head(recipe: Recipe) -> Iterator[str]:
    known = [kind for kind, head in HEADS.items() if not getattr(head, "wraps_a_head", False)]
    if recipe.head not in known:
        yield from _unknown("head", [recipe.head], known)
        return
    try:  # a head for an encoder of four narrow taps
        build_head(recipe.head, (8, 8, 8, 8), 1, dict(recipe.head_settings))
    except (InputError, RuntimeError) as error:  # RuntimeError: sizes that torch cannot make
        yield f"head_settings: {first_line(error).rstrip('.')}"


def _merges(recipe: Recipe) -> Iterator[str]:
    for name in recipe.merges:
        try:
            method = get_method(name, **recipe.merge_settings.get(name, {})).for_experts(recipe.tasks)
        except InputError as error:
            yield str(error).rstrip(".")
            continue
        if method.needs_labels or method.needs_data:
            yield f"{name!r} needs statistics of the experts; merge it by `simomerge merge`"
        if len(recipe.tasks) < method.minimum_experts:
            yield f"{name!r} needs at least {method.minimum_experts} tasks, and there are {len(recipe.tasks)}"
    if wrong := [name for name in recipe.merge_settings if name not in recipe.merges]:
        yield f"merge_settings has {wrong[0]!r}, which is not one of the recipe's merges"


def _steps_known(recipe: Recipe) -> Iterator[str]:
    for key in ("realign", "refine"):
        for name, parameters in getattr(recipe, key).items():
            try:
                get_realignment(name, **parameters)
            except InputError as error:
                yield f"{key}.{name}: {str(error).rstrip('.')}"
            if "seed" in parameters:
                yield f"{key}.{name}.seed: a recipe's seeds are those of `seeds`; leave it out"


def _row(recipe: Recipe, text: str, check_parameters: bool) -> Iterator[str]:
    try:
        row = Row.parse(text)
    except InputError as error:
        yield str(error).rstrip(".")
        return
    if row.merge not in (*recipe.merges, *LABEL_FREE):
        known_merges = ", ".join((*recipe.merges, *LABEL_FREE))
        yield f"row {text!r} starts with {row.merge!r}; add it to `merges`, or start with one of {known_merges}"
        return
    known = all(step.name in realignments() for step in row.steps)
    if not known or not (row.steps or row.merge in LABEL_FREE):
        yield f"row {text!r} is not a merge followed by one or more of +{', +'.join(realignments())}"
        return
    if not check_parameters:
        return
    try:
        made = [recipe.method(prefix) for prefix in row.prefixes()]
    except InputError as error:
        yield f"row {text!r}: {str(error).rstrip('.')}"
        return
    changed = [row.merge == AUTO, *(method.changes_heads for method in made)]
    late = [method.name for place, method in enumerate(made) if method.needs_plain_heads and any(changed[: place + 1])]
    if late:
        yield (
            f"row {text!r}: a {late[0]} comes right after a merge, or after steps that leave the heads as they are;"
            " auto is folded already"
        )
    with_adapters = [method.adds_adapters for method in made]
    if any(method.changes_encoder and any(with_adapters[:place]) for place, method in enumerate(made)):
        yield f"row {text!r} adds adapters twice, or changes the weights of an encoder with adapters"


def _gallery(recipe: Recipe) -> Iterator[str]:
    """Rows of the default gallery that a recipe does not have are left out; others are an error."""
    rows = ["experts", *map(joint_row, recipe.joint_weightings), *recipe.merges, *recipe.realigned]
    for row in recipe.gallery if recipe.gallery != type(recipe).gallery else ():
        if row not in rows:
            near = nearest(row, rows)
            yield f"gallery has {row!r}, which is no row of the recipe" + (f"; did you mean {near!r}" if near else "")


_CHECKS: tuple[tuple[Any, ...], ...] = (
    (_lists,),
    (_trainings, "augmentation", "joint_weightings"),
    (_head, "head", "head_settings"),
    (_merges, "merges", "merge_settings", "tasks"),
    (_rows, "realigned", "realign", "refine", "merges"),
    (_relate, "relate", "val_images", "tasks"),
    (_align, "align_split", "data", "choose_images", "auto_images"),
    (_gallery, "gallery", "realigned", "merges", "joint_weightings"),
)
"""Every check with the keys of the recipe that it needs."""
