"""The model that a run recommends: which one, on which images, and what its folder holds."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from simomerge.core.errors import InputError
from simomerge.datasets.load import data_name
from simomerge.datasets.tasks import Task
from simomerge.models.model import SimoModel, load
from simomerge.recipes import shipping
from simomerge.recipes.plan import Plan
from simomerge.recipes.recipe import Recipe
from simomerge.recipes.run import run_recipe
from simomerge.recipes.shipping import Choice, choose, expert_folders

from .conftest import MICRO, Finished, on

TASKS = {"depth": Task("depth")}


def plan_of(**changes: Any) -> Plan:
    recipe = replace(Recipe(), **changes)
    splits = {split: {"spec": "rooms", "split": split, "count": 8} for split in ("train", "val", "test")}
    return Plan(recipe, "rooms-base", splits)


def test_candidates_are_the_rows_whose_validation_figures_are_fair() -> None:
    assert plan_of().candidates == [
        "task-arithmetic+fold",
        "task-arithmetic+fold-cross",
        "task-arithmetic+distill",
        "auto",
        "task-arithmetic+distill-encoder",
    ]
    labelled = ("task-arithmetic+heads", "zero-shot+heads", "average+adapters")
    assert plan_of(realigned=labelled).candidates == ["task-arithmetic+heads", "average+adapters"]
    assert plan_of(realigned=()).candidates == ["average", "task-arithmetic", "ties"]
    assert plan_of(realigned=("task-arithmetic+fold", *labelled)).candidates == ["task-arithmetic+fold"]


def test_the_choice_never_looks_at_the_test_split() -> None:
    plan = plan_of()
    chosen_on = {stage.data["split"] for stage in plan.choosing.values()}
    assert chosen_on == {"val"} and {stage.data["count"] for stage in plan.choosing.values()} == {128}


def fake(scores: dict[tuple[int, str], float], seeds: tuple[int, ...] = (0, 1)) -> tuple[Any, Any]:
    """A plan of rows with these depth errors on validation images; the experts' error is 1."""
    rows = list(dict.fromkeys(row for _, row in scores))
    plan = SimpleNamespace(
        recipe=SimpleNamespace(seeds=seeds),
        candidates=rows,
        choosing=scores,
        choosing_experts={seed: {"depth": 1.0} for seed in seeds},
    )
    return plan, SimpleNamespace(log=lambda error: {"scores": {"depth": {"abs_err": error}}})


def test_the_best_mean_wins_and_then_its_best_seed() -> None:
    plan, graph = fake({(0, "a"): 1.0, (1, "a"): 1.4, (0, "b"): 1.15, (1, "b"): 1.1})
    found = choose(plan, graph, TASKS)
    assert found is not None and (found.row, found.seed) == ("b", 1)
    assert found.deltas == {"a": pytest.approx(-20.0), "b": pytest.approx(-12.5)}


def test_a_row_or_a_seed_that_cannot_be_measured_is_never_the_best() -> None:
    nan = math.nan
    plan, graph = fake({(0, "a"): nan, (1, "a"): nan, (0, "b"): 1.2, (1, "b"): 1.1, (0, "c"): 1.0, (1, "c"): nan})
    found = choose(plan, graph, TASKS)
    assert found is not None and (found.row, found.seed) == ("b", 1) and math.isnan(found.deltas["a"])
    plan, graph = fake({(0, "a"): nan, (1, "a"): 1.0, (0, "b"): nan, (1, "b"): 1.0})
    found = choose(plan, graph, TASKS)
    assert found is not None and (found.row, found.seed) == ("a", 1)


