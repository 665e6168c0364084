"""What a search varies: ranges and choices for values of a recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import StrictInt, StrictStr

from simomerge.core.errors import InputError


@dataclass(frozen=True)
class SearchSettings:
    """A search for the values of a recipe that make one of its rows best.

    Args:
        row: The row of the recipe's table whose Delta_MTL on held-out validation images is maximised.
        images: Number of ``val_images`` that evaluate the trials. During a search they are no part of D_val. The test
            split is never used.
        trials: The search ends when all machines together have finished this number of trials.
        space: Key, as ``--set`` takes it (``realign.heads.lr``, ``merge_settings.ties.density``), to ``{low, high}``,
            with ``log: true`` for a uniform logarithm, or to ``{choices: [...]}``. If both limits are whole numbers,
            so are the values.

    Raises:
        InputError: A number is out of range, or a range is empty.
    """

    row: StrictStr = ""
    images: StrictInt = 0
    trials: StrictInt = 20
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
