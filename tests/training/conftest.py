"""Small rooms, in float32, because bit-identical results must not depend on the hardware."""

from __future__ import annotations

import pytest

from simomerge.datasets import DenseDataset, load_data


@pytest.fixture(autouse=True)
def always_float32(float32: None) -> None:
    """Every test here computes in float32."""


@pytest.fixture(scope="session")
def rooms() -> DenseDataset:
    return load_data("rooms", split="train", count=12, size=(24, 32))
