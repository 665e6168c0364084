"""`auto` within a time budget: as many steps of distillation as fit, or the fold alone."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from simomerge.assembly import budget
from simomerge.assembly import merge as merging
from simomerge.assembly.budget import distil_until
from simomerge.assembly.realign import Distill, Fold, Inputs, realign
from simomerge.assembly.realign.distillation import Distilling
from simomerge.assembly.realign.predictions import UnlabelledImages
from simomerge.core.errors import InputError
from simomerge.datasets.pictures import Images, as_images
from simomerge.datasets.tasks import Task
from simomerge.models.model import SimoModel

from .realign.contract import same, weights

IMAGES = list(np.repeat(np.repeat(np.random.default_rng(0).random((16, 4, 4, 3), np.float32), 6, 1), 8, 2))
pytestmark = [
    pytest.mark.usefixtures("float32"),
    pytest.mark.filterwarnings("ignore:.*the fold stays close to the unfolded head:UserWarning"),
]


@pytest.fixture(scope="module")
def experts(make_model: Callable[..., SimoModel]) -> dict[str, SimoModel]:
    expert = make_model([Task("depth")], "dpt", 1)
    with torch.no_grad():
        for parameter in expert.encoder.backbone.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return {"depth": expert}


@pytest.fixture(scope="module")
def folded(make_model: Callable[..., SimoModel], experts: dict[str, SimoModel]) -> SimoModel:
    merged = make_model([Task("depth")], "dpt", 1)
    merged.provenance = {"merge": {"method": "average"}}
    return realign(merged, experts, IMAGES, ridge="none")


def images() -> Images:
    return as_images(IMAGES)


def test_as_many_steps_are_made_as_fit(
    folded: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "LEAST_STEPS", 1)
    monkeypatch.setattr(budget, "MOST_STEPS", 60)
    began = time.monotonic()
    result = distil_until(began + 30, folded, folded, experts, images())
    assert time.monotonic() - began < 45  # a slow machine makes fewer steps
    choice, record = result.provenance["auto"], result.provenance["realign"]
    assert choice == {"chosen": "distill-encoder", "steps": record["steps"]} and record["steps"] > 8
    assert record["after"]["method"] == "fold" and record["trains"] == "encoder"
    assert all(ratio < 1 for ratio in record["distance_ratio"].values())


def test_all_its_trainings_use_the_stored_predictions(
    folded: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The predictions themselves take the space that was free at the first training."""
    monkeypatch.setattr(budget, "LEAST_STEPS", 1)
    monkeypatch.setattr(budget, "MOST_STEPS", 12)
    needed = UnlabelledImages(images(), experts).bytes_of_predictions

    def usage(folder: Path) -> SimpleNamespace:
        return SimpleNamespace(free=needed - sum(each.stat().st_size for each in folder.glob("predictions/*.npy")))

    monkeypatch.setattr("simomerge.assembly.realign.distill.shutil", SimpleNamespace(disk_usage=usage))
    stored: list[bool] = []
    train = Distilling.train

    def note(self: Distilling, *given: Any) -> dict[str, Any]:
        stored.append(self.stored)
        return train(self, *given)

    monkeypatch.setattr(Distilling, "train", note)
    result = distil_until(time.monotonic() + 60, folded, folded, experts, images())
    assert result.provenance["auto"] == {"chosen": "distill-encoder", "steps": 12}
    assert stored == [True] * 5  # one to begin with, three timed ones and the planned one


def test_without_time_the_fold_stays(folded: SimoModel, experts: dict[str, SimoModel]) -> None:
    result = distil_until(time.monotonic() + 0.01, folded, folded, experts, images())
    assert same(weights(result), weights(folded))
    assert result.provenance["auto"] == {
        "chosen": "fold-cross",
        "reason": "the time does not suffice for distillation",
    }
    assert result.provenance["realign"] == folded.provenance["realign"]


