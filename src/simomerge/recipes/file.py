"""A recipe as a YAML file: strict, typed, and with all of its errors reported at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from simomerge.assembly.realign import realignments
from simomerge.assembly.realign.method import TrainedRealignment
from simomerge.core.documents import read_yaml
from simomerge.core.errors import InputError
from simomerge.core.registry import settings
from simomerge.core.schema import plain_value
from simomerge.core.text import shown
from simomerge.merging import available
from simomerge.recipes.epochs import take_epochs, with_steps
from simomerge.recipes.recipe import Recipe, RecipeError

_DATA_KEYS = ("spec", "split", "count", "skip", "tasks", "workers")
"""Arguments of `load_data` that the recipe itself decides."""


_UNTYPED = ("data_options", "head_settings", "merge_settings", "realign", "refine")
"""Keys whose values have no type of their own: text with a number counts as the number, as YAML reads 1e-3 as text."""


def read_recipe(path: str | Path, changes: Iterable[str] = (), values: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe file, checked.

    Args:
        path: The YAML file. A training's length is ``steps``, or ``epochs`` of the images that it uses.
        changes: ``KEY=VALUE`` each, which replace what the file says; ``tune.steps=2`` reaches into a mapping.
        values: Further changes, by key.

    Raises:
        InputError: No such file, no YAML, or a list of everything that is wrong: unknown keys (with the nearest known
            one), values of another type, numbers out of range.

    Example:
        >>> read_recipe("recipes/rooms-small.yaml", ["seeds=[0, 1]"]).seeds              # doctest: +SKIP
        (0, 1)
    """
    path = Path(path)
    content = read_yaml(path, "give a recipe, such as recipes/rooms-small.yaml (docs/recipes.md).")
    for key, value in [*map(_parsed, changes), *(values or {}).items()]:
        _set(content, key, value)
    untyped = {key: plain_value(content[key]) for key in _UNTYPED if key in content}
    given: dict[str, Any] = {"output": f"runs/{path.stem}", "title": path.stem, **content, **untyped}
    errors = [f"unknown key {shown(key)}" for key in given if not isinstance(key, str)]
    given = {key: value for key, value in given.items() if isinstance(key, str)}
    epochs, problems = take_epochs(given)
    errors += [*problems, *_misplaced(given)]
    try:
        recipe = Recipe(**given)
        if epochs and not errors:
            recipe = with_steps(given, recipe, epochs)
    except RecipeError as error:
        errors += error.problems
    except InputError as error:
        errors.append(str(error))
    if errors:
        raise InputError(f"{path}: {'; '.join(error.rstrip('.?') for error in errors)}.")
    return recipe


def _parsed(change: str) -> tuple[str, Any]:
    import yaml

    key, equals, text = change.partition("=")
    if not (key and equals):
        raise InputError(f"--set {change}: give KEY=VALUE, such as tune.steps=20.")
    try:
        return key, yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"--set {change}: {text!r} is not a YAML value.") from error


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    space, dot, rest = key.partition("search.space.")
    *way, last = ("search", "space", rest) if dot and not space else key.split(".")  # keys of the space have dots
    place = content
    for step in way:
        place = place.setdefault(step, {})
        if not isinstance(place, dict):
            raise InputError(f"{key}={value}: {step!r} is not a mapping.")
    place.pop({"steps": "epochs", "epochs": "steps"}.get(last, last), None)  # one replaces the other
    place[last] = value


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _misplaced(given: Mapping[str, Any]) -> Iterator[str]:
    """Keys of `load_data` among the data options that the recipe itself sets."""
    for key in _DATA_KEYS:
        if key in _mapping(given.get("data_options")):
            yield f"data_options.{key}: the recipe itself decides that (train_images, tasks, ...)"
    for key in _mapping(given.get("data_options")):
        if not isinstance(key, str):
            yield f"data_options: {key!r} is no name of an option"


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of recipe files, for editors: generated from `Recipe` and the registries of methods.

    Example:
        >>> recipe_schema()["title"]
        'Recipe'
    """
    schema = TypeAdapter(Recipe).json_schema()
    properties = schema["properties"]
    training = schema["$defs"]["TrainSettings"]["properties"]
    training["epochs"] = {"type": "number", "exclusiveMinimum": 0}
    training.pop("seed")
    steps = {
        name: _mapping_of({**_described(method), **(training if isinstance(method, TrainedRealignment) else {})})
        for name, method in realignments().items()
    }
    merges = {name: _mapping_of(_described(method)) for name, method in available().items()}
    properties |= {"realign": _mapping_of(steps), "refine": _mapping_of(steps), "merge_settings": _mapping_of(merges)}
    properties["merges"] = {"type": "array", "items": {"enum": list(merges)}}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def _mapping_of(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _described(method: Any) -> dict[str, Any]:
    return {spec.name: {"description": spec.metadata["help"]} for spec in settings(method)}
