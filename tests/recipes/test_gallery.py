"""Colours of the gallery: a prediction has the colour range of the ground truth."""

from __future__ import annotations

import numpy as np
import pytest

from simomerge.datasets.colours import colourise
from simomerge.datasets.tasks import Task
from simomerge.recipes.results import _limits


@pytest.mark.parametrize("kind", ["depth", "disparity", "regression"])
def test_values_above_one_are_told_apart(kind: str) -> None:
    truth = np.array([[[5.0, 20.0, 60.0]]], np.float32)
    task = Task("map", kind)
    limits = _limits(task, truth)
    shown, model = (colourise(task, values, limits) for values in (truth, truth[..., ::-1]))
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) == 3
    assert (model == shown[:, ::-1]).all()
