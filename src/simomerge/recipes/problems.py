"""What is wrong with a recipe, found before any work starts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from simomerge.core.errors import InputError
from simomerge.core.schema import nearest
from simomerge.merging import get_method
from simomerge.models.heads import HEADS, build_head
from simomerge.training.choices import AUGMENTATIONS, WEIGHTINGS

if TYPE_CHECKING:
    from simomerge.recipes.recipe import Recipe

FOLDS = ("fold", "fold-cross")
ADAPTS = ("adapters", "distill-adapters")
WITHOUT_LABELS = ("fold", "fold-cross", "distill", "distill-adapters")
"""Steps of a row that look at unlabelled images only."""

STEPS = (*WITHOUT_LABELS, "heads", "adapters")
"""What may follow a merge's name in a row, each after a plus."""


def problems(recipe: Recipe, default_gallery: Sequence[str]) -> list[str]:
    """All that is wrong with a recipe, a sentence each without its full stop."""
    found = [*_numbers(recipe), *_lists(recipe), *_names(recipe), *_head(recipe), *_merges(recipe), *_rows(recipe)]
    if recipe.relate and (recipe.val_images < 8 or len(recipe.tasks) < 2):
        found.append("relate takes at least two tasks, and 8 images of the validation split")
    return [*found, *_gallery(recipe, default_gallery)]


def _numbers(recipe: Recipe) -> Iterator[str]:
    for name in ("train", "val", "test", "scale", "fold", "fold_cross", "distill"):
        if (count := getattr(recipe, f"{name}_images")) < 1:
            yield f"{name}_images={count}; use at least 1"
    if recipe.rank < 1:
        yield f"rank={recipe.rank}; use at least 1"
    if strange := [seed for seed in recipe.seeds if not 0 <= seed < 2**63]:
        yield f"seed {strange[0]}; use 0 to {2**63 - 1}"


def _lists(recipe: Recipe) -> Iterator[str]:
    for name in ("tasks", "seeds", "joint_weightings", "merges", "realigned", "gallery"):
        values = getattr(recipe, name)
        if len(set(values)) < len(values):
            yield f"{name} has {next(v for v in values if values.count(v) > 1)!r} twice"
    for name, one in (("tasks", "task"), ("seeds", "seed")):
        if not getattr(recipe, name):
            yield f"{name} is empty; give at least one {one}"
    if strange := [task for task in recipe.tasks if task in ("image", "split")]:
        yield f"no task can be called {strange[0]!r}"


def _names(recipe: Recipe) -> Iterator[str]:
    yield from _unknown("augmentation", [recipe.augmentation], AUGMENTATIONS)
    yield from _unknown("activation", [recipe.activation], ("none", "relu"))
    yield from _unknown("loss weighting", recipe.joint_weightings, WEIGHTINGS)
    if "equal" not in recipe.joint_weightings:
        yield "joint_weightings lacks 'equal', the joint MTL that all is compared with"


def _unknown(what: str, names: Sequence[str], known: Collection[str]) -> Iterator[str]:
    for name in names:
        if name not in known:
            yield f"unknown {what} {name!r}; choose among: {', '.join(known)}"


def _head(recipe: Recipe) -> Iterator[str]:
    if recipe.head not in HEADS:
        yield from _unknown("head", [recipe.head], HEADS)
        return
    try:  # one for an encoder of four narrow taps
        build_head(recipe.head, (8, 8, 8, 8), 1, dict(recipe.head_settings))
    except (InputError, RuntimeError) as error:  # the latter: of sizes that torch cannot make
        yield f"head_settings: {str(error).splitlines()[0].rstrip('.')}"


def _merges(recipe: Recipe) -> Iterator[str]:
    for name in recipe.merges:
        if not isinstance(recipe.merge_settings.get(name, {}), dict):
            given = recipe.merge_settings[name]
            yield f"merge_settings of {name!r} is {given!r}; give a mapping, such as {{scale: 0.3}}"
            continue
        try:
            method = get_method(name, **recipe.merge_settings.get(name, {})).for_experts(recipe.tasks)
        except InputError as error:
            yield str(error).rstrip(".")
            continue
        if method.needs_labels or method.needs_data:
            yield f"{name!r} needs statistics of the experts; merge it by `simomerge merge`"
        if len(recipe.tasks) < method.minimum_experts:
            yield f"{name!r} needs at least {method.minimum_experts} tasks, and there are {len(recipe.tasks)}"
    if strange := [name for name in recipe.merge_settings if name not in recipe.merges]:
        yield f"merge_settings of {strange[0]!r}, which is none of its merges"


def _rows(recipe: Recipe) -> Iterator[str]:
    for row in recipe.realigned:
        merge, *steps = row.split("+")
        if not (merge == "auto" or (merge in recipe.merges and steps)) or any(step not in STEPS for step in steps):
            known = f"+{', +'.join(STEPS[:-1])} or +{STEPS[-1]}"
            yield f"row {row!r} is not one of its merges, or auto, followed by {known}"
        elif any(step in FOLDS for step in steps[1:]) or (merge == "auto" and steps[:1] and steps[0] in FOLDS):
            yield f"row {row!r}: a fold comes right after a merge, and auto is folded already"
        elif sum(step in ADAPTS for step in steps) > 1:
            yield f"row {row!r} adds adapters twice"


def _gallery(recipe: Recipe, default: Sequence[str]) -> Iterator[str]:
    """Rows of the default gallery that a recipe lacks are left out."""
    joint = [f"joint-mtl-{name}" for name in recipe.joint_weightings]
    rows: list[Any] = ["experts", "joint-mtl", *joint, *recipe.merges, *recipe.realigned]
    for row in recipe.gallery if recipe.gallery != default else ():
        if row not in rows:
            near = nearest(row, rows)
            yield f"gallery has {row!r}, which is no row of the recipe" + (f"; did you mean {near!r}" if near else "")
