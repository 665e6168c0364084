"""What a model records about its training images, and how other images compare with them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from simomerge.datasets import DenseDataset
from simomerge.datasets.tasks import Task
from simomerge.models.encoders import Features
from simomerge.models.model import SimoModel
from simomerge.training.familiarity import DIRECTIONS, familiarity, sketch, training_images


class Pictures(DenseDataset):
    """Smooth random pictures, moved and scaled."""

    def __init__(self, count: int, seed: int, mean: float = 0.5, spread: float = 0.2) -> None:
        super().__init__({"depth": Task("depth")}, count)
        coarse = np.random.default_rng(seed).normal(mean, spread, (count, 3, 3, 4)).astype(np.float32)
        self.pictures = torch.from_numpy(coarse.repeat(8, 2).repeat(8, 3)).clamp(0, 1)

    def image(self, index: int) -> Tensor:
        return self.pictures[index]

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        return {task: pytest.fail("read a label") for task in tasks}


def features_of(values: Tensor) -> Features:
    """Features with one tap of constant maps."""
    return Features((values[:, :, None, None].expand(-1, -1, 2, 3),), (), (8, 8), (8, 8))


def test_a_sketch_nearly_keeps_distances() -> None:
    values = torch.randn(40, 384, generator=torch.Generator().manual_seed(0))
    found = sketch(features_of(values))
    assert found.shape == (40, DIRECTIONS) and found.dtype == torch.float64
    ratio = torch.cdist(found, found)[0, 1:] / torch.cdist(values.double(), values.double())[0, 1:]
    assert 0.7 < float((ratio / math.sqrt(DIRECTIONS / 384)).mean()) < 1.3
    assert torch.allclose(sketch(features_of(2 * values[:3])), 2 * found[:3])


def test_shift_and_spread_are_those_of_the_sketches() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(DIRECTIONS, generator=generator), torch.rand(DIRECTIONS, generator=generator) + 0.5
    record = {"mean": mean.tolist(), "std": std.tolist()}
    other = torch.randn(50, DIRECTIONS, generator=generator, dtype=torch.float64)
    found = familiarity(record, other)
    assert found is not None
    shift, spread = (other.numpy().mean(0) - mean.numpy()) / std.numpy(), other.numpy().std(0) / std.numpy()
    assert found.shift == pytest.approx(np.sqrt(np.mean(shift**2)), rel=1e-6)
    assert found.spread == pytest.approx(np.sqrt(np.mean(spread**2)), rel=1e-6)


def test_the_record_tells_like_from_unlike(make_model: Callable[..., SimoModel]) -> None:
    model = make_model([Task("depth")])
    record = json.loads(json.dumps(training_images(model, Pictures(64, 0))))
    assert record["images"] == 64 and record["size"] == [24, 32]

    def compared(pictures: Pictures) -> tuple[float, float]:
        with torch.no_grad():
            found = familiarity(record["features"], sketch(model.encode(pictures.pictures)))
        assert found is not None
        return found.shift, found.spread

    shift, spread = compared(Pictures(64, 1))
    assert shift < 0.5 and 0.7 < spread < 1.4
    assert compared(Pictures(64, 2, mean=0.95, spread=0.02))[0] > 1.5
    alike = Pictures(64, 3)
    alike.pictures = alike.pictures[:1] + 0.01 * (alike.pictures - 0.5)
    assert compared(alike)[1] < 0.2


@pytest.mark.parametrize("record", [{}, {"mean": [1.0]}, {"mean": [1.0], "std": [1.0]}, {"mean": "a", "std": None}])
def test_a_record_of_another_form_says_nothing(record: dict[str, object]) -> None:
    assert familiarity(record, torch.zeros(3, DIRECTIONS, dtype=torch.float64)) is None  # type: ignore[arg-type]
