"""Three tiny experts with random changes to their weights, and random images with labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from simomerge.datasets import DenseDataset
from simomerge.datasets.tasks import Task
from simomerge.models.model import SimoModel
from simomerge.relations import Judge

TASKS = {
    "depth": Task("depth"),
    "parts": Task("parts", "segmentation", classes=("a", "b", "c")),
    "normals": Task("normals"),
}


class RandomDataset(DenseDataset):
    """Coarse random images with random labels."""

    def __init__(self, count: int = 16) -> None:
        super().__init__(TASKS, count)
        rng = np.random.default_rng(0)
        coarse = rng.random((count, 3, 4, 4)).astype(np.float32)
        self.pictures = torch.from_numpy(coarse.repeat(6, 2).repeat(8, 3))
        size = (count, 24, 32)
        normals = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(count, 3, 24, 32))).float(), dim=1)
        self.truth = {
            "depth": torch.from_numpy(rng.uniform(1, 2, (count, 1, 24, 32))).float(),
            "parts": torch.from_numpy(rng.integers(0, 3, size)),
            "normals": normals,
        }

    def image(self, index: int) -> Tensor:
        return self.pictures[index].clone()

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        return {task: self.truth[task][index] for task in tasks}


@pytest.fixture(scope="package")
def dataset() -> RandomDataset:
    return RandomDataset()


@pytest.fixture(scope="package")
def base(make_model: Callable[..., SimoModel]) -> SimoModel:
    model = make_model({})
    model.source = "the-base"
    return model


@pytest.fixture(scope="package")
def experts(
    make_model: Callable[..., SimoModel], nudged: Callable[..., torch.Generator], base: SimoModel
) -> dict[str, SimoModel]:
    """By task; do not change them."""
    found = {}
    for seed, (name, task) in enumerate(TASKS.items(), start=1):
        expert = make_model({name: task}, seed=seed)
        generator = nudged(expert, seed, 0.05)
        with torch.no_grad():
            for parameter in expert.heads.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            if name == "depth":
                list(expert.heads.parameters())[-1].fill_(5.0)  # the bias: depths are above zero
        expert.provenance = {"base": {"fingerprint": base.encoder_fingerprint(), "source": "the-base"}}
        found[name] = expert
    return found


@pytest.fixture
def judge(experts: dict[str, SimoModel], dataset: RandomDataset, float32: None) -> Judge:
    """Without labels."""
    return Judge(experts, dataset, labelled=False)
