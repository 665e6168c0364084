"""What in a recipe does not fit its base: found when the base is loaded, before any other work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from simomerge.core.errors import InputError
from simomerge.models.encoders import Encoder
from simomerge.models.heads import head_for
from simomerge.models.model import SimoModel
from simomerge.recipes.recipe import Recipe
from simomerge.training.optimizer import check_layer_decay


def check_base(recipe: Recipe, base: SimoModel) -> None:
    """Check that heads, trainings and re-alignments of a recipe fit the base, which may be an encoder of one's own.

    Raises:
        InputError: All that does not fit, in one message.
    """
    if problems := list(_problems(recipe, base.encoder)):
        raise InputError(f"base {recipe.base}: {'; '.join(problems)}.")


def _problems(recipe: Recipe, encoder: Encoder) -> Iterator[str]:
    def problem(place: str, check: Callable[..., Any], *given: Any, **named: Any) -> Iterator[str]:
        try:
            check(*given, **named)
        except InputError as error:
            yield f"{place}: {str(error).rstrip('.')}"

    yield from problem("heads", head_for, encoder, recipe.head, 1, **recipe.head_settings)
    for name in ("tune", "joint"):
        yield from problem(name, check_layer_decay, encoder, getattr(recipe, name))
    for row in recipe.rows:
        for prefix in row.prefixes():
            yield from problem(f"row {str(row)!r}", recipe.method(prefix).check_encoder, encoder)
