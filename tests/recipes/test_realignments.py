"""Every re-alignment as a step of a recipe, right after a merge and after another step."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simomerge.assembly.realign import realignments
from simomerge.assembly.realign.method import TrainedRealignment
from simomerge.models.model import load
from simomerge.recipes.run import run_recipe

from .conftest import MICRO, on

METHODS = realignments()
TRAINED = [name for name, method in METHODS.items() if isinstance(method, TrainedRealignment)]
FIRST = {name: f"average+{name}" for name in METHODS}
AFTER_A_FOLD = {name: f"average+fold+{name}" for name, method in METHODS.items() if not method.needs_plain_heads}
STEPS, FEWER = {"steps": 3, "batch_size": 4, "lr": 5e-4}, {"steps": 2, "lr": 4e-4}
RECIPE = replace(
    MICRO,
    data_options={"size": [32, 40]},
    val_images=8,
    merges=("average",),
    realigned=(*FIRST.values(), *AFTER_A_FOLD.values()),
    realign={**dict.fromkeys(TRAINED, STEPS), **{name: {"count": 4} for name in ("fold", "fold-cross", "calibrate")}},
    refine=dict.fromkeys(TRAINED, FEWER),
    gallery=("experts",),
)
pytestmark = pytest.mark.filterwarnings("ignore:.*the fold stays close to the unfolded head:UserWarning")


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The run folder, and the results by row."""
    folder = tmp_path_factory.mktemp("realignments")
    results = run_recipe(on(RECIPE, tiny_base), folder, workers=1)
    return folder, {row["method"]: row for row in results["rows"]}


def record_of(folder: Path, row: str) -> dict[str, Any]:
    (stage,) = folder.glob(f"stages/{row}-seed-0-*")
    record: dict[str, Any] = load(stage / "model").provenance["realign"]
    return record


def trainings(name: str) -> int:
    """How often a re-alignment trains: once, per head, or per block."""
    return len(MICRO.tasks) if METHODS[name].trains_heads_apart else {"prodistill": 4}.get(name, 1)


@pytest.mark.parametrize("name", METHODS)
def test_it_follows_a_merge(run: tuple[Path, dict[str, dict[str, Any]]], name: str) -> None:
    folder, rows = run
    method, row, record = METHODS[name], rows[FIRST[name]], record_of(folder, FIRST[name])
    assert record["method"] == method.name and math.isfinite(row["delta_mtl"]["mean"])
    assert (row["labelled_images"] == 0) == (method.teacher == "experts")
    assert (row["unlabelled_images"] == 0) == (method.teacher == "labels")
    assert row["realignment"] == [{"name": name, "phrase": method.phrase, "labels": method.teacher == "labels"}]
    assert row["trained_parameters"] == record["trained_parameters"]
    assert (record["trained_parameters"] > 0) == (name in TRAINED)
    times = trainings(name) * (2 if "lr_factor" in record else 1)  # such a training was repeated
    assert row["steps"] == record["steps"] == (STEPS["steps"] * times if name in TRAINED else 0)


@pytest.mark.parametrize("name", AFTER_A_FOLD)
def test_it_follows_a_fold_with_the_parameters_of_refine(
    run: tuple[Path, dict[str, dict[str, Any]]], name: str
) -> None:
    folder, rows = run
    record = record_of(folder, AFTER_A_FOLD[name])
    assert record["after"] == record_of(folder, FIRST["fold"])
    if name in TRAINED:
        assert record["lr"] == FEWER["lr"]
        times = trainings(name) * (2 if "lr_factor" in record else 1)
        assert record["steps"] == rows[AFTER_A_FOLD[name]]["steps"] == FEWER["steps"] * times
    assert math.isfinite(rows[AFTER_A_FOLD[name]]["delta_mtl"]["mean"])
