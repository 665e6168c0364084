"""The playground computes what `merge`, `realign` and `predict` compute, and keeps no more than it says."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from simomerge.assembly.merge import merge
from simomerge.assembly.realign import realign
from simomerge.core.errors import InputError
from simomerge.models.model import SimoModel
from simomerge.playground.opening import Opened
from simomerge.playground.workshop import EXPERTS, MERGED, MODEL, REPAIRED, Choice, Workshop, has_scale

PLAIN = Choice(heads="the experts' heads", scale=0.5)


@pytest.fixture
def workshop(opened: Opened, pictures: list[np.ndarray]) -> Workshop:
    return Workshop(opened, pictures)


def test_the_columns_are_those_of_the_library(workshop: Workshop, opened: Opened, pictures: list[np.ndarray]) -> None:
    photo = pictures[0]
    found = workshop.look(photo, Choice(scale=0.5)).columns
    merged = merge(opened.base, opened.experts, scale=0.5)
    folded = realign(merged, opened.experts, pictures)
    wanted = {
        EXPERTS: {task: expert.predict(photo)[task] for task, expert in opened.experts.items()},
        MERGED: merged.predict(photo),
        REPAIRED: folded.predict(photo),
    }
    assert list(found) == list(wanted)
    for column, maps in wanted.items():
        for task, values in maps.items():
            np.testing.assert_allclose(found[column][task], values, rtol=1e-5, atol=1e-5, err_msg=f"{column} {task}")
    assert not np.allclose(found[MERGED]["depth"], found[REPAIRED]["depth"])


def test_distances_are_those_from_the_experts(workshop: Workshop, pictures: list[np.ndarray]) -> None:
    look = workshop.look(pictures[1], PLAIN)
    expert, merged = look.columns[EXPERTS]["depth"], look.columns[MERGED]["depth"]
    assert look.distances[MERGED]["depth"] == pytest.approx(np.abs(expert - merged)[expert > 0].mean(), rel=1e-4)
    overlaps = []
    for label in range(3):
        a, b = look.columns[EXPERTS]["parts"] == label, look.columns[MERGED]["parts"] == label
        if (a | b).any():
            overlaps.append((a & b).sum() / (a | b).sum())
    assert look.distances[MERGED]["parts"] == pytest.approx(100 * np.mean(overlaps), rel=1e-4)
    assert EXPERTS not in look.distances and look.agreement == {}


def test_a_merge_at_scale_one_of_one_expert_is_the_expert(opened: Opened, pictures: list[np.ndarray]) -> None:
    alone = Opened("one", opened.base, {"depth": opened.experts["depth"]})
    look = Workshop(alone).look(pictures[0], dataclasses.replace(PLAIN, scale=1.0))
    np.testing.assert_allclose(look.columns[MERGED]["depth"], look.columns[EXPERTS]["depth"], rtol=1e-4, atol=1e-5)
    assert look.distances[MERGED]["depth"] == pytest.approx(0, abs=1e-4)


def test_agreement_is_judged_on_eight_pictures_or_more(workshop: Workshop, pictures: list[np.ndarray]) -> None:
    enough = workshop.look(pictures[0], Choice(), pictures)
    assert set(enough.agreement) == {MERGED, REPAIRED} and set(enough.agreement[MERGED]) == {"depth", "parts"}
    assert all(value <= 1 for values in enough.agreement.values() for value in values.values())
    few = workshop.look(pictures[0], Choice(), pictures[:7])
    assert few.agreement == {} and any("7 images are few" in note for note in few.notes)
    again = workshop.look(pictures[0], Choice(), pictures[:7])
    assert again.notes == few.notes  # also when what the experts said is remembered


def test_a_photo_of_another_size_is_seen_at_the_training_size(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    predict = SimoModel.predict

    def recorded(self: SimoModel, image: Any, **given: Any) -> Any:
        sizes.append(given["size"])
        return predict(self, image, **given)

    monkeypatch.setattr(SimoModel, "predict", recorded)
    look = workshop.look(np.zeros((80, 160, 3), np.uint8), PLAIN)
    assert set(sizes) == {(25, 51)}  # 32 x 40 pixels in the shape of the photo
    assert look.columns[MERGED]["depth"].shape == (80, 160)


def test_caches_are_bounded(workshop: Workshop) -> None:
    generator = np.random.default_rng(1)
    for number in range(10):
        photo = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        workshop.look(photo, dataclasses.replace(PLAIN, scale=number / 10))
    kept = [len(cache._kept) for cache in (workshop._predicted, workshop._pictures, workshop._merges)]
    assert kept == [8, 0, 2]


def test_the_result_is_the_model_that_was_shown(workshop: Workshop, pictures: list[np.ndarray]) -> None:
    choice = Choice("ties", 0.7, "folded across taps")
    shown, model = workshop.look(pictures[2], choice), workshop.result(choice)
    for task, values in model.predict(pictures[2]).items():
        np.testing.assert_allclose(shown.columns[REPAIRED][task], values, rtol=1e-4, atol=1e-4)
    assert model.provenance["merge"]["scale"] == 0.7
    assert model.provenance["realign"]["variant"] == "cross-tap"


def test_the_experts_stay_as_they_were(workshop: Workshop, opened: Opened, pictures: list[np.ndarray]) -> None:
    before = {task: {k: v.clone() for k, v in expert.state_dict().items()} for task, expert in opened.experts.items()}
    workshop.look(pictures[0], Choice("ties", 1.0, "folded"))
    for task, expert in opened.experts.items():
        assert all(torch.equal(before[task][name], value) for name, value in expert.state_dict().items())


def test_methods_are_those_that_work_without_images(workshop: Workshop) -> None:
    assert {"task-arithmetic", "ties", "slerp"} <= set(workshop.methods)  # slerp takes two experts
    assert not {"regmean", "fisher"} & set(workshop.methods)
    assert has_scale("ties") and not has_scale("average") and not has_scale("None")


def test_a_fold_without_pictures_is_refused(opened: Opened, pictures: list[np.ndarray]) -> None:
    with pytest.raises(InputError, match="a fold needs pictures"):
        Workshop(opened).look(pictures[0], Choice())


def test_a_finished_model_is_shown_alone(opened: Opened, pictures: list[np.ndarray]) -> None:
    model = merge(opened.base, opened.experts, scale=0.5)
    workshop = Workshop(Opened("scene", model=model))
    look = workshop.look(pictures[0], PLAIN)
    assert list(look.columns) == [MODEL] and look.distances == {} and not workshop.can_merge
    assert workshop.result(PLAIN) is model


def test_the_fixtures_are_not_trivial(workshop: Workshop, pictures: list[np.ndarray]) -> None:
    look = workshop.look(pictures[0], PLAIN)
    assert np.ptp(look.columns[EXPERTS]["depth"]) > 0.5 and look.distances[MERGED]["depth"] > 0.01
    assert len(np.unique(look.columns[EXPERTS]["parts"])) > 1
