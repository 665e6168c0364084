"""A work folder goes on only with the parameters, images and models that its work was begun with."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simomerge.assembly.realign import get_realignment, prepared, realign
from simomerge.core.errors import InputError
from simomerge.datasets import DenseDataset, load_data
from simomerge.models.model import SimoModel

from .contract import FEW_IMAGES, same, weights

Interrupted = Callable[[int], AbstractContextManager[None]]
SETTINGS = {"steps": 6, "batch_size": 4, "hold_out": 0.25, "predictions": "stored"}
pytestmark = [pytest.mark.filterwarnings(FEW_IMAGES), pytest.mark.filterwarnings("ignore::UserWarning")]


def begun(
    merged: SimoModel, experts: Mapping[str, SimoModel], images: Any, work: Path, interrupted: Interrupted
) -> None:
    """Begin to distil in a work folder, and stop in the fourth step."""
    with interrupted(4), pytest.raises(KeyboardInterrupt):
        realign(merged, experts, images, method="distill-encoder", work_folder=work, **SETTINGS)
    assert (work / "predictions" / "done").exists() and (work / "state.safetensors").exists()


def changed(model: SimoModel) -> SimoModel:
    """A copy with another bias in a head."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(other.heads.values())).get_parameter("output.bias").add_(0.1)
    return other


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 3}, r"steps \(6, now 3\)"),
        ({"steps": 9}, r"steps \(6, now 9\)"),
        ({"hold_out": 0.125}, r"hold_out \(0.25, now 0.125\)"),
        ({"method": "fold"}, r"method \(distill, now fold\), .*, \.\.\."),
        ({"images": 6}, r"number of images \(8, now 6\), images \(other content\)"),
        ({"images": "other"}, r"other inputs: images \(other content\)"),
        ({"expert": "segmentation"}, r"other inputs: expert segmentation \(other content\)"),
        ({"model": True}, r"other inputs: model \(other content\)"),
        ({"configuration": "segmentation"}, r"other inputs: expert segmentation \(other content\)"),
    ],
)
def test_other_inputs_are_refused(
    merged: SimoModel,
    experts: dict[str, SimoModel],
    rooms: DenseDataset,
    tmp_path: Path,
    interrupted: Interrupted,
    given: dict[str, Any],
    message: str,
) -> None:
    begun(merged, experts, rooms, tmp_path, interrupted)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    more, images = {"method": "distill-encoder", **SETTINGS, **given}, given.get("images", len(rooms))
    if more["method"] == "fold":
        more = {"method": "fold"}
    elif name := more.pop("expert", None):
        experts = {**experts, name: changed(experts[name])}
    elif name := more.pop("configuration", None):
        experts = {**experts, name: copy.deepcopy(experts[name])}
        experts[name].encoder.backbone.config.layer_norm_eps = 1e-3
    elif more.pop("model", None):
        merged = changed(merged)
    more.pop("images", None)
    data = load_data("rooms", split="train", count=8, size=(24, 32)) if images == "other" else rooms.take(images)
    remedy = rf"; give another work folder \(--work\), or remove {tmp_path / 'inputs.json'} and the work beside it"
    with pytest.raises(InputError, match=rf"{tmp_path}: this work was begun with .*{message}{remedy}"):
        realign(merged, experts, data, work_folder=tmp_path, **more)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_same_inputs_go_on_with_other_resources(
    merged: SimoModel,
    experts: dict[str, SimoModel],
    rooms: DenseDataset,
    tmp_path: Path,
    interrupted: Interrupted,
) -> None:
    begun(merged, experts, rooms, tmp_path, interrupted)
    for name, expert in experts.items():
        expert.save_pretrained(tmp_path / name)
    given = {**SETTINGS, "method": "distill-encoder", "checkpointing": True}
    folders = {name: tmp_path / name for name in experts}  # the same weights from files
    resumed = realign(copy.deepcopy(merged), folders, copy.deepcopy(rooms), work_folder=tmp_path, **given)
    assert same(weights(resumed), weights(realign(merged, experts, rooms, **given)))


def test_other_labels_of_the_same_images_are_refused(
    merged: SimoModel, rooms: DenseDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"method": "heads", "steps": 2, "batch_size": 4, "work_folder": tmp_path}
    realign(merged, data=rooms, **given)
    targets = type(rooms).targets

    def corrected(self: Any, index: int, tasks: Any) -> dict[str, Any]:
        return {task: 0 * target for task, target in targets(self, index, tasks).items()}

    monkeypatch.setattr(type(rooms), "targets", corrected)
    with pytest.raises(InputError, match=r"begun with other inputs: labels \(other content\)"):
        realign(merged, data=rooms, **given)


