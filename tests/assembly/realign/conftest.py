"""A merged-like model of two tasks and a few labelled rooms; float32 as in the tests of training."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from simomerge.datasets import DenseDataset, load_data
from simomerge.models.model import SimoModel
from simomerge.training.settings import TrainSettings

SETTINGS = TrainSettings(steps=6, batch_size=4, lr=1e-2, seed=1)


@pytest.fixture(autouse=True)
def always_float32(float32: None) -> None:
    """Every test here computes in float32."""


@pytest.fixture(scope="session")
def rooms() -> DenseDataset:
    return load_data("rooms", split="val", count=8, size=(24, 32))


@pytest.fixture
def merged(make_model: Callable[..., SimoModel], rooms: DenseDataset) -> SimoModel:
    model = make_model(rooms.select(["depth", "segmentation"]).tasks)
    model.provenance = {"merge": {"method": "average"}}
    return model
