"""The normalisation of images before an encoder: one mean and one standard deviation for red, green and blue."""

from __future__ import annotations

from collections.abc import Sequence

from simomerge.core.errors import InputError
from simomerge.core.text import shown

_LARGEST = 1000.0
_LEAST = {"mean": -_LARGEST, "std": 1e-6}
"""For images in [0, 1], real encoders have means in [-1, 2], and standard deviations above 0.001 and below 10."""


def check_normalisation(mean: Sequence[float], std: Sequence[float], place: str = "") -> None:
    """Check that an encoder can have a mean and a standard deviation, for images in [0, 1].

    Args:
        mean, std: Of red, green and blue.
        place: What precedes their names in the message.

    Raises:
        InputError: Not three numbers each, or numbers that cannot be meant.

    Example:
        >>> check_normalisation([0.5, 0.5, 0.5], [0, 0, 0], "simo.json: encoder.")
        Traceback (most recent call last):
        simomerge.core.errors.InputError: simo.json: encoder.std is [0, 0, 0]: give three numbers from 1e-06 to 1000.
    """
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3 or not all(_LEAST[name] <= value <= _LARGEST for value in values):
            raise InputError(
                f"{place}{name} is {shown(list(values))}: give three numbers from {_LEAST[name]:g} to {_LARGEST:g}."
            )
