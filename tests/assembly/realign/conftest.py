"""A merged-like model of two tasks, its experts and a few labelled rooms; float32 as in the tests of training."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from simomerge.datasets import DenseDataset, load_data
from simomerge.models.model import SimoModel

from .contract import IMAGES


@pytest.fixture(autouse=True)
def always_float32(float32: None) -> None:
    """Every test here computes in float32."""


@pytest.fixture(scope="session")
def rooms() -> DenseDataset:
    return load_data("rooms", split="val", count=IMAGES, size=(24, 32))


@pytest.fixture(scope="session")
def odd_rooms() -> DenseDataset:
    """Rooms whose height and width are no multiples of the patch."""
    return load_data("rooms", split="val", count=IMAGES, size=(21, 30))


@pytest.fixture
def base(make_model: Callable[..., SimoModel]) -> SimoModel:
    """The foundation encoder, without heads."""
    return make_model([])


@pytest.fixture
def merged(make_model: Callable[..., SimoModel], rooms: DenseDataset) -> SimoModel:
    model = make_model(rooms.select(["depth", "segmentation"]).tasks)
    model.provenance = {"merge": {"method": "average"}}
    return model


@pytest.fixture
def experts(make_model: Callable[..., SimoModel], merged: SimoModel) -> dict[str, SimoModel]:
    found = {}
    for seed, (name, task) in enumerate(merged.tasks.items(), 1):
        found[name] = make_model([task])
        found[name].heads[name] = copy.deepcopy(merged.heads[name])
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in found[name].encoder.backbone.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return found