def test_distillation_that_does_only_harm_is_not_chosen(
    folded: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    near = realign(folded, experts, IMAGES, method="distill-encoder", steps=60, batch_size=8)
    made = budget.get_realignment
    monkeypatch.setattr(budget, "LEAST_STEPS", 1)
    monkeypatch.setattr(budget, "get_realignment", lambda name, steps, **_: made(name, steps=min(steps, 12), lr=0.9))
    result = distil_until(time.monotonic() + 60, near, near, experts, images())  # of which 12 steps take a little
    assert result.provenance["auto"]["reason"] == "distillation came no closer to the experts"
    assert same(weights(result), weights(near))


def test_distillation_that_fails_leaves_the_fold(
    folded: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> SimoModel:
        raise InputError("the disk is full.")

    monkeypatch.setattr(budget, "_distil", fail)
    with pytest.warns(UserWarning, match=r"auto keeps the fold, because distillation failed: the disk is full\."):
        result = distil_until(time.monotonic() + 6, folded, folded, experts, images())
    assert same(weights(result), weights(folded)) and "disk is full" in result.provenance["auto"]["reason"]


def test_auto_hands_its_time_on(
    folded: SimoModel,
    experts: dict[str, SimoModel],
    make_model: Callable[..., SimoModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[Any] = []

    def keep(ends: float, model: SimoModel, merged: SimoModel, experts: Any, pictures: Images) -> SimoModel:
        assert "realign" not in merged.provenance
        given.append((ends, len(pictures), model.provenance["realign"]["method"]))
        return model

    monkeypatch.setattr(merging, "distil_until", keep)
    monkeypatch.setattr(merging, "learn_coefficients", lambda *_, **__: merging.TaskArithmetic(scale=0.35))
    monkeypatch.setattr(merging, "AUTO_METHODS", merging.AUTO_METHODS[:1])
    began = time.monotonic()
    merging.merge(make_model({}), experts, "auto", images=IMAGES, minutes=2)
    ((ends, count, method),) = given
    assert began + 120 <= ends < began + 121 and count == 16 and method == "fold"
    merging.merge(make_model({}), experts, "auto", images=IMAGES)
    assert len(given) == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mistakes_are_named(experts: dict[str, SimoModel], make_model: Callable[..., SimoModel]) -> None:
    base = make_model({})
    with pytest.raises(InputError, match="minutes is the time of method='auto'"):
        merging.merge(base, experts, "ties", minutes=2)
    with pytest.raises(InputError, match="minutes is -1; give a number above 0"):
        merging.merge(base, experts, "auto", images=IMAGES, minutes=-1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_auto_folds_and_distils_at_the_size_at_which_it_chooses(
    experts: dict[str, SimoModel], make_model: Callable[..., SimoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = copy.deepcopy(experts["depth"])
    trained.provenance = {**trained.provenance, "training": {"size": [16, 16]}}
    sizes: dict[str, set[tuple[int, ...]]] = {}

    def note(change: Any, self: Any, model: SimoModel, inputs: Inputs) -> Any:
        found = {tuple(inputs.images.image(index).shape[1:]) for index in range(len(inputs.images))}
        sizes.setdefault(self.name, set()).update(found)
        return change(self, model, inputs)

    for kind in (Fold, Distill):
        change = kind.change
        monkeypatch.setattr(kind, "change", lambda *given, change=change: note(change, *given))
    monkeypatch.setattr(merging, "learn_coefficients", lambda *_, **__: merging.TaskArithmetic(scale=0.35))
    monkeypatch.setattr(merging, "AUTO_METHODS", merging.AUTO_METHODS[:1])
    monkeypatch.setattr(budget, "LEAST_STEPS", 1)
    monkeypatch.setattr(budget, "MOST_STEPS", 2)
    for size, seen in (("own", (24, 32)), (None, (16, 16))):
        sizes.clear()
        merging.merge(make_model({}), {"depth": trained}, "auto", images=IMAGES, size=size, minutes=1)
        assert sizes == {"fold": {seen}, "distill": {seen}}
