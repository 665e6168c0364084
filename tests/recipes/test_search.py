"""A search: what it varies, what judges, that it goes on, and that it never looks at the test split."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simomerge.cli import cli
from simomerge.core.errors import DivergedError, InputError
from simomerge.datasets import load_data
from simomerge.models.model import load
from simomerge.recipes import search
from simomerge.recipes.file import read_recipe
from simomerge.recipes.recipe import Recipe
from simomerge.recipes.search import search_recipe
from simomerge.recipes.space import SearchSettings, suggest
from simomerge.training.evaluate import delta_mtl, evaluate
from simomerge.training.pool import WorkerPool
from simomerge.training.run_folder import RunFolder
from simomerge.training.settings import TrainSettings

RECIPE = """
base: {base}
tasks: [depth, normals]
train_images: 8
val_images: 10
test_images: 4
probe: {{steps: 2, batch_size: 4}}
tune: {{steps: 2, batch_size: 4}}
joint: {{steps: 2, batch_size: 4}}
realign: {{heads: {{steps: 2, batch_size: 4}}}}
merges: [average, ties]
realigned: [average+heads]
search:
  row: average+heads
  images: 4
  trials: 3
  space:
    realign.heads.lr: {{low: 1e-5, high: 1e-2, log: true}}
    realign.heads.steps: {{low: 1, high: 3}}
"""


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(RECIPE.format(base=tiny_base))
    return file


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The trials' recipes as plain data. Their Delta_MTL is 10 times realign.heads.lr; nothing is trained."""
    found: list[dict[str, Any]] = []

    def fake(recipe: Any, *_: Any, **__: Any) -> list[float]:
        found.append(recipe.to_dict())
        return [10 * recipe.realign["heads"]["lr"]] * len(recipe.seeds)

    monkeypatch.setattr(search, "held_out_delta", fake)
    yield found


