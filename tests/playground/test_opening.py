"""What `simomerge app` opens: models, runs, experts; and what it says if there is nothing to open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simomerge.core.errors import InputError
from simomerge.playground import opening
from simomerge.playground.opening import Opened, open_models


@pytest.fixture
def folders(opened: Opened, tmp_path: Path) -> dict[str, str]:
    found = {}
    for task, expert in opened.experts.items():
        expert.save_pretrained(tmp_path / task)
        found[task] = str(tmp_path / task)
    return found


def run_folder(folder: Path, opened: Opened, tiny_base: Any, **recipe: Any) -> Path:
    """A run as `simomerge run` leaves it: results, and a stage per expert."""
    places = {task: f"stages/expert-{task}-seed-0-0123456789ab/model" for task in ("parts", "depth")}
    for task, place in places.items():
        opened.experts[task].save_pretrained(folder / place)
    content = {"recipe": {"base": str(tiny_base), **recipe}, "experts": places}
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def test_experts_find_their_base(
    folders: dict[str, str], tiny_base: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="the experts' base, 'base', is not found from here: give it with --base"):
        open_models(None, folders)
    monkeypatch.chdir(tiny_base.parent)
    found = open_models(None, folders)
    assert list(found.experts) == ["depth", "parts"] and found.model is None
    assert found.base is not None and opened.base is not None
    assert found.base.encoder_fingerprint() == opened.base.encoder_fingerprint()
    assert list(open_models(str(tiny_base), folders).experts) == ["depth", "parts"]


def test_a_run_has_experts_and_its_best_model(tmp_path: Path, opened: Opened, tiny_base: Any) -> None:
    folder = run_folder(tmp_path / "run", opened, tiny_base)
    found = open_models(str(folder), {})
    assert list(found.experts) == ["parts", "depth"] and found.model is None and not found.rooms
    opened.experts["depth"].save_pretrained(folder / "model")
    assert open_models(str(folder), {}).model is not None


def test_experts_of_other_seeds_and_earlier_recipes_are_left_alone(
    tmp_path: Path, opened: Opened, tiny_base: Any
) -> None:
    folder = run_folder(tmp_path, opened, tiny_base)
    found = "stages/expert-depth-seed-{}-{}/model"
    for seed, key, value in ((2, "aa", 1.0), (2, "bb", 2.0), (10, "aa", 3.0), (10, "bb", 4.0)):
        opened.experts["depth"].provenance["marked"] = value
        opened.experts["depth"].save_pretrained(folder / found.format(seed, key))
    del opened.experts["depth"].provenance["marked"]
    results = json.loads((folder / "results.json").read_text())
    for seed, key, value in ((2, "bb", 2.0), (10, "bb", 4.0)):
        results["experts"]["depth"] = found.format(seed, key)
        (folder / "results.json").write_text(json.dumps(results))
        assert open_models(str(folder), {}).experts["depth"].provenance["marked"] == value


def test_a_model_is_shown_without_merging(folders: dict[str, str]) -> None:
    found = open_models(folders["depth"], {})
    assert found.model is not None and not found.experts and found.title == "depth"


def test_without_anything_the_demo_is_opened(
    tmp_path: Path, opened: Opened, tiny_base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder(Path("runs/demo"), opened, tiny_base)
    assert open_models(None, {}).title == "runs/demo"


def test_without_a_demo_tiny_experts_are_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from simomerge.playground import tiny
    from simomerge.training.settings import TrainSettings

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SIMOMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tiny, "IMAGES", 4)
    monkeypatch.setattr(tiny, "PROBE", TrainSettings(steps=1, batch_size=2))
    monkeypatch.setattr(tiny, "TUNE", TrainSettings(steps=1, batch_size=2, encoder_lr=1e-4))
    found = open_models(None, {})
    assert list(found.experts) == ["segmentation", "depth", "normals"] and found.rooms
    monkeypatch.setattr(tiny, "_train", lambda task: pytest.fail("trained again"))
    assert list(open_models(None, {}).experts) == list(found.experts)


@pytest.mark.parametrize(
    ("source", "experts", "message"),
    [
        ("base", {}, "is an encoder without heads: add its experts, each as TASK=EXPERT"),
        ("run", {"depth": "x"}, "is a run, which has its own experts; leave depth=... out"),
        ("empty", {}, "neither a model .* nor a finished run"),
        ("bare", {}, "the run has no experts in stages/"),
        ("emptied", {}, "the run has no experts in stages/"),
        ("older", {}, r"cannot be read \(entry 'experts' is missing\); run the recipe again"),
        ("./missing", {}, "missing"),
    ],
)
def test_what_cannot_be_opened_is_named(
    source: str, experts: dict[str, str], message: str, tmp_path: Path, tiny_base: Any, opened: Opened
) -> None:
    (tmp_path / "empty").mkdir()
    named = {"bare": {"experts": {}}, "emptied": {"experts": {"depth": "stages/expert-depth/model"}}, "older": {}}
    for name, content in named.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"recipe": {}, **content}))
    run_folder(tmp_path / "run", opened, tiny_base)
    place = str(tiny_base) if source == "base" else str(tmp_path / source)
    with pytest.raises(InputError, match=message):
        open_models(place, experts)


def test_experts_that_record_no_base_need_one(folders: dict[str, str], tmp_path: Path) -> None:
    for folder in folders.values():
        path = Path(folder) / "simo.json"
        content = json.loads(path.read_text())
        content["provenance"] = {}
        path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="the experts do not record their base: give it with --base"):
        open_models(None, folders)


def test_the_default_run_is_that_of_the_demo() -> None:
    from simomerge.recipes.demo import demo_recipe

    assert str(opening.DEMO) == demo_recipe().output