def test_the_experts_are_those_of_the_chosen_seed() -> None:
    plan: Any = SimpleNamespace(
        recipe=SimpleNamespace(seeds=(10, 2)), experts={seed: {"depth": f"depth-{seed}"} for seed in (10, 2)}
    )
    graph: Any = SimpleNamespace(folder=Path("run"), output=lambda stage: Path("run/stages", f"{stage}-hash"))
    assert expert_folders(plan, graph, Choice("a", 2, {})) == {"depth": "stages/depth-2-hash/model"}
    assert expert_folders(plan, graph, None) == {"depth": "stages/depth-10-hash/model"}


def test_a_run_names_the_experts_of_its_model(finished: Finished) -> None:
    experts = finished.results["experts"]
    assert list(experts) == list(MICRO.tasks)
    sizes = 0
    for task, place in experts.items():
        assert list(load(finished.folder / place).tasks) == [task]
        sizes += shipping._size(finished.folder / place)
    assert sizes == finished.results["model"]["experts_bytes"]


def test_without_a_merge_nothing_is_recommended() -> None:
    plan, graph = fake({})
    assert choose(plan, graph, TASKS) is None


def test_the_folder_holds_a_complete_model_with_its_figures_and_a_picture(finished: Finished) -> None:
    entry = finished.results["model"]
    assert entry["row"] in MICRO.realigned and set(entry["candidates"]) == set(MICRO.realigned)
    assert entry["row"] == max(entry["candidates"], key=entry["candidates"].get)
    folder = finished.folder / "model"
    model, row = load(folder), next(r for r in finished.results["rows"] if r["method"] == entry["row"])
    assert model.evaluation["delta_mtl"] == pytest.approx(row["delta_mtl"]["mean"])
    assert {each["task"]: each["value"] for each in model.evaluation["metrics"]} == {
        task: pytest.approx(row["metrics"][task]["mean"]) for task in MICRO.tasks
    }
    assert "![An image" in (folder / "README.md").read_text() and (folder / "picture.png").is_file()
    (stage,) = (finished.folder / "stages").glob(f"{entry['row']}-seed-0-*")
    stored = stage / "model" / "encoder" / "model.safetensors"
    assert stored.samefile(folder / "encoder" / "model.safetensors")  # no second copy on the disk
    image = np.zeros((16, 24, 3), np.uint8)
    ours, theirs = model.predict(image), load(stage / "model").predict(image)
    assert all(np.array_equal(ours[task], theirs[task]) for task in MICRO.tasks)
    assert entry["bytes"] < entry["experts_bytes"] and 0 < entry["milliseconds"] < entry["experts_milliseconds"] * 10


def test_where_hard_links_are_impossible_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("weights")
    monkeypatch.setattr(shipping.os, "link", lambda *paths: (_ for _ in ()).throw(OSError("no links")))
    shipping._link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "weights" and not (tmp_path / "a").samefile(tmp_path / "b")


def test_a_folder_of_somebody_else_is_not_replaced(finished: Finished, tiny_base: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    (copied / "model" / "notes.txt").write_text("mine")
    before = json.loads((copied / "results.json").read_text())
    with pytest.raises(InputError, match=r"model holds 'notes\.txt', which simomerge did not write"):
        run_recipe(on(MICRO, tiny_base), copied, workers=1)
    assert json.loads((copied / "results.json").read_text()) == before


@pytest.mark.parametrize("kind", ["transformers", "simomerge"])
def test_the_folder_of_a_model_is_no_run_folder(
    kind: str, tiny_base: Path, make_model: Callable[..., SimoModel], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    if kind == "transformers":
        shutil.copytree(tiny_base, folder)
    else:
        make_model({}).save_pretrained(folder)
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    with pytest.raises(InputError, match="is the folder of a model; give a run a folder of its own"):
        run_recipe(on(MICRO, tiny_base), folder, workers=1)
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("spec", "name"),
    [("rooms", "rooms"), ("nyuv2:/data/x", "nyuv2"), ("/me/robot/data.yaml", "robot"), ("/me/robot", "robot")],
)
def test_a_dataset_is_named_without_its_place(spec: str, name: str) -> None:
    assert data_name(spec) == name
