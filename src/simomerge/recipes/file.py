"""A recipe as a YAML file: strict, typed, and all that is wrong with it said at once."""

from __future__ import annotations

import contextlib
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from simomerge.core.errors import InputError
from simomerge.core.schema import nearest, read_yaml
from simomerge.recipes.recipe import Recipe
from simomerge.recipes.space import SearchSettings
from simomerge.training.settings import TrainSettings


@dataclass(frozen=True)
class RecipeFile:
    """What a recipe file says.

    Args:
        recipe: what to do; its fields stand in the file as they are called.
        title: of the report.
        base: folder or hub id of the foundation encoder, or rooms-base.
        data: as `simomerge.datasets.load_data` takes it: rooms, a manifest, or NAME:ROOT.
        data_options: further keyword arguments of the dataset, such as ``size: [280, 378]``.
        output: the run folder.
        search: what `simomerge search` varies.
    """

    recipe: Recipe
    title: str = "simomerge run"
    base: str = "rooms-base"
    data: str = "rooms"
    data_options: dict[str, Any] = field(default_factory=dict)
    output: str = ""
    search: SearchSettings = SearchSettings()


def read_recipe(path: str | Path, changes: Iterable[str] = (), values: Mapping[str, Any] | None = None) -> RecipeFile:
    """A recipe file, checked.

    Args:
        path: of the YAML file. A training's length is ``steps``, or ``epochs`` of the images that it sees.
        changes: ``KEY=VALUE`` each, which replace what the file says; ``tune.steps=2`` reaches into a mapping.
        values: further changes, by key.

    Raises:
        InputError: no such file, no YAML, or a list of everything in it that is wrong: unknown keys (with the nearest
            known one), values of another type, numbers out of range.

    Example:
        >>> read_recipe("recipes/rooms-small.yaml", ["seeds=[0, 1]"]).recipe.seeds              # doctest: +SKIP
        (0, 1)
    """
    path = Path(path)
    said = read_yaml(path, "give a recipe, such as recipes/rooms-small.yaml (docs/recipes.md).")
    for key, value in [*map(_parsed, changes), *(values or {}).items()]:
        _set(said, key, value)
    errors: list[str] = []
    _count_steps(said, errors)
    errors += _misplaced(said)
    about = [each.name for each in fields(RecipeFile) if each.name != "recipe"]
    hints = {**typing.get_type_hints(Recipe), **typing.get_type_hints(RecipeFile)}
    known = [*about, *(each.name for each in fields(Recipe))]
    found = {}
    for key, value in said.items():
        if key not in known:
            errors.append(f"unknown key {key!r}{_near(str(key), known)}")
            continue
        default = getattr(Recipe, str(key), getattr(RecipeFile, str(key), None))
        found[key] = _value(hints[key], value, str(key), errors, default)
    recipe = None
    if not errors:
        try:
            recipe = Recipe(**{key: value for key, value in found.items() if key not in about})
        except InputError as error:
            errors.append(str(error))
    if errors or recipe is None:
        raise InputError(f"{path}: " + "; ".join(error.rstrip(".") for error in errors) + ".")
    rest = {key: value for key, value in found.items() if key in about}
    return RecipeFile(recipe, **{"output": f"runs/{path.stem}", "title": path.stem, **rest})


def _parsed(change: str) -> tuple[str, Any]:
    import yaml

    key, equals, text = change.partition("=")
    if not (key and equals):
        raise InputError(f"--set {change}: give KEY=VALUE, such as tune.steps=20.")
    try:
        return key, yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"--set {change}: {text!r} is no YAML value.") from error


def _set(said: dict[str, Any], key: str, value: Any) -> None:
    space, dot, rest = key.partition("search.space.")
    *way, last = ("search", "space", rest) if dot and not space else key.split(".")  # the space's keys have dots
    place = said
    for step in way:
        place = place.setdefault(step, {})
        if not isinstance(place, dict):
            raise InputError(f"{key}={value}: {step!r} is no mapping.")
    place.pop({"steps": "epochs", "epochs": "steps"}.get(last, last), None)  # one replaces the other
    place[last] = value


