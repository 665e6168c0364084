"""The commands one after the other, as a newcomer types them."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image

import simomerge as sm
from simomerge.assembly.realign import get_realignment, realignments
from simomerge.cli import COMMANDS, GROUPS, cli, output
from simomerge.cli.next_step import judge_step, next_step
from simomerge.cli.realign import _chosen
from simomerge.core.classes import trusting
from simomerge.core.progress import Console
from simomerge.models.model import load
from simomerge.recipes.recipe import Recipe
from simomerge.training import evaluate as evaluate_module
from simomerge.training.settings import TrainSettings

from .conftest import TINY, Story, assert_mistake, simomerge


def picture(path: Path, size: tuple[int, int] = (40, 24)) -> Path:
    values = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)
    Image.fromarray(values).save(path)
    return path


# Help ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    done = simomerge(command, "--help")
    assert done.code == 0 and f"Usage: simomerge {command}" in done.out
    assert simomerge(command, "-h").out == done.out
    for inner in re.findall(r"^  (\w+) ", done.out.partition("Commands:")[2], re.MULTILINE):
        done = simomerge(command, inner, "--help")
        assert done.code == 0 and f"Usage: simomerge {command} {inner}" in done.out
    assert command == "app" or "--json" in done.out  # a page in the browser has no result to print


def test_help_lists_every_command_and_version_is_shown() -> None:
    done = simomerge("--help")
    assert done.code == 0
    sections = done.out.partition("--help  Show this message and exit.\n\n")[2]
    assert re.findall(r"^  (\w+) ", sections, re.MULTILINE) == list(COMMANDS)
    assert re.findall(r"^(\w.*):$", sections, re.MULTILINE) == list(GROUPS)
    assert simomerge("--version").out.startswith("simomerge, version ")


def test_without_a_command_it_shows_the_help() -> None:
    done = simomerge()
    assert "demo" in done.out + done.err and "Traceback" not in done.err


# Train, merge -------------------------------------------------------------------------------------------


def test_train_writes_an_expert_that_records_its_base(story: Story, tiny_base: Path) -> None:
    said = story.said["depth"]
    assert said["tasks"] == ["depth"] and said["steps"] == 2 and set(said["losses"]) == {"depth"}
    assert said["output"] == str(story / "depth")
    expert = load(story / "depth")
    base = load(tiny_base).encoder_fingerprint()
    assert expert.provenance["base"] == {"source": tiny_base.name, "fingerprint": base}  # and not its whole path
    assert expert.provenance["training"]["images"] == 8
    assert list(expert.tasks) == ["depth"] and expert.encoder_fingerprint() != base
    assert sorted(path.name for path in story.folder.iterdir()) == ["depth", "normals", "scene"]  # and no .work


def test_merge_writes_a_model_with_all_heads(story: Story, tiny_base: Path) -> None:
    assert story.said["scene"] == {
        "output": str(story / "scene"),
        "tasks": ["depth", "normals"],
        "merge": {"method": "task-arithmetic", "scale": 0.5},
    }
    scene = load(story / "scene")
    assert scene.provenance["base"]["fingerprint"] == load(tiny_base).encoder_fingerprint()
    assert scene.provenance["experts"]["depth"]["source"] == "depth"


def test_merge_tells_what_it_did_and_what_comes_next(story: Story, tiny_base: Path, tmp_path: Path) -> None:
    experts = [f"{task}={story / task}" for task in ("depth", "normals")]
    options = ("--method", "ties", "-p", "density=0.4", "--scale", "0.3", "-o", tmp_path / "ties")
    done = simomerge("merge", tiny_base, *experts, *options)
    first, second, third = done.out.splitlines()
    assert first.startswith("Merged depth, normals by ties (density 0.4, scale 0.3")
    assert second == f"Model: {tmp_path / 'ties'}" and third.startswith(f"Next: simomerge realign {tmp_path / 'ties'}")
    assert (done.code, done.err) == (0, "")


def test_merge_with_scale_auto_chooses_on_validation_images(story: Story, tiny_base: Path, tmp_path: Path) -> None:
    experts = [f"{task}={story / task}" for task in ("depth", "normals")]
    done = simomerge("merge", tiny_base, *experts, "--scale", "auto", "--count", 4, "-o", tmp_path / "auto", "--json")
    assert done.code == 0, done.err
    assert (
        done.json["merge"]["scale_chosen_on"] == "4 labelled images, after a fold"
        and 0 <= done.json["merge"]["scale"] <= 1
    )
    assert "scale  11/11" in done.err


@pytest.mark.parametrize("options", [("--method", "regmean"), ("--method", "ties", "--scale", "auto")])
def test_a_schedule_goes_with_every_method(
    story: Story, tiny_base: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    experts = {task: story / task for task in ("depth", "normals")}
    pairs = [f"{task}={folder}" for task, folder in experts.items()]
    words = ("merge", tiny_base, *pairs, *options, "--images", "rooms", "--count", 8)
    done = simomerge(*words, "--schedule", "0,1,1,0.5", "-o", tmp_path / "scene", "--json")
    assert done.code == 0 and done.json["merge"]["schedule"] == [0, 1, 1, 0.5], done.err
    made = load(tmp_path / "scene").encoder_fingerprint()
    scale = done.json["merge"]["scale"] if "auto" in options else None
    given = {"scale": scale} if "auto" in options else {"images": "rooms", "count": 8}
    fingerprints = [
        sm.merge(tiny_base, experts, options[1], schedule=schedule, **given).encoder_fingerprint()
        for schedule in ("0,1,1,0.5", None)
    ]
    assert fingerprints[0] == made != fingerprints[1]


@pytest.mark.parametrize(
    "options", [("--method", "auto"), ("--scale", "learned"), ("--method", "auto", "--minutes", "1")]
)
def test_a_schedule_that_is_chosen_otherwise(story: Story, tiny_base: Path, options: tuple[str, ...]) -> None:
    given = ("merge", tiny_base, f"depth={story / 'depth'}", *options, "--images", "rooms", "-o", "out")
    assert_mistake(simomerge(*given, "--schedule", "lines"), f"--schedule is not for {' '.join(options[:2])}: leave it")


def test_overwrite_replaces_what_is_there(story: Story, tiny_base: Path, tmp_path: Path) -> None:
    for scale in (0.1, 0.2):
        more = ("--scale", scale, "-o", tmp_path / "one", "--overwrite")
        assert simomerge("merge", tiny_base, f"depth={story / 'depth'}", *more).code == 0
    assert load(tmp_path / "one").provenance["merge"]["scale"] == 0.2


def test_merge_warns_in_a_line_of_its_own_about_experts_without_a_base(copy_of: Any, tiny_base: Path) -> None:
    expert = copy_of("depth")
    description = json.loads((expert / "simo.json").read_text())
    description["provenance"] = {}
    (expert / "simo.json").write_text(json.dumps(description))
    done = simomerge("merge", tiny_base, f"depth={expert}", "-o", expert.parent / "out")
    assert done.code == 0
    assert done.err.startswith("Warning: expert 'depth' does not record its base") and done.err.count("\n") == 1


def interrupt_in(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Console, label: str, done: int, total: int, note: str = "") -> None:
        if label.startswith(phase):
            raise KeyboardInterrupt

    monkeypatch.setattr(Console, "__call__", stop)


def test_an_interrupted_training_goes_on_and_other_settings_start_afresh(
    story: Story, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*more: object) -> Any:
        return simomerge("train", "--task", "depth", "--base", tiny_base, *TINY, "-o", tmp_path / "expert", *more)

    with monkeypatch.context() as patch:
        interrupt_in("depth", patch)
        done = train()
    assert done.code == 130 and done.err.strip().startswith("Stopped.") and "Traceback" not in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["expert.work"]
    other = train("--count", "6")  # not "features of 8 images, but the dataset has 6"
    assert other.code == 0, other.err
    assert [path.name for path in tmp_path.iterdir()] == ["expert"]
    assert load(tmp_path / "expert").provenance["training"]["images"] == 6
    assert train("--overwrite").code == 0
    assert load(tmp_path / "expert").encoder_fingerprint() == load(story / "depth").encoder_fingerprint()


def test_a_training_does_not_go_on_on_a_base_with_another_normalisation(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    interrupt_in("depth", monkeypatch)
    for mean in (0.5, 0.4):
        (base / "preprocessor_config.json").write_text(json.dumps({"image_mean": [mean] * 3, "image_std": [0.25] * 3}))
        done = simomerge("train", "--task", "depth", "--base", base, *TINY, "-o", tmp_path / "expert")
        assert done.code == 130
    assert len(list((tmp_path / "expert.work").iterdir())) == 2


# Re-align, evaluate -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "more"),
    [("heads", ("--workers", 1)), ("adapters", ("--rank", 2)), ("lora", ("--rank", 2, "--alpha", 3))],
)
def test_realign_writes_a_model_and_its_cost(story: Story, tmp_path: Path, method: str, more: tuple[Any, ...]) -> None:
    options = ("--method", method, "--count", 4, "--steps", 2, "-o", tmp_path / "mended", "--json", *more)
    done = simomerge("realign", story / "scene", *options)
    assert done.code == 0, done.err
    assert done.json["realign"]["method"] == method and done.json["realign"]["labelled_images"] == 4
    mended = load(tmp_path / "mended")
    same = mended.encoder_fingerprint() == load(story / "scene").encoder_fingerprint()
    assert same == (method != "lora")
    assert mended.provenance["realign"] == done.json["realign"] and "merge" in mended.provenance
    assert [path.name for path in tmp_path.iterdir()] == ["mended"]
    inspected = simomerge("inspect", tmp_path / "mended")
    assert ("adapters of rank 2" in inspected.out) == (method == "adapters")


@pytest.mark.parametrize("method", list(realignments()))
def test_every_re_alignment_takes_the_options_of_all_commands(
    method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(output, "quiet", False)
    parent = click.Context(cli, **cli.context_settings)
    command = cli.get_command(parent, "realign")
    given = ["model", "depth=expert", "--method", method, "-q", "--trust-code", "-o", str(tmp_path / "out")]
    assert "--trust-code" not in next_step("evaluate", "scene")
    with trusting(), command.make_context("realign", given, parent=parent):
        assert next_step("evaluate", "scene").endswith("scene --trust-code")
        assert next_step("inspect", "scene").endswith("scene")
        assert _chosen(method) == get_realignment(method) and output.quiet


@pytest.mark.filterwarnings("ignore::UserWarning")  # few images
def test_a_realignment_is_called_as_it_was_given(story: Story, tmp_path: Path) -> None:
    experts = [f"{task}={story / task}" for task in ("depth", "normals")]
    options = ("--method", "fold-cross", "--images", "rooms", "--count", 4, "-o", tmp_path / "folded")
    done = simomerge("realign", story / "scene", *experts, *options)
    assert "Re-aligned depth, normals by fold-cross on 4 unlabelled images" in done.out, done.err


def test_realign_distils_with_lora(story: Story, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(6):
        picture(tmp_path / "photos" / f"{i}.png")
    experts = [f"{task}={story / task}" for task in ("depth", "normals")]
    options = ("--method", "distill", "--trains", "lora", "--rank", 2, "--steps", 2, "--hold-out", 0)
    options = (*options, "--images", tmp_path / "photos")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few images hold the fold back
        done = simomerge("realign", story / "scene", *experts, *options, "-o", tmp_path / "mended", "--json")
    assert done.code == 0, done.err
    record = done.json["realign"]
    assert (record["trains"], record["rank"], record["alpha"], record["labelled_images"]) == ("lora", 2, 2, 0)
    mended = load(tmp_path / "mended")
    assert mended.encoder.adapters is None
    assert mended.encoder_fingerprint() != load(story / "scene").encoder_fingerprint()


def test_evaluate_measures_and_compares_with_the_experts(story: Story) -> None:
    experts = [f"{task}={story / task}" for task in ("depth", "normals")]
    found = simomerge("evaluate", story / "scene", *experts, "--count", 4, "--json").json
    assert set(found) == {"scores", "experts", "normalised_performance", "delta_mtl"}
    ratios = {
        task: found["experts"][task][metric] / found["scores"][task][metric]
        for task, metric in (("depth", "abs_err"), ("normals", "mean_angle"))
    }
    assert found["normalised_performance"] == pytest.approx(ratios)
    gains = [100 * (1 - 1 / ratio) for ratio in ratios.values()]
    assert found["delta_mtl"] == pytest.approx(sum(gains) / 2, abs=1e-6)


def test_evaluate_prints_one_line_per_task(story: Story) -> None:
    done = simomerge("evaluate", story / "scene", "--count", 4)
    heading, columns, depth, normals = done.out.splitlines()
    assert heading.endswith("on 4 images of rooms (test):") and done.code == 0
    assert columns.split() == ["task", "metric", "value", "unit", "other", "metrics"]
    assert depth.split()[:2] == ["depth", "abs_err"] and normals.split()[:2] == ["normals", "mean_angle"]


def test_rooms_are_named_if_no_data_is_given_for_a_model_that_does_not_come_from_them(
    story: Story, tmp_path: Path
) -> None:
    own = load(story / "scene")
    own.provenance = {**own.provenance, "base": {"source": "facebook/dinov2-small"}}
    folder = own.save_pretrained(tmp_path / "own")
    training = ("--method", "heads", "--steps", 1, "--count", 2, "-o", tmp_path / "heads")
    for command in (("evaluate", folder, "--count", 2), ("realign", folder, *training)):
        assert "Warning: without --data the included rooms are used" in simomerge(*command).err
    for command in (("evaluate", folder, "--count", 2, "--data", "rooms"), ("evaluate", story / "depth", "--count", 2)):
        assert "without --data" not in simomerge(*command).err


# Predict, inspect ---------------------------------------------------------------------------------------


def test_predict_writes_values_and_pictures_at_the_image_s_size(story: Story, tmp_path: Path) -> None:
    photo = picture(tmp_path / "my.photo.of.a.room.png", (41, 23))
    done = simomerge("predict", story / "scene", photo, "-o", tmp_path / "maps", "--no-legend", "--json")
    assert done.code == 0, done.err
    names = [f"my.photo.of.a.room-{task}" for task in ("depth", "normals")]
    assert done.json["written"] == [str(tmp_path / "maps" / f"{name}.png") for name in names]
    assert {path.name for path in (tmp_path / "maps").iterdir()} == {
        f"{n}.{end}" for n in names for end in ("png", "npy")
    }
    expected = load(story / "scene").predict(photo)
    for name, values in zip(names, expected.values(), strict=True):
        np.testing.assert_array_equal(np.load(tmp_path / "maps" / f"{name}.npy"), values)
        with Image.open(tmp_path / "maps" / f"{name}.png") as image:
            assert image.size == (41, 23)


def test_predict_keeps_images_of_one_name_apart(story: Story, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first, second = picture(tmp_path / "a.png"), picture(tmp_path / "other" / "a.png", (16, 16))
    done = simomerge("predict", story / "depth", first, second, first, "-o", tmp_path / "maps", "--json")
    assert done.code == 0, done.err
    assert [Path(name).name for name in done.json["written"]] == ["a-1-depth.png", "a-2-depth.png", "a-3-depth.png"]
    assert np.load(tmp_path / "maps" / "a-2-depth.npy").shape == (16, 16)


def test_inspect_reads_models_encoders_and_files(story: Story, tiny_base: Path) -> None:
    scene = simomerge("inspect", story / "scene", "--json").json
    assert scene["fingerprint"] == load(story / "scene").encoder_fingerprint()
    assert set(scene["model"]["tasks"]) == {"depth", "normals"} and scene["dtypes"] == ["F32"]
    folder, file = (simomerge("inspect", p, "--json").json for p in (tiny_base, tiny_base / "model.safetensors"))
    assert "model" not in folder and folder["fingerprint"] == file["fingerprint"] != scene["fingerprint"]
    assert folder["fingerprint"] == scene["model"]["provenance"]["base"]["fingerprint"]
    lines = simomerge("inspect", story / "scene").out
    assert "task depth: depth, linear head" in lines and "merge: method task-arithmetic, scale 0.5" in lines


# Doctor, demo -------------------------------------------------------------------------------------------


def test_doctor_finds_that_everything_works() -> None:
    done = simomerge("doctor", "--json")
    checks = {check["name"]: check for check in done.json["checks"]}
    assert {"python", "torch", "transformers", "torchvision", "device", "cache folder", "embedded base"} <= set(checks)
    assert done.code == 0 and done.json["ok"], checks


def test_doctor_says_what_to_fix(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SIMOMERGE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("simomerge.models.model.local_source", lambda source: str(tmp_path / "nowhere"))
    done = simomerge("doctor")
    assert done.code == 1 and done.out.splitlines()[-1] == "To fix: cache folder, embedded base."
    assert "no such folder" in done.out and "Traceback" not in done.err


def test_demo_writes_a_report(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = TrainSettings(steps=2, batch_size=4, lr=1e-3)

    def tiny_recipe(tasks: tuple[str, ...], head: str, seeds: int, full: bool) -> Recipe:
        assert (tasks, head, seeds, full) == (("depth", "normals"), "linear", 1, False)
        phases = dict.fromkeys(("probe", "tune", "joint"), short)
        counts = dict.fromkeys(("train_images", "val_images", "test_images"), 4)
        recipe = replace(Recipe(tasks=tasks), realign={"heads": {"steps": 2, "batch_size": 4}}, **phases, **counts)
        return replace(recipe, merges=("average",), realigned=("average+heads",), gallery=("experts", "average"))

    monkeypatch.setattr("simomerge.recipes.demo.demo_recipe", tiny_recipe)
    run = tmp_path / "run"
    done = simomerge("demo", "--tasks", "depth,normals", "--base", tiny_base, "-o", run, "--workers", 1, "--json")
    assert done.code == 0, done.err
    assert [row["method"] for row in done.json["rows"]] == ["experts", "joint-mtl", "average", "average+heads"]
    assert done.json["report"] == str(run / "report.html") and "<html" in (run / "report.html").read_text()
    assert json.loads((run / "results.json").read_text())["rows"] == done.json["rows"]


def test_a_model_made_on_pictures_is_looked_at_and_one_made_on_a_dataset_is_judged(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/0.png").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/data.yaml").touch()
    experts = {"depth": "runs/depth"}
    looked = judge_step(Path("scene"), experts, str(tmp_path / "photos"))
    assert looked.startswith(f"Next: simomerge predict scene {tmp_path}/photos -o scene-predictions")
    (tmp_path / "tars/deep").mkdir(parents=True)
    (tmp_path / "tars/deep/0.tar").touch()
    for pictures in ("s3://bucket/photos", str(tmp_path / "tars"), str(tmp_path / "tars/deep/0.tar")):
        assert judge_step(Path("scene"), experts, pictures) == "Next: simomerge inspect scene"
    for data in ("rooms", str(tmp_path / "mine"), str(tmp_path / "mine/data.yaml"), "nyuv2:/data/nyuv2"):
        judged = judge_step(Path("scene"), experts, data)
        assert judged == f"Next: simomerge evaluate scene depth=runs/depth --data {data} --split test"


def test_a_model_is_judged_on_the_split_and_the_tasks_that_have_labels(tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_text("image,split,depth\n0.png,train,0.npy\n1.png,val,1.npy\n")
    experts = {"depth": "runs/depth", "normals": "runs/normals"}
    judged = judge_step(Path("scene"), experts, str(data))
    assert judged == f"Next: simomerge evaluate scene depth=runs/depth --data {data} --split val"
    assert judge_step(Path("scene"), {"normals": "runs/normals"}, str(data)) == "Next: simomerge inspect scene"
    for given, split in (("rooms", "test"), (str(data), "val")):  # after a re-alignment with labels
        alone = judge_step(Path("scene"), {}, given)
        assert alone == f"Next: simomerge evaluate scene --data {given} --split {split}"


def test_figures_of_a_model_that_was_replaced_meanwhile_are_shown_and_not_recorded(
    copy_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = copy_of("depth")
    measure = evaluate_module.evaluate

    def replaced(*given: Any) -> Any:
        description = json.loads((scene / "simo.json").read_text())
        description["provenance"]["training"]["images"] = 9
        (scene / "simo.json").write_text(json.dumps(description))
        return measure(*given)

    monkeypatch.setattr(evaluate_module, "evaluate", replaced)
    done = simomerge("evaluate", scene, "--count", 4, "--record")
    assert done.code == 2 and "abs_err" in done.out and "Recorded" not in done.out
    assert "holds another model than the one that was measured; evaluate it again." in done.err
    assert "evaluation" not in json.loads((scene / "simo.json").read_text())


def test_an_expert_that_scores_nothing_costs_no_other_result(story: Story, copy_of: Any, monkeypatch: Any) -> None:
    scene, measure, calls = copy_of("scene"), evaluate_module.evaluate, []

    def measured(*given: Any) -> Any:
        calls.append(given)
        found = measure(*given)
        return found if len(calls) == 1 else {"depth": dict.fromkeys(found["depth"], 0.0)}

    monkeypatch.setattr(evaluate_module, "evaluate", measured)
    done = simomerge("evaluate", scene, f"depth={story / 'depth'}", "--count", 4, "--record", "--json")
    assert done.code == 0 and set(done.json) == {"scores", "experts"}
    assert "No Delta_MTL, because task 'depth': the baseline's abs_err is 0.0" in done.err
    recorded = json.loads((scene / "simo.json").read_text())["evaluation"]
    assert "delta_mtl" not in recorded and [row["task"] for row in recorded["metrics"]] == ["depth", "normals"]