@pytest.mark.parametrize("where", ["pictures", "arrays"])
def test_other_pictures_of_the_same_names_are_refused(
    merged: SimoModel, experts: dict[str, SimoModel], tmp_path: Path, interrupted: Interrupted, where: str
) -> None:
    arrays = list(np.random.default_rng(0).integers(0, 255, (8, 24, 32, 3), np.uint8))
    for index, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / f"{index}.png")
    begun(merged, experts, arrays if where == "arrays" else tmp_path, tmp_path / "work", interrupted)
    arrays[-1] = 255 - arrays[-1]
    Image.fromarray(arrays[-1]).save(tmp_path / "7.png")
    images = arrays if where == "arrays" else [tmp_path / f"{index}.png" for index in range(8)]
    with pytest.raises(InputError, match=r"other inputs: images \(other content\); give another work folder"):
        realign(merged, experts, images, method="distill-encoder", work_folder=tmp_path / "work", **SETTINGS)


def test_features_and_labels_of_other_data_are_refused(merged: SimoModel, rooms: DenseDataset, tmp_path: Path) -> None:
    given = {"method": "heads", "steps": 2, "batch_size": 4, "work_folder": tmp_path}
    realign(merged, data=rooms, **given)
    assert (tmp_path / "features").exists()
    other = load_data("rooms", split="train", count=8, size=(24, 32))
    with pytest.raises(InputError, match=r"other inputs: images \(other content\)"):
        realign(merged, data=other, **given)
    with pytest.raises(InputError, match=r"other inputs: model \(other content\)"):
        realign(changed(merged), data=rooms, **given)


def test_a_folder_without_work_takes_any_inputs(
    merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset, tmp_path: Path
) -> None:
    for variant in ("per-tap", "cross-tap"):  # a fold that is done leaves no work
        realign(merged, experts, rooms, variant=variant, work_folder=tmp_path)
        assert json.loads((tmp_path / "inputs.json").read_text())["variant"] == variant


def test_work_without_a_record_and_damaged_records(
    merged: SimoModel,
    experts: dict[str, SimoModel],
    rooms: DenseDataset,
    tmp_path: Path,
    interrupted: Interrupted,
) -> None:
    begun(merged, experts, rooms, tmp_path, interrupted)
    record = tmp_path / "inputs.json"
    given = {**SETTINGS, "method": "distill-encoder", "work_folder": tmp_path}
    content = record.read_text()
    record.write_text(content[:40])
    with pytest.raises(InputError, match=r"inputs\.json: cannot be read .*; give another work folder"):
        realign(merged, experts, rooms, **given)
    record.unlink()  # as in a work folder of an earlier version
    realign(merged, experts, rooms, **given)
    assert record.read_text() == content


def test_a_stage_of_a_recipe_needs_no_record(
    merged: SimoModel,
    experts: dict[str, SimoModel],
    rooms: DenseDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interrupted: Interrupted,
) -> None:
    """Its folder is named by all inputs, and may come from a version that recorded other things, or nothing."""
    from simomerge.recipes import stages

    for name, expert in experts.items():
        expert.save_pretrained(tmp_path / name / "model")
    merged.save_pretrained(tmp_path / "start" / "model")
    method = get_realignment("distill-encoder", **SETTINGS, retry=False)
    given = {"name": "a", "model": tmp_path / "start", "data": {}, "experts": {n: tmp_path / n for n in experts}}
    monkeypatch.setattr(stages, "open_data", lambda _: rooms)
    stage, work = stages.Realign(**given, method=method), tmp_path / "work"
    with interrupted(4), pytest.raises(KeyboardInterrupt):
        stage.work(work)
    assert {path.name for path in work.iterdir()} == {"predictions", "state.safetensors"}
    (work / "inputs.json").write_text('{"method": "of another version"}')
    with interrupted(4):  # three steps are left
        _, resumed = stage.work(work)
    assert resumed is not None
    assert same(weights(resumed), weights(realign(merged, experts, rooms, method=method)))


@pytest.mark.parametrize("steps", [3, 5])
def test_a_state_of_more_steps_is_refused(
    merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset, tmp_path: Path, steps: int
) -> None:
    """The folder of a stage or of `lpft` has no record, so the state itself is checked."""
    for count in (6, steps):
        method = get_realignment("distill-encoder", **{**SETTINGS, "steps": count}, retry=False)
        inputs = prepared(method, merged, tmp_path, experts=experts, images=rooms)
        if count == 6:
            method.apply(merged, inputs)
    message = (
        rf"state\.safetensors: cannot resume from it \(it is at step 6, and this training has {steps} steps\);"
        " remove it to train from the start"
    )
    with pytest.raises(InputError, match=message):
        method.apply(merged, inputs)
    (tmp_path / "state.safetensors").unlink()
    assert method.apply(merged, inputs).provenance["realign"]["steps"] == steps
