"""Two experts of the tiny base, a base and rooms-like pictures for the playground."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from simomerge.datasets.tasks import Task
from simomerge.models.model import load
from simomerge.playground.opening import Opened

TASKS = {"depth": Task("depth"), "parts": Task("parts", "segmentation", classes=("wall", "floor", "<b>rug</b>"))}


@pytest.fixture(scope="session")
def opened(tiny_base: Any, make_model: Any, nudged: Callable[..., Any]) -> Opened:
    """A base and two experts, which differ from it by noise and record it."""
    base = load(tiny_base)
    experts = {}
    for seed, (name, task) in enumerate(TASKS.items()):
        experts[name] = make_model({name: task}, seed=seed)
        nudged(experts[name], seed, 0.02)
        with torch.no_grad():  # depths of some metres, not all at the smallest one
            experts[name].heads[name].output.weight.mul_(5)
            experts[name].heads[name].output.bias.fill_(4 if name == "depth" else 0)
        experts[name].provenance = {"base": base.origin(), "training": {"size": [32, 40]}}
    return Opened("two experts", base, experts)


@pytest.fixture(scope="session")
def pictures() -> list[np.ndarray]:
    """Twelve smooth pictures with different contents, uint8 (32, 40, 3)."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (12, 4, 5, 3), dtype=np.uint8)
    return list(np.kron(coarse, np.ones((1, 8, 8, 1), np.uint8)))
