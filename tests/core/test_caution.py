"""Warnings point at the caller's code."""

from __future__ import annotations

import warnings

from simomerge.checkpoints.experts import warn_of_unrecorded_base
from simomerge.core.caution import Caution, warn


def test_a_warning_names_the_line_outside_of_simomerge() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn("here")
        warn_of_unrecorded_base("depth", 0.0)
        warn_of_unrecorded_base("depth", 0.0003)
    assert [each.filename for each in caught] == [__file__] * 3
    assert [each.lineno for each in caught] == list(range(caught[0].lineno, caught[0].lineno + 3))
    assert all(issubclass(each.category, Caution) for each in caught)
    assert str(caught[1].message).endswith("differ from the given one by nothing: they are equal.")
    assert "by 0.03% of their norm: plausible" in str(caught[2].message)