def test_a_row_is_judged_on_validation_images_that_realign_nothing(recipe: Path, tmp_path: Path) -> None:
    found = search_recipe(recipe, tmp_path / "out", seed=0, workers=1)
    assert found == json.loads((tmp_path / "out" / "search.json").read_text())
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 3 and found["row"] == "average+heads"
    values = [trial["delta_mtl"] for trial in found["trials"]]
    assert values == sorted(values, reverse=True)
    best = found["trials"][0]

    stages = tmp_path / "out" / "stages"
    assert not list(stages.glob("score-*test*")) and len(list(stages.glob("expert-depth-*"))) == 1
    experts = {task: load(next(stages.glob(f"expert-{task}-*")) / "model") for task in ("depth", "normals")}
    judges = load_data("rooms", "val", 4, ("depth", "normals"), skip=6)
    baseline = {task: evaluate(expert, judges)[task] for task, expert in experts.items()}
    deltas = {}
    for folder in stages.glob("average+heads-*"):
        model = load(folder / "model")
        assert model.provenance["realign"]["labelled_images"] == 6
        settings = model.provenance["realign"]
        deltas[settings["lr"], settings["steps"] // 2] = delta_mtl(evaluate(model, judges), baseline, model.tasks)
    assert deltas[best["values"]["realign.heads.lr"], best["values"]["realign.heads.steps"]] == pytest.approx(
        best["delta_mtl"]
    )
    assert max(deltas.values()) == pytest.approx(best["delta_mtl"])


def test_a_study_goes_on_until_it_has_its_trials(recipe: Path, tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    search_recipe(recipe, tmp_path / "a", workers=1)
    assert len(asked) == 3
    search_recipe(recipe, tmp_path / "a", workers=1)
    assert len(asked) == 3
    search_recipe(recipe, tmp_path / "a", ["search.trials=5"], workers=1)
    assert len(asked) == 5
    # Another machine: a folder of its own, the same storage.
    found = search_recipe(
        recipe, tmp_path / "b", ["search.trials=6"], storage=str(tmp_path / "a" / "search.log"), workers=1
    )
    assert len(asked) == 6 and len(found["trials"]) == 6
    assert found["trials"][0]["delta_mtl"] == 10 * max(each["realign"]["heads"]["lr"] for each in asked)
    assert all(
        1e-5 <= each["realign"]["heads"]["lr"] <= 1e-2 and each["realign"]["heads"]["steps"] in (1, 2, 3)
        for each in asked
    )


def test_a_tilde_is_the_home_folder_in_output_and_storage(
    recipe: Path, tmp_path: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    folder = RunFolder.of(read_recipe(recipe, ["output=~/runs/x"]).output)
    assert folder.path == home / "runs" / "x" and folder.shown("model") == f"{home}/runs/x/model"
    search_recipe(recipe, folder, storage="~/study.log", workers=1)
    assert sorted(path.name for path in home.iterdir()) == ["runs", "study.log"] and not list(here.iterdir())


def test_a_trial_that_diverges_is_no_error_but_nothing_else_is_swallowed(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sometimes(recipe: Any, *_: Any, **__: Any) -> list[float]:
        if recipe.realign["heads"]["steps"] > 1:
            raise DivergedError("heads: the loss is nan")
        return [-1.0]

    monkeypatch.setattr(search, "held_out_delta", sometimes)
    changes = ["search.trials=8", "search.space.realign.heads.steps={choices: [1, 2]}"]
    found = search_recipe(recipe, tmp_path / "a", changes, seed=0, workers=1)
    assert {trial["state"] for trial in found["trials"]} == {"complete", "pruned"}
    assert found["trials"][0]["delta_mtl"] == -1.0 and found["trials"][-1]["delta_mtl"] is None
    with pytest.raises(InputError, match="none of 2 trials was completed"):
        search_recipe(
            recipe, tmp_path / "b", ["search.trials=2", "search.space.realign.heads.steps={choices: [2]}"], workers=1
        )

    def broken(*_: Any, **__: Any) -> list[float]:
        raise InputError("the disk is full")

    monkeypatch.setattr(search, "held_out_delta", broken)
    with pytest.raises(InputError, match="the disk is full"):
        search_recipe(recipe, tmp_path / "c", workers=1)


def test_a_trial_without_finite_metrics_counts_and_ends(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([float("nan"), float("inf"), -2.0])
    monkeypatch.setattr(search, "held_out_delta", lambda *_, **__: [next(values)])
    found = search_recipe(recipe, tmp_path / "a", workers=1)
    assert [trial["state"] for trial in found["trials"]] == ["complete", "pruned", "pruned"]


def test_another_recipe_is_another_study(recipe: Path, tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    search_recipe(recipe, tmp_path / "a", workers=1)
    search_recipe(recipe, tmp_path / "a", ["tune.steps=3"], workers=1)
    search_recipe(recipe, tmp_path / "a", ["search.space.realign.heads.steps={choices: [1, 2]}"], workers=1)
    assert len(asked) == 9


def test_other_labels_or_another_base_are_another_study_and_moved_ones_are_not(
    tiny_base: Path, recipe: Path, tmp_path: Path, asked: list[dict[str, Any]]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = ["image,split,depth"]
    for index in range(6):
        noise = np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(data / f"{index}.png")
        np.save(data / f"{index}.npy", np.full((16, 16), 1 + index, np.float32))
        rows += [f"{index}.png,{split},{index}.npy" for split in ("train", "val")]  # a search needs no test split
    (data / "data.csv").write_text("\n".join(rows))
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))

    def trials(data: Path, base: Path) -> int:
        before = len(asked)
        given = [f"data={data / 'data.csv'}", f"base={base}", "tasks=[depth]", "search.images=2"]
        given += ["train_images=6", "val_images=6"]
        search_recipe(recipe, tmp_path / "a", given, workers=1)
        return len(asked) - before

    assert trials(data, base) == 3
    assert trials(data, base) == 0
    assert trials(Path(shutil.copytree(data, tmp_path / "moved")), tiny_base) == 0
    np.save(data / "3.npy", np.full((16, 16), 9, np.float32))
    assert trials(data, base) == 3
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**content, "layer_norm_eps": 1e-2}))
    assert trials(data, base) == 3


def test_a_seed_does_not_begin_again(recipe: Path, tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    for name in ("a", "b"):
        search_recipe(recipe, tmp_path / name, ["search.trials=2"], seed=3, workers=1)
        search_recipe(recipe, tmp_path / name, ["search.trials=4"], seed=3, workers=1)
    rates = [each["realign"]["heads"]["lr"] for each in asked]
    assert rates[:4] == rates[4:] and len(set(rates[:4])) == 4


def test_every_choice_and_the_storage_are_looked_at_first(
    recipe: Path, tmp_path: Path, asked: list[dict[str, Any]]
) -> None:
    with pytest.raises(InputError, match="unknown head 'dtp'"):
        search_recipe(recipe, tmp_path / "a", ["search.space.head={choices: [linear, dtp]}"], workers=1)
    for storage in ("nosuchdb://a/b", str(tmp_path)):
        with pytest.raises(InputError, match=r"storage .*cannot be used"):
            search_recipe(recipe, tmp_path / "a", storage=storage, workers=1)
    assert asked == []


def test_where_fewer_images_are_there_the_judges_are_others_all_the_same(tiny_base: Path, tmp_path: Path) -> None:
    rows = ["image,split,depth"]
    for index in range(6):
        noise = np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{index}.png")
        np.save(tmp_path / f"{index}.npy", np.full((16, 16), 1 + index, np.float32))
        rows += [f"{index}.png,{split},{index}.npy" for split in ("train", "val", "test")]
    (tmp_path / "data.csv").write_text("\n".join(rows))
    data, short = str(tmp_path / "data.csv"), TrainSettings(steps=1, batch_size=2)
    trainings = {"probe": short, "tune": short, "joint": short}
    recipe = Recipe(tasks=("depth",), **trainings, merges=("average",), realigned=(), base=str(tiny_base), data=data)
    with WorkerPool(1) as pool:
        assert len(search.held_out_delta(recipe, "average", 2, tmp_path / "run", pool)) == 1
        with pytest.raises(InputError, match=r"search.images is 6, but the validation split has 6 images"):
            search.held_out_delta(recipe, "average", 6, tmp_path / "run", pool)
    (score,) = (tmp_path / "run" / "stages").glob("score-average-seed-0-*")
    model = load(next((tmp_path / "run" / "stages").glob("average-seed-0-*")) / "model")
    judged = evaluate(model, load_data(data, "val", 2, skip=4))["depth"]["abs_err"]
    assert json.loads((score / "log.json").read_text())["scores"]["depth"]["abs_err"] == pytest.approx(judged)


def test_a_search_by_method_parameters_reaches_the_merge(recipe: Path, tmp_path: Path) -> None:
    chosen = read_recipe(recipe, values={"merge_settings.ties.density": 0.3, "merge_settings.ties.scale": 0.5})
    assert chosen.merge_settings == {"ties": {"density": 0.3, "scale": 0.5}}
    with WorkerPool(1) as pool:
        search.held_out_delta(chosen, "ties", 4, tmp_path / "run", pool)
    (merged,) = (tmp_path / "run" / "stages").glob("ties-seed-0-*")
    assert json.loads((merged / "log.json").read_text())["labelled_images"] == 0  # the scale was given
    record = load(merged / "model").provenance["merge"]
    assert (record["method"], record["density"], record["scale"]) == ("ties", 0.3, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["search.row=ties+heads"], "'ties\\+heads' is not a row of the recipe; it has joint-mtl, average, ties"),
        (["search.space.val_images={low: 2, high: 9}"], "'val_images' cannot be searched"),
        (["search.space.data={choices: [rooms, mine.csv]}"], "'data' cannot be searched"),
        (["search.images=10"], "search.images is 10; give how many of the 10 val_images evaluate"),
        (["search.space={}"], "nothing to search"),
        (["search.space.head.lr={low: 1, high: 2}"], "'head' is not a mapping|head is \\{"),
        (["search.space.realign.heads.lrr={low: 1, high: 2}"], "no parameter 'lrr': did you mean 'lr'"),
        (["search.space.merge_settings.ties.density={low: 0.5, high: 1.5}"], "density"),
        (
            ["search.space.realign.adapters.rank={low: 8, high: 4}"],
            "'realign.adapters.rank' goes from 8 to 4; give low < high",
        ),
        (["search.space.realign.adapters.rank={low: 0, high: 4, log: true}"], "true only where low is above 0"),
        (["search.space.realign.adapters.rank={min: 0}"], "unknown key 'min'"),
        (["search.space.realign.adapters.rank=3"], "'realign.adapters.rank' is 3; give"),
        (["search.space.head={choices: []}"], "needs a list of choices"),
        (["search.trials=0"], "trials=0; use at least 1"),
    ],
)
def test_what_cannot_be_searched_is_told_before_any_trial(
    recipe: Path, tmp_path: Path, asked: list[dict[str, Any]], changes: list[str], message: str
) -> None:
    # A dot in a key of the space is part of that key.
    with pytest.raises(InputError, match=message):
        search_recipe(recipe, tmp_path / "out", changes, workers=1)
    assert asked == [] and not (tmp_path / "out").exists()


def test_values_are_drawn_within_their_ranges() -> None:
    space = SearchSettings("r", 1, 1, {"a": {"low": "1e-4", "high": 1}, "b": {"low": 2, "high": 8}}).space

    class Trial:
        def suggest_float(self, key: str, low: float, high: float, log: bool) -> Any:
            return ("float", key, low, high, log)

        def suggest_int(self, key: str, low: int, high: int, log: bool) -> Any:
            return ("int", key, low, high, log)

    assert suggest(Trial(), space) == {"a": ("float", "a", 1e-4, 1, False), "b": ("int", "b", 2, 8, False)}


def test_the_command_says_the_best_and_how_to_run_it(
    recipe: Path, tmp_path: Path, asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--set", "tune.lr=1e-4", "-o", str(tmp_path / "out"), "--workers", "1"]
    cli.main(["search", str(recipe), *given], standalone_mode=False)
    out = capsys.readouterr().out
    best = json.loads((tmp_path / "out" / "search.json").read_text())["trials"][0]["values"]
    assert (
        f"simomerge run {recipe} --set tune.lr=1e-4 --set realign.heads.lr={json.dumps(best['realign.heads.lr'])}"
        in out
        and "3 trials" in out
    )


@pytest.mark.parametrize("at_once", [1, 3])
def test_an_error_of_a_trial_ends_the_search(
    at_once: int, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna itself loses the errors of the last trials at the same time."""

    def fails(*_: Any) -> list[float]:
        raise InputError("no room on the disk")

    @contextmanager
    def pool(*_: Any) -> Iterator[Any]:
        yield SimpleNamespace(slots=at_once)

    monkeypatch.setattr(search, "held_out_delta", fails)
    monkeypatch.setattr(search, "pool_of", pool)
    file = tmp_path / "mine.yaml"
    file.write_text(RECIPE.format(base=tiny_base))
    with pytest.raises(InputError, match="no room on the disk"):
        search_recipe(file, tmp_path / "run", ["search.trials=3"])