SEEN = {
    **dict.fromkeys(("probe", "tune", "joint"), "train_images"),
    **dict.fromkeys(("heads", "adapters", "folded_heads", "folded_adapters"), "val_images"),
    **dict.fromkeys(("distill", "distill_adapters"), "distill_images"),
}
"""Which images each training sees: the key that says how many."""


def _count_steps(said: dict[str, Any], errors: list[str]) -> None:
    """Put steps in the place of epochs: as many full batches as the images make, so many times over."""
    for training, seen in SEEN.items():
        given, images = said.get(training), said.get(seen, getattr(Recipe, seen))
        if not isinstance(given, dict) or "epochs" not in given:
            continue
        if seen == "distill_images" and isinstance(images, int):  # they are of the validation images
            images = min(images, said.get("val_images", Recipe.val_images))
        epochs, size = given["epochs"], given.get("batch_size", getattr(Recipe, training).batch_size)
        if "steps" in given:
            errors.append(f"{training}: give steps or epochs, not both")
        elif not isinstance(epochs, (int, float)) or isinstance(epochs, bool) or not 0 < epochs < math.inf:
            errors.append(f"{training}.epochs is {epochs!r}; give a number above 0")
        elif isinstance(images, int) and isinstance(size, int) and size > 0:  # else told where they are read
            given["steps"] = max(1, round(epochs * max(1, images // size)))
        del given["epochs"]


OWN = ("spec", "split", "count", "skip", "tasks", "workers")


def _misplaced(said: Mapping[str, Any]) -> Iterator[str]:
    """Keys that mean something elsewhere, but say nothing where they are."""
    for training in SEEN:
        given = said.get(training)
        if isinstance(given, dict) and "seed" in given:
            yield f"{training}.seed: a recipe's seeds are those of `seeds`"
    options = said.get("data_options")
    for key in OWN:
        if isinstance(options, dict) and key in options:
            yield f"data_options.{key}: the recipe says that itself (train_images, tasks, ...)"


def _value(kind: Any, given: Any, place: str, errors: list[str], default: Any = None) -> Any:
    """What was given as what is wanted; what is wrong with it goes to ``errors``."""
    if is_dataclass(kind):
        return _fields_of(kind, given, place, errors, default)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if given is None and type(None) in arguments:
            return None
        return _value(next(each for each in arguments if each is not type(None)), given, place, errors)
    if origin is tuple:
        if not isinstance(given, Sequence) or isinstance(given, str):
            errors.append(f"{place} is {given!r}; give a list")
            return ()
        return tuple(_value(arguments[0], each, f"{place}[{i}]", errors) for i, each in enumerate(given))
    wanted = origin or kind
    if wanted is float and isinstance(given, str):  # YAML reads 1e-3 as text
        with contextlib.suppress(ValueError):
            return float(given)
    fits = isinstance(given, (int, float) if wanted is float else wanted)
    if not fits or (isinstance(given, bool) and wanted is not bool):
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a mapping"}
        errors.append(f"{place} is {given!r}; give {names.get(wanted, wanted.__name__)}")
    if wanted is dict and fits:
        return {key: _plain(item) for key, item in given.items()}
    return float(given) if wanted is float and fits else given


def _plain(value: Any) -> Any:
    """A value whose type nobody says: sequences as tuples, and numbers where YAML reads text, as 1e-3."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(map(_plain, value))
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


def _fields_of(kind: Any, given: Any, place: str, errors: list[str], default: Any) -> Any:
    """A dataclass from a mapping; what it does not name is as in the default."""
    if not isinstance(given, Mapping):
        errors.append(f"{place} is {given!r}; give a mapping, such as {{steps: 100}}")
        return default
    hints = typing.get_type_hints(kind)
    values = {}
    before = len(errors)
    for key, value in given.items():
        if key not in hints:
            epochs = ["epochs"] if kind is TrainSettings else []  # which became steps before this
            errors.append(f"{place}: unknown key {key!r}{_near(str(key), [*hints, *epochs])}")
        else:
            values[key] = _value(hints[key], value, f"{place}.{key}", errors)
    if len(errors) > before:
        return default
    try:
        return kind(**values) if default is None else replace(default, **values)
    except InputError as error:
        errors.append(f"{place}: {error}")
        return default


def _near(name: str, known: Iterable[str]) -> str:
    close = nearest(name, known)
    return f" (did you mean {close!r}?)" if close else ""
