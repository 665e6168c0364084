"""A recipe as a YAML file: strict, typed, and all that is wrong with it said at once."""

from __future__ import annotations

import contextlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from simomerge.errors import InputError
from simomerge.recipes.recipe import Recipe
from simomerge.userfiles import nearest, read_yaml


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
    """

    recipe: Recipe
    title: str = "simomerge run"
    base: str = "rooms-base"
    data: str = "rooms"
    data_options: dict[str, Any] = field(default_factory=dict)
    output: str = ""


def read_recipe(path: str | Path, changes: Iterable[str] = ()) -> RecipeFile:
    """A recipe file, checked.

    Args:
        path: of the YAML file.
        changes: ``KEY=VALUE`` each, which replace what the file says; ``tune.steps=2`` reaches into a mapping.

    Raises:
        InputError: no such file, no YAML, or a list of everything in it that is wrong: unknown keys (with the nearest
            known one), values of another type, numbers out of range.

    Example:
        >>> read_recipe("recipes/rooms-small.yaml", ["seeds=[0, 1]"]).recipe.seeds              # doctest: +SKIP
        (0, 1)
    """
    path = Path(path)
    said = read_yaml(path, "give a recipe, such as recipes/rooms-small.yaml (docs/recipes.md).")
    for change in changes:
        _set(said, change)
    errors: list[str] = []
    about = [each.name for each in fields(RecipeFile) if each.name != "recipe"]
    hints = {**typing.get_type_hints(Recipe), **typing.get_type_hints(RecipeFile)}
    known = [*about, *(each.name for each in fields(Recipe))]
    values = {}
    for key, value in said.items():
        if key not in known:
            errors.append(f"unknown key {key!r}{_near(str(key), known)}")
            continue
        values[key] = _value(hints[key], value, str(key), errors, getattr(Recipe, str(key), None))
    recipe = None
    if not errors:
        try:
            recipe = Recipe(**{key: value for key, value in values.items() if key not in about})
        except InputError as error:
            errors.append(str(error))
    if errors or recipe is None:
        raise InputError(f"{path}: " + "; ".join(error.rstrip(".") for error in errors) + ".")
    rest = {key: value for key, value in values.items() if key in about}
    options = rest.get("data_options", {})
    rest["data_options"] = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}  # sizes
    return RecipeFile(recipe, **{"output": f"runs/{path.stem}", "title": path.stem, **rest})


def _set(said: dict[str, Any], change: str) -> None:
    import yaml

    key, equals, text = change.partition("=")
    if not (key and equals):
        raise InputError(f"--set {change}: give KEY=VALUE, such as tune.steps=20.")
    *way, last = key.split(".")
    place = said
    for step in way:
        place = place.setdefault(step, {})
        if not isinstance(place, dict):
            raise InputError(f"--set {change}: {step!r} is no mapping.")
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {change}: {text!r} is no YAML value.") from error


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
    return float(given) if wanted is float and fits else given


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
            errors.append(f"{place}: unknown key {key!r}{_near(str(key), hints)}")
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
