"""One micro run, made once: two tasks, six steps, sixteen images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from simomerge.recipes.recipe import Recipe
from simomerge.recipes.run import run_recipe
from simomerge.training import cluster
from simomerge.training.pool import WorkerPool
from simomerge.training.settings import TrainSettings

SHORT = TrainSettings(steps=6, batch_size=4, lr=5e-3)
STEPS = {"steps": 6, "batch_size": 4, "lr": 5e-3}
MICRO = Recipe(
    tasks=("depth", "normals"),
    train_images=16,
    val_images=6,
    test_images=5,
    probe=SHORT,
    tune=SHORT,
    joint=SHORT,
    realign={"heads": STEPS, "adapters": {**STEPS, "rank": 2}},
    merges=("average", "task-arithmetic"),
    realigned=("task-arithmetic+heads", "average+adapters"),
    gallery=("experts", "task-arithmetic", "task-arithmetic+heads"),
)


def on(recipe: Recipe, base: Path) -> Recipe:
    """The recipe with another base."""
    return replace(recipe, base=str(base))


@dataclass
class Finished:
    """A run folder, what it returned and the stages that were done for it."""

    folder: Path
    results: dict[str, Any]
    stages: list[str] = field(default_factory=list)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the stages that are done from here on."""
    names: list[str] = []
    record(monkeypatch, names)
    yield names


def record(patch: pytest.MonkeyPatch, names: list[str]) -> None:
    class Recording(WorkerPool):
        def run(self, jobs: Sequence[Any], *more: Any) -> list[Any]:
            return super().run([(recorded(function), arguments) for function, arguments in jobs], *more)

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            names.append(arguments["stage"].name)
            return function(**arguments)

        return call

    patch.setattr(cluster, "WorkerPool", Recording)


@pytest.fixture(scope="session")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The micro run, done in this process. Do not write into it."""
    folder, names = tmp_path_factory.mktemp("run") / "micro", []
    with pytest.MonkeyPatch.context() as patch:
        record(patch, names)
        results = run_recipe(on(MICRO, tiny_base), folder, workers=1)
    return Finished(folder, results, names)
