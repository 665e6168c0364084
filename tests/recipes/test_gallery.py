"""Colours of the gallery: a prediction has the colour range of the ground truth."""

from __future__ import annotations

import numpy as np
import pytest

from simomerge.datasets.tasks import Task
from simomerge.recipes.results import _coloured


@pytest.mark.parametrize("kind", ["depth", "disparity", "regression"])
def test_values_above_one_are_told_apart(kind: str) -> None:
    truth = np.array([[[5.0, 20.0, 60.0]]], np.float32)
    found = _coloured(Task("map", kind), truth, {"model": truth[..., ::-1]})
    assert len(np.unique(found["truth"].reshape(-1, 3), axis=0)) == 3
    assert (found["model"] == found["truth"][:, ::-1]).all()
