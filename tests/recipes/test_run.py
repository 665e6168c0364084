"""A run: its results, what a second run does again, and what is left of one that was killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from simomerge.assembly.merge import merge
from simomerge.core.errors import InputError
from simomerge.core.progress import show_progress
from simomerge.datasets import load_data
from simomerge.models.model import load
from simomerge.recipes.graph import Graph, Stage
from simomerge.recipes.recipe import Recipe
from simomerge.recipes.results import spread
from simomerge.recipes.run import plan_of, run_recipe
from simomerge.recipes.stages import LoggedStage
from simomerge.training.pool import WorkerPool
from simomerge.training.settings import TrainSettings

from .conftest import MICRO, SHORT, STEPS, Finished, on

ROWS = ["experts", "joint-mtl", *MICRO.merges, *MICRO.realigned]
STAGES = 1 + 2 + 3 + 2 + 2 + 2 + 7 + 2
"""Features, probes, tunings, val scores of experts, merges, re-alignments, test scores, val scores of candidates."""


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Path:
    """The micro run, moved to another place."""
    return Path(shutil.copytree(finished.folder, tmp_path / "elsewhere"))


def by_method(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in results["rows"]}


def deltas(results: dict[str, Any]) -> dict[str, float]:
    return {row["method"]: row["delta_mtl"]["mean"] for row in results["rows"]}


# Results ------------------------------------------------------------------------------------------------


def test_results_json_is_what_was_returned_and_has_no_nan(finished: Finished) -> None:
    text = (finished.folder / "results.json").read_text()
    stored = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in results.json"))
    returned = {key: value for key, value in finished.results.items() if key != "gallery"}
    assert stored == json.loads(json.dumps(returned))
    assert set(stored) == {
        *("format", "title", "created", "machine", "recipe", "test_images", "tasks", "rows", "realignments"),
        *("scale_curves", "notes", "model", "experts"),
        "seconds_of_this_call",
    }
    assert stored["format"] == 1 and stored["recipe"] == json.loads(json.dumps(MICRO.to_dict()))
    assert stored["tasks"] == [
        {"name": "depth", "metric": "abs_err", "unit": "m", "higher_is_better": False},
        {"name": "normals", "metric": "mean_angle", "unit": "deg", "higher_is_better": False},
    ]
    assert {"cpu", "cores", "memory_gb", "python", "torch"} <= set(stored["machine"])


def test_every_row_has_the_documented_entries(finished: Finished) -> None:
    assert [row["method"] for row in finished.results["rows"]] == ROWS
    for row in finished.results["rows"]:
        assert set(row) == {
            *(
                "method",
                "family",
                "merge",
                "realignment",
                "delta_mtl",
                "metrics",
                "normalised",
                "all_metrics",
                "encoders",
                "parameters",
            ),
            *("seconds", "steps", "trained_parameters", "labelled_images", "unlabelled_images"),
        }
        for number in (row["delta_mtl"], *row["metrics"].values(), *row["normalised"].values()):
            assert number["std"] is None and number["per_seed"] == [number["mean"]]
        assert set(row["metrics"]) == set(row["normalised"]) == set(row["all_metrics"]) == set(MICRO.tasks)


def test_delta_mtl_follows_from_the_metrics(finished: Finished) -> None:
    rows = by_method(finished.results)
    experts = rows["experts"]["metrics"]
    for method, row in rows.items():
        ratios = {task: experts[task]["mean"] / row["metrics"][task]["mean"] for task in MICRO.tasks}  # errors, both
        assert {task: row["normalised"][task]["mean"] for task in MICRO.tasks} == pytest.approx(ratios), method
        gain = [100 * (1 - row["metrics"][task]["mean"] / experts[task]["mean"]) for task in MICRO.tasks]
        assert row["delta_mtl"]["mean"] == pytest.approx(sum(gain) / 2), method
    assert rows["experts"]["delta_mtl"]["mean"] == 0


def test_costs_are_those_beyond_the_experts(finished: Finished) -> None:
    rows = by_method(finished.results)
    steps = {method: row["steps"] for method, row in rows.items()}
    assert steps == {
        "experts": 24,  # two heads probed, two experts tuned
        "joint-mtl": 18,  # the same heads, one model
        "average": 0,
        "task-arithmetic": 0,
        "task-arithmetic+heads": 12,
        "average+adapters": 6,
    }
    assert [row["encoders"] for row in rows.values()] == [2, 1, 1, 1, 1, 1]
    labelled = {method: row["labelled_images"] for method, row in rows.items()}
    assert labelled == {
        **{"experts": 16, "joint-mtl": 16, "average": 0, "task-arithmetic": 6},
        **{"task-arithmetic+heads": 6, "average+adapters": 6},
    }
    trained = {method: row["trained_parameters"] for method, row in rows.items()}
    assert trained["average"] == trained["task-arithmetic"] == 0
    heads = trained["task-arithmetic+heads"]
    assert trained["average+adapters"] == heads + 4 * 2 * 32 * 2 and trained["experts"] > trained["joint-mtl"] > heads
    assert all(row["seconds"] > 0 for row in rows.values())


def test_scale_curves_say_which_scale_was_chosen_and_why(finished: Finished) -> None:
    curves, rows = finished.results["scale_curves"], by_method(finished.results)
    assert list(curves) == ["task-arithmetic"]  # an average has no scale
    curve = curves["task-arithmetic"]
    assert curve["scales"] == [round(step / 10, 1) for step in range(11)]
    assert len(curve["delta_mtl"]["mean"]) == 11 and set(curve["normalised"]) == set(MICRO.tasks)
    best = curve["scales"][int(np.argmax(curve["delta_mtl"]["mean"]))]
    assert curve["chosen"] == [best] == rows["task-arithmetic"]["parameters"]["scale"]
    assert rows["task-arithmetic+heads"]["parameters"]["scale"] == [best] and rows["average"]["parameters"] == {}


def test_the_gallery_shows_the_truth_and_the_rows_asked_for(finished: Finished) -> None:
    gallery = finished.results["gallery"]
    assert len(gallery) == 4
    for entry in gallery:
        assert set(entry["predictions"]) == set(MICRO.tasks)
        for pictures in entry["predictions"].values():
            assert list(pictures) == ["truth", *MICRO.gallery]
            for picture in (entry["image"], *pictures.values()):
                assert picture.shape == (64, 80, 3) and picture.dtype == np.uint8
    assert not np.array_equal(gallery[0]["image"], gallery[1]["image"])


def test_every_stage_was_done_once_and_leaves_a_loadable_model(finished: Finished, tiny_base: Path) -> None:
    assert len(finished.stages) == len(set(finished.stages)) == STAGES
    folders = sorted(path.name for path in (finished.folder / "stages").iterdir())
    assert len(folders) == STAGES and not [name for name in folders if name.endswith((".work", ".tmp"))]
    assert all((finished.folder / "stages" / name / "log.json").is_file() for name in folders)
    base = load(tiny_base).encoder_fingerprint()
    (expert,) = (finished.folder / "stages").glob("expert-depth-seed-0-*/model")
    assert load(expert).provenance["base"] == {"source": "base", "fingerprint": base}
    (joint,) = (finished.folder / "stages").glob("joint-mtl-seed-0-*/model")
    assert list(load(joint).tasks) == ["depth", "normals"]


@pytest.mark.slow
def test_two_workers_give_the_results_of_one(finished: Finished, tiny_base: Path, tmp_path: Path) -> None:
    results = run_recipe(on(MICRO, tiny_base), tmp_path / "run", workers=2)
    assert deltas(results) == pytest.approx(deltas(finished.results), abs=0.2)
    assert (
        by_method(results)["task-arithmetic"]["parameters"]
        == by_method(finished.results)["task-arithmetic"]["parameters"]
    )


def test_spread_is_the_sample_standard_deviation() -> None:
    assert spread([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "per_seed": [1.0, 3.0]}
    assert spread([4.0])["std"] is None


# Doing nothing twice ------------------------------------------------------------------------------------


def test_a_second_run_does_nothing_again_even_in_another_place(
    finished: Finished, copied: Path, tiny_base: Path, done: list[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (copied / "stages").rglob("*")}
    (copied / "results.json").unlink()
    results = run_recipe(on(MICRO, tiny_base), copied, workers=1)
    assert done == []
    assert deltas(results) == deltas(finished.results)
    assert before == {path: path.stat().st_mtime_ns for path in (copied / "stages").rglob("*")}
    assert (copied / "results.json").is_file()


HEADS_ROW, ADAPTERS_ROW = (
    {f"{prefix}{row} seed 0" for prefix in ("", "score ", "validate ")} for row in MICRO.realigned
)
MERGED = {f"{prefix}{name} seed 0" for name in MICRO.merges for prefix in ("", "score ")} | HEADS_ROW | ADAPTERS_ROW
TEST_SCORES = {f"score {row} seed 0" for row in ROWS[1:]} | {f"score expert {task} test seed 0" for task in MICRO.tasks}
EXPERTS = {
    f"{name} seed 0"
    for t in MICRO.tasks
    for name in (f"expert {t}", *(f"score expert {t} {s}" for s in ("val", "test")))
}


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"realign": {**MICRO.realign, "heads": {**STEPS, "lr": 1e-2}}}, HEADS_ROW),
        ({"realign": {**MICRO.realign, "adapters": {**STEPS, "rank": 3}}}, ADAPTERS_ROW),
        ({"test_images": 4}, TEST_SCORES),
        ({"tune": replace(SHORT, steps=5)}, EXPERTS | MERGED),
        ({"gallery": ("experts",)}, set()),
        ({"align_split": "train"}, set()),  # all rows of this recipe use labels
        ({"augmentation": "none"}, EXPERTS | MERGED | {"joint-mtl seed 0", "score joint-mtl seed 0"}),
        (
            {"merge_settings": {"task-arithmetic": {"scale": 0.4}}},
            {"task-arithmetic seed 0", "score task-arithmetic seed 0"} | HEADS_ROW,
        ),
        ({"merges": ("average", "task-arithmetic", "zero-shot")}, {"zero-shot seed 0", "score zero-shot seed 0"}),
    ],
)
def test_a_changed_setting_redoes_only_what_depends_on_it(
    changes: dict[str, Any], again: set[str], copied: Path, tiny_base: Path, done: list[str]
) -> None:
    run_recipe(on(replace(MICRO, **changes), tiny_base), copied, workers=1)
    assert set(done) == again and len(done) == len(again)


@pytest.mark.parametrize(
    ("file", "change"),
    [("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}), ("config.json", {"layer_norm_eps": 1e-2})],
)
def test_a_base_that_computes_something_else_redoes_every_stage(
    file: str, change: dict[str, Any], finished: Finished, tiny_base: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    assert all(done for _, done in plan_of(on(MICRO, base), finished.folder))
    (base / file).write_text(json.dumps({**json.loads((base / file).read_text()), **change}))
    stages = plan_of(on(MICRO, base), finished.folder)
    assert len(stages) == STAGES and not any(done for _, done in stages)


@pytest.mark.slow
def test_another_seed_is_added_to_the_first(finished: Finished, copied: Path, tiny_base: Path, done: list[str]) -> None:
    results = run_recipe(on(replace(MICRO, seeds=(0, 1)), tiny_base), copied, workers=1)
    assert len(done) == STAGES - 1 and all(name.endswith("seed 1") for name in done)  # the features serve both
    for method, row in by_method(results).items():
        assert row["delta_mtl"]["per_seed"][0] == deltas(finished.results)[method]
        assert len(row["delta_mtl"]["per_seed"]) == 2 and row["delta_mtl"]["std"] is not None
    assert by_method(results)["joint-mtl"]["delta_mtl"]["std"] > 0
    assert len(results["scale_curves"]["task-arithmetic"]["chosen"]) == 2


@dataclass(frozen=True, eq=False, kw_only=True)
class Touch(Stage):
    """Makes its folder, and writes its name into a file, if there is one."""

    inputs: Mapping[str, Any] = field(default_factory=dict)
    guess: float = 1.0
    order: str = ""

    @property
    def cost(self) -> float:
        return self.guess

    def run(self, output: Path) -> None:
        if self.order:
            with Path(self.order).open("a") as file:
                file.write(f"{self.name}\n")
        output.mkdir(parents=True)


def graph_in(folder: Path, salt: str = "s", contents: str = "") -> Graph:
    return Graph(folder, "/base", salt, lambda data: contents)


def build(folder: Path, salt: str = "s", **inputs: Any) -> dict[str, Path]:
    graph = graph_in(folder, salt)
    first = Touch(name="first", inputs={"value": 1, **inputs})
    second = Touch(name="second", inputs={"from": {"a": first}})
    with WorkerPool(1) as pool:
        graph.build([second], pool)
    return {"first": graph.output(first), "second": graph.output(second)}


def test_keys_chain_and_do_not_depend_on_the_place(tmp_path: Path) -> None:
    def names(built: dict[str, Path]) -> dict[str, str]:
        return {stage: path.name for stage, path in built.items()}

    here = names(build(tmp_path / "a"))
    assert names(build(tmp_path / "b")) == here
    for other in (names(build(tmp_path / "a", value=2)), names(build(tmp_path / "a", salt="t"))):
        assert other["first"] != here["first"] and other["second"] != here["second"]
    assert len(list((tmp_path / "a" / "stages").iterdir())) == 6


def test_a_dataset_counts_by_what_it_holds_not_by_where_it_is(tmp_path: Path) -> None:
    def key(place: str, holds: str, **more: Any) -> str:
        data = {"spec": place, "split": "val", **more}
        return graph_in(tmp_path, contents=holds).output(Touch(name="score", inputs={"nested": {"data": data}})).name

    assert key("nyuv2:/a", "h") == key("nyuv2:/b", "h") != key("nyuv2:/a", "i")
    assert key("nyuv2:/a", "h", count=3) != key("nyuv2:/a", "h") and key("rooms", "") != key("other", "")


@dataclass(frozen=True, eq=False, kw_only=True)
class Slow(Stage):
    """Takes half a second, and notes that it began."""

    times: str

    def run(self, output: Path) -> None:
        with Path(self.times).open("a") as file:
            file.write("began\n")
        time.sleep(0.5)
        assert not output.exists()
        output.mkdir(parents=True)


def in_one_folder(folder: Path) -> None:
    with WorkerPool(1) as pool:
        graph_in(folder / "run").build([Slow(name="slow", times=str(folder / "times"))], pool)


def test_two_runs_in_one_folder_do_a_stage_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    runs = [context.Process(target=in_one_folder, args=(tmp_path,)) for _ in range(2)]
    for each in runs:
        each.start()
    for each in runs:
        each.join()
    assert [each.exitcode for each in runs] == [0, 0]
    assert (tmp_path / "times").read_text() == "began\n"
    assert [path.suffix for path in (tmp_path / "run" / "stages").iterdir()] == [""]


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    first = build(tmp_path)["first"]
    shutil.rmtree(first)
    for name in (f".{first.name}.0123456789ab.tmp", f".{first.name}x.0123456789ab.tmp"):
        (first.parent / name).mkdir()
        (first.parent / name / "half").touch()
    build(tmp_path)
    assert first.is_dir() and [path.name for path in first.parent.glob(".*")] == [f".{first.name}x.0123456789ab.tmp"]


def test_the_longest_chain_starts_first_and_nothing_before_what_it_needs(tmp_path: Path) -> None:
    file = tmp_path / "order"

    def stage(name: str, guess: float, **inputs: Any) -> Touch:
        return Touch(name=name, inputs=inputs, guess=guess, order=str(file))

    root = stage("root", 1)
    branch = stage("branch", 2, start=root)
    leaves = [
        stage("short", 1, start=root, number=1),
        stage("alone", 4),
        stage("long", 3, start={"nested": branch}, also=root),
        stage("twin", 1, start=branch),
    ]
    with WorkerPool(1) as pool:
        graph = graph_in(tmp_path)
        graph.build(leaves, pool)
        assert file.read_text().split() == ["root", "branch", "alone", "long", "short", "twin"]
        graph.output(branch).rmdir()
        graph.build([*leaves, leaves[0]], pool)
    assert file.read_text().split()[6:] == ["branch"]


def test_another_base_shares_no_stage(copied: Path, tiny_base: Path, tmp_path: Path, done: list[str]) -> None:
    class Enough(Exception):
        pass

    def stop(label: str, *_: Any) -> None:
        raise Enough

    model = load(tiny_base)
    model.encoder.backbone.layernorm.weight.data.add_(0.1)
    other = model.save_pretrained(tmp_path / "other")
    with pytest.raises(Enough), show_progress(stop):
        run_recipe(on(MICRO, other / "encoder"), copied, workers=1)
    assert done == ["features of the base"]  # no other's features served


# Killed runs --------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Like KeyboardInterrupt, no Exception."""


