"""Epochs in a recipe file: optimiser steps, counted on the images that a training has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from simomerge.assembly.realign import get_realignment, realignments
from simomerge.assembly.realign.method import TrainedRealignment
from simomerge.core.errors import InputError
from simomerge.recipes.recipe import REFINE, Recipe

Place = tuple[str, ...]
"""Where a recipe has a training: ``("tune",)`` or ``("refine", "heads")``."""


def steps_of(epochs: Any, images: int, batch_size: int) -> int:
    """Optimiser steps of a number of epochs, counting full batches.

    Raises:
        InputError: Epochs that are not a number above 0.
    """
    if isinstance(epochs, bool) or not isinstance(epochs, (int, float)) or not 0 < epochs < math.inf:
        raise InputError(f"epochs is {epochs!r}; give a number above 0")
    return max(1, round(epochs * max(1, images // batch_size)))


def take_epochs(given: Mapping[str, Any]) -> tuple[dict[Place, Any], list[str]]:
    """Remove the epochs of every training from a recipe's content; by place, and what is wrong with them."""
    found: dict[Place, Any] = {}
    problems = []
    for place, training in _trainings(given):
        if "epochs" not in training:
            continue
        epochs, name = training.pop("epochs"), ".".join(place)
        method = realignments().get(place[1]) if len(place) > 1 else None
        if not isinstance(method, TrainedRealignment | None):
            problems.append(f"{name}: epochs does nothing, because {place[1]} does not train")
        elif "steps" in training:
            problems.append(f"{name}: give steps or epochs, not both")
        else:
            try:
                steps_of(epochs, 1, 1)
            except InputError as error:
                problems.append(f"{name}.{error}")
            found[place] = epochs
    for place, training in _trainings(given):  # what a refinement does not name is as in the re-alignment
        if (
            place[0] == "refine"
            and ("realign", place[1]) in found
            and "steps" not in {**REFINE.get(place[1], {}), **training}
        ):
            found.setdefault(place, found["realign", place[1]])
    return found, problems


def with_steps(given: Mapping[str, Any], recipe: Recipe, epochs: Mapping[Place, Any]) -> Recipe:
    """A recipe with steps in the place of epochs.

    Args:
        given: The content of the recipe without epochs; it gets the steps.
        recipe: The recipe of this content.
        epochs: Those that were taken out of it.

    Raises:
        InputError: The number of images is unknown.
    """
    images = _Images(recipe)
    trainings = dict(_trainings(given))
    for place, each in epochs.items():
        if len(place) == 1:
            count, size = images.of("train"), getattr(recipe, place[0]).batch_size
        else:
            parameters = recipe.realign.get(place[1], {})
            if place[0] == "refine":
                parameters = {**parameters, **recipe.refine[place[1]]}
            method = get_realignment(place[1], **parameters)
            assert isinstance(method, TrainedRealignment)  # epochs of others are a problem
            count, size = (
                images.of("unlabelled" if method.teacher == "experts" else "val", ".".join(place)),
                method.training.batch_size,
            )
            count = count if method.count is None else min(count, method.count)
        trainings[place]["steps"] = steps_of(each, count, size)
    return Recipe(**given)


def _trainings(given: Mapping[str, Any]) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The mappings of a recipe's content that describe trainings, by place."""
    for key in ("probe", "tune", "joint"):
        if isinstance(given.get(key), dict):
            yield (key,), given[key]
    for key in ("realign", "refine"):
        steps = given.get(key)
        for step, parameters in steps.items() if isinstance(steps, dict) else ():
            if isinstance(parameters, dict):
                yield (key, step), parameters


class _Images:
    """The number of images that a recipe's trainings have, which are fewer than it asks for if its data are smaller."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._known: dict[str, int] = {}

    def of(self, name: str, place: str = "") -> int:
        """Images of "train" or "val", or those without labels.

        Raises:
            InputError: The number is unknown.
        """
        if name not in self._known:
            self._known[name] = self._counted(name, place)
        return self._known[name]

    def _counted(self, name: str, place: str) -> int:
        from simomerge.recipes.graph import open_data  # both import torch
        from simomerge.recipes.plan import splits_of, unlabelled_data

        recipe = self.recipe
        splits = splits_of(recipe)
        names = recipe.align_splits if name == "unlabelled" else (name,)
        asked: list[Any] = [splits[each]["count"] if each in splits else None for each in names]
        elsewhere = name == "unlabelled" and recipe.align_images is not None
        try:
            if recipe.data != "rooms" or elsewhere:
                return len(open_data(unlabelled_data(recipe, splits, None) if name == "unlabelled" else splits[name]))
        except (InputError, TypeError, ValueError) as error:  # a run of known splits ends with the same error
            if elsewhere or None in asked:
                raise InputError(
                    f"{place}: epochs need the number of images, which is unknown ({str(error).rstrip('.')}); give"
                    " steps instead"
                ) from error
        return int(sum(asked))
