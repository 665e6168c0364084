"""Head re-alignment: the encoder does not move, every head moves by itself."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from simomerge.assembly.realign import realign, training
from simomerge.assembly.realign.distillation import ExpertDistances
from simomerge.assembly.realign.teacher import matching_experts
from simomerge.core.errors import InputError
from simomerge.datasets import DenseDataset
from simomerge.models.model import SimoModel
from simomerge.training.evaluate import evaluate

from .contract import SETTINGS, same, weights


def test_it_lowers_the_error_on_the_images_it_saw(merged: SimoModel, rooms: DenseDataset) -> None:
    result = realign(merged, data=rooms, method="heads", training=replace(SETTINGS, steps=40, lr=5e-2))
    before, after = evaluate(merged, rooms), evaluate(result, rooms)
    assert after["depth"]["abs_err"] < 0.5 * before["depth"]["abs_err"]
    assert after["segmentation"]["miou"] > before["segmentation"]["miou"] + 5


@pytest.mark.parametrize("held_out", [["an image", "another"], []])
def test_a_distilled_head_is_kept_only_if_it_came_closer_to_its_expert(
    held_out: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([{"depth": 0.5, "edges": 2.0, "same": 3.0}, {"depth": 0.2, "edges": 2.1, "same": 3.0}])
    model = SimpleNamespace(heads=nn.ModuleDict({name: nn.Linear(1, 1) for name in ("depth", "edges", "same")}))
    before = {name: head.weight.item() for name, head in model.heads.items()}

    def train(given: Any, inputs: SimpleNamespace, settings: Any, criterion: str) -> dict[str, Any]:
        assert (inputs.data, settings, criterion) == ("the others", SETTINGS, "distance")
        for head in given.heads.values():
            nn.init.constant_(head.weight, 7.0)
        return {"steps": 9}

    distances = SimpleNamespace(
        measured=lambda given, images: next(found) if images == held_out else None,
        least=lambda given, images: dict.fromkeys(before, 1e-6) if images == held_out else None,
        ratios=lambda *given: ExpertDistances.ratios(distances, *given),
    )
    for name, value in (
        ("TeacherPredictions", lambda *given: given[:2]),
        ("split_off", lambda given, share: ("the others", held_out) if given == ("images", {}) else None),
        ("ExpertDistances", lambda experts, batch_size: distances),
        ("train_heads", train),
        ("replace", lambda given, data: SimpleNamespace(data=data)),
    ):
        monkeypatch.setattr(training, name, value)
    inputs: Any = SimpleNamespace(images="images", experts={}, work_folder=Path("work"))
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter("always")
        made = training.distil_heads(model, inputs, SETTINGS, 0.25, "label")  # type: ignore[arg-type]
    after = {name: head.weight.item() for name, head in model.heads.items()}
    if not held_out:
        assert made == {"held_out_images": 0, "distance_ratio": {}, "steps": 9} and set(after.values()) == {7.0}
        return
    assert made == {"held_out_images": 2, "distance_ratio": {"depth": 0.4, "edges": 1.0, "same": 1.0}, "steps": 9}
    assert after == {"depth": 7.0, "edges": before["edges"], "same": 7.0}
    assert [str(one.message)[:52] for one in log] == ["label: on held-out images edges is 5.0 % further from"[:52]]


def test_two_heads_together_are_the_two_heads_alone(merged: SimoModel, rooms: DenseDataset) -> None:
    together = realign(merged, data=rooms, method="heads", training=SETTINGS)
    for name in merged.tasks:
        alone = realign(merged.select([name]), data=rooms, method="heads", training=SETTINGS)
        assert same(weights(alone.heads[name]), weights(together.heads[name])), name


def test_two_workers_give_what_one_gives(merged: SimoModel, rooms: DenseDataset, monkeypatch: Any) -> None:
    # Workers choose their precision themselves: compare in the one this machine trains in.
    monkeypatch.undo()
    one, two = (realign(merged, data=rooms, method="heads", training=SETTINGS, workers=workers) for workers in (1, 2))
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(two)[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_work_folder_keeps_the_features_and_nothing_is_encoded_twice(
    merged: SimoModel, rooms: DenseDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = realign(merged, data=rooms, method="heads", training=SETTINGS, work_folder=tmp_path / "work")
    assert (tmp_path / "work" / "features" / "features.json").is_file()
    monkeypatch.setattr(
        "simomerge.assembly.realign.training.cache_features", lambda *_, **__: pytest.fail("encoded again")
    )
    second = realign(merged, data=rooms, method="heads", training=SETTINGS, work_folder=tmp_path / "work")
    assert same(weights(first), weights(second))


@pytest.mark.parametrize("method", ["heads", "finetune"])
def test_labels_in_another_order_of_classes_are_refused(method: str, merged: SimoModel, rooms: DenseDataset) -> None:
    """The head would learn the order of the data, and the model would keep its own names."""
    task = merged.tasks["segmentation"]
    merged.tasks["segmentation"] = replace(task, classes=(*task.classes[1::-1], *task.classes[2:]))
    with pytest.raises(InputError, match="class 0 is 'floor' in the model, but 'wall' in the data, which has the same"):
        realign(merged, data=rooms, method=method, training=SETTINGS)


def test_an_expert_of_another_order_of_classes_is_refused(merged: SimoModel, experts: dict[str, SimoModel]) -> None:
    task = merged.tasks["segmentation"]
    experts["segmentation"].tasks["segmentation"] = replace(task, classes=task.classes[::-1])
    with pytest.raises(InputError, match="class 0 is 'wall' in the model, but 'rug' in the expert, which has the same"):
        matching_experts(merged, experts)