def killed_in(stage: str) -> Callable[..., None]:
    def progress(label: str, done: int, total: int, note: str = "") -> None:
        if label.startswith(stage):
            raise Killed

    return progress


@pytest.mark.parametrize("stage", ["expert depth", "task-arithmetic+heads", "score joint"])
def test_a_killed_run_leaves_nothing_half_done_and_goes_on(
    stage: str, finished: Finished, copied: Path, tiny_base: Path, done: list[str]
) -> None:
    before = {path.name for path in (copied / "stages").iterdir()}
    at = next(index for index, name in enumerate(finished.stages) if name.startswith(stage))
    for name in finished.stages[at:]:  # as if these had not been done yet
        for folder in (copied / "stages").glob(f"{name.replace(' ', '-')}-*"):
            shutil.rmtree(folder)
    (copied / "results.json").unlink()
    kept = {path.name for path in (copied / "stages").iterdir()}
    with pytest.raises(Killed), show_progress(killed_in(stage)):
        run_recipe(on(MICRO, tiny_base), copied, workers=1)
    left = {path.name for path in (copied / "stages").iterdir() if path.suffix not in (".work", ".lock")}
    assert left == kept and not (copied / "results.json").exists()
    done.clear()
    results = run_recipe(on(MICRO, tiny_base), copied, workers=1)
    assert done == finished.stages[at:]
    assert {path.name for path in (copied / "stages").iterdir()} == before
    assert deltas(results) == deltas(finished.results)


