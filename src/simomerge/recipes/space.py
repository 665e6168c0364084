"""What a search varies: ranges and choices for values of a recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from simomerge.core.errors import InputError


@dataclass(frozen=True)
class SearchSettings:
    """A search for the values of a recipe that make one of its rows best.

    Args:
        row: of the recipe's table, whose Delta_MTL on held-out validation images is to be as great as possible.
        images: so many of ``val_images``: they judge, and are taken from D_val while a search lasts. The test
            split is never looked at.
        trials: finished ones at which the search ends, those of all machines together.
        space: key, as ``--set`` takes it (``heads.lr``, ``merge_settings.ties.density``), -> ``{low, high}`` with
            ``log: true`` where the logarithm is to be uniform, or ``{choices: [...]}``. Two whole numbers make whole
            numbers.

    Raises:
        InputError: numbers out of range, or a range that is none.
    """

    row: str = ""
    images: int = 0
    trials: int = 20
    space: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise InputError(f"trials={self.trials}; use at least 1.")
        if self.images < 0:
            raise InputError(f"images={self.images}; use at least 1.")
        object.__setattr__(self, "space", {key: _checked(key, given) for key, given in self.space.items()})


def suggest(trial: Any, space: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A value for every key of a space, from an Optuna trial."""
    return {key: _suggest(trial, key, given) for key, given in space.items()}


def _suggest(trial: Any, key: str, given: Mapping[str, Any]) -> Any:
    if "choices" in given:
        return trial.suggest_categorical(key, given["choices"])
    low, high, log = given["low"], given["high"], given["log"]
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(key, low, high, log=log)
    return trial.suggest_float(key, low, high, log=log)


def _checked(key: str, given: Any) -> dict[str, Any]:
    """A range or a list of choices, with numbers where YAML reads text, as 1e-5."""
    if not isinstance(given, Mapping):
        raise InputError(f"space: {key!r} is {given!r}; give {{low, high}}, with log: true or not, or {{choices}}.")
    if "choices" in given:
        if set(given) != {"choices"} or not isinstance(given["choices"], (list, tuple)) or not given["choices"]:
            raise InputError(f"space: {key!r} needs a list of choices and nothing else.")
        return dict(given)
    if strange := set(given) - {"low", "high", "log"}:
        raise InputError(f"space: {key!r} has an unknown key {min(strange)!r}; it takes low, high, log, or choices.")
    low, high, log = _number(given.get("low")), _number(given.get("high")), given.get("log", False)
    if low is None or high is None or not low < high:
        raise InputError(f"space: {key!r} goes from {given.get('low')!r} to {given.get('high')!r}; give low < high.")
    if not isinstance(log, bool) or (log and not low > 0):
        raise InputError(f"space: {key!r}: log is true or false, and true only where low is above 0.")
    return {"low": low, "high": high, "log": log}


def _number(value: Any) -> int | float | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if plain and math.isfinite(value) else None
