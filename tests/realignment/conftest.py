"""A merged-like model of two tasks and a few labelled rooms; float32 as in the tests of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from simomerge import devices
from simomerge.datasets import DenseDataset, load_data
from simomerge.model import SimoModel
from simomerge.training import TrainSettings, loop

SETTINGS = TrainSettings(steps=6, batch_size=4, lr=1e-2, seed=1)


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from accelerate.state import AcceleratorState

    monkeypatch.setattr(devices, "mixed_precision", lambda device=None: "no")
    monkeypatch.setattr(loop, "mixed_precision", lambda device=None: "no")
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the precision it was made with
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def rooms() -> DenseDataset:
    return load_data("rooms", split="val", count=8, size=(24, 32))


@pytest.fixture
def merged(make_model: Callable[..., SimoModel], rooms: DenseDataset) -> SimoModel:
    model = make_model(rooms.select(["depth", "segmentation"]).tasks)
    model.provenance = {"merge": {"method": "average"}}
    return model