@dataclass(frozen=True, eq=False, kw_only=True)
class Killable(LoggedStage):
    """Saves a state and is killed as often as asked for; each attempt seems to take 100 seconds until it saves."""

    goes_on: ClassVar[bool] = True

    kills: int

    def work(self, folder: Path) -> tuple[Mapping[str, Any], None]:
        attempts = len(list(folder.glob("state-*")))
        if attempts < self.kills:
            state = folder / f"state-{attempts}"
            state.touch()
            saved = (folder / "clock.json").stat().st_mtime + 100
            os.utime(state, (saved, saved))
            raise Killed
        return {"r2": 0.5}, None


@pytest.mark.parametrize("kills", [0, 1, 2])
def test_the_seconds_of_a_stage_are_those_of_all_attempts(kills: int, tmp_path: Path) -> None:
    stage = Killable(name="stage", kills=kills)
    for _ in range(kills):
        with pytest.raises(Killed):
            stage.run(tmp_path / "stage")
    stage.run(tmp_path / "stage")
    log = json.loads((tmp_path / "stage" / "log.json").read_text())
    assert log["r2"] == 0.5 and 100 * kills <= log["seconds"] < 100 * kills + 10
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


def test_labelled_images_are_those_that_exist(tiny_base: Path, tmp_path: Path) -> None:
    rows = ["image,split,depth"]
    for index, split in enumerate(["train"] * 5 + ["val"] * 4 + ["test"] * 2):
        noise = np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{index}.png")
        np.save(tmp_path / f"{index}.npy", np.full((16, 16), 1 + index, np.float32))
        rows.append(f"{index}.png,{split},{index}.npy")
    (tmp_path / "data.csv").write_text("\n".join(rows))
    short = TrainSettings(steps=1, batch_size=2)
    recipe = Recipe(
        **{"probe": short, "tune": short, "joint": short, "base": str(tiny_base), "data": str(tmp_path / "data.csv")},
        tasks=("depth",),
        merges=("average",),
        realigned=(),
        gallery=("experts",),
    )
    results = by_method(run_recipe(recipe, tmp_path / "run", workers=1))
    assert {name: row["labelled_images"] for name, row in results.items()} == {
        "experts": 5,
        "joint-mtl": 5,
        "average": 0,
    }


