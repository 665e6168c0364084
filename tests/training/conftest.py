"""Small rooms, and float32: comparisons to the last bit must not depend on what the machine computes with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from simomerge import devices
from simomerge.datasets import DenseDataset, load_data
from simomerge.training import loop


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
    return load_data("rooms", split="train", count=12, size=(24, 32))