# Mistakes -----------------------------------------------------------------------------------------------


def test_a_task_the_dataset_lacks_is_told_before_anything_is_trained(
    tiny_base: Path, tmp_path: Path, done: list[str]
) -> None:
    with pytest.raises(InputError, match="did you mean 'depth'"):
        run_recipe(on(replace(MICRO, tasks=("deth",)), tiny_base), tmp_path / "run", workers=1)
    with pytest.raises(InputError, match="tasks has 'depth' twice"):
        run_recipe(on(replace(MICRO, tasks=("depth", "depth")), tiny_base), tmp_path / "run", workers=1)
    assert done == [] and not (tmp_path / "run" / "results.json").exists()


def test_a_base_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        run_recipe(on(MICRO, tmp_path / "nowhere"), tmp_path / "run", workers=1)


def test_learned_coefficients_are_a_merge_of_a_recipe(copied: Path, tiny_base: Path) -> None:
    """The row is `merge` with scale="learned" on the images of the rows without labels, and steps may follow it."""
    recipe = replace(MICRO, realigned=("learned", "learned+fold(count=4)"), auto_images=8, gallery=("experts",))
    results = by_method(run_recipe(on(recipe, tiny_base), copied, workers=1))
    base, images = load(str(tiny_base)), load_data("rooms", split={"train": 16, "val": 6}, count=8, tasks=[])
    experts = {
        task: load(next(copied.glob(f"stages/expert-{task}-seed-0-*")) / "model") for task in sorted(MICRO.tasks)
    }
    oracle = merge(base, experts, "task-arithmetic", scale="learned", images=images, count=8)
    made = load(next(copied.glob("stages/learned-without-labels-seed-0-*")) / "model")
    for name, weight in oracle.encoder.state_dict().items():
        torch.testing.assert_close(made.encoder.state_dict()[name], weight, msg=name)
    row = results["learned"]
    assert (row["family"], row["labelled_images"], row["unlabelled_images"]) == ("merge", 0, 8)
    assert results["learned+fold(count=4)"]["merge"] == "learned"
    assert results["learned+fold(count=4)"]["unlabelled_images"] == 8
