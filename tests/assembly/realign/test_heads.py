"""Head re-alignment: the encoder does not move, every head moves by itself."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simomerge.assembly.realign import realign
from simomerge.core.errors import InputError
from simomerge.datasets import DenseDataset
from simomerge.models.model import SimoModel
from simomerge.training.evaluate import evaluate

from .conftest import SETTINGS


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def test_heads_change_and_the_encoder_and_the_model_given_do_not(merged: SimoModel, rooms: DenseDataset) -> None:
    before, provenance = weights(merged), copy.deepcopy(merged.provenance)
    result = realign(merged, data=rooms, method="heads", training=SETTINGS)
    assert same(before, weights(merged)) and merged.provenance == provenance
    assert same(weights(merged.encoder), weights(result.encoder))
    assert result.encoder_fingerprint() == merged.encoder_fingerprint()
    assert not any(p.data_ptr() == q.data_ptr() for p in result.parameters() for q in merged.parameters())
    for name in merged.tasks:
        assert not torch.equal(merged.heads[name].output.weight, result.heads[name].output.weight)
    assert list(result.tasks) == list(merged.tasks) and not result.training


def test_it_lowers_the_error_on_the_images_it_saw(merged: SimoModel, rooms: DenseDataset) -> None:
    result = realign(merged, data=rooms, method="heads", training=replace(SETTINGS, steps=40, lr=5e-2))
    before, after = evaluate(merged, rooms), evaluate(result, rooms)
    assert after["depth"]["abs_err"] < 0.5 * before["depth"]["abs_err"]
    assert after["segmentation"]["miou"] > before["segmentation"]["miou"] + 5


def test_the_provenance_says_all_that_was_done(merged: SimoModel, rooms: DenseDataset) -> None:
    record = realign(merged, data=rooms, method="heads", training=SETTINGS).provenance
    assert record["merge"] == {"method": "average"}
    seconds = record["realign"].pop("seconds")
    assert 0 < seconds < 600
    assert record["realign"] == {
        "method": "heads",
        **asdict(SETTINGS),
        "changes_encoder": False,
        "labelled_images": 8,
        "steps": 2 * SETTINGS.steps,
        "trained_parameters": sum(p.numel() for p in merged.heads.parameters()),
    }


def test_the_record_survives_the_disk(merged: SimoModel, rooms: DenseDataset, tmp_path: Path) -> None:
    result = realign(merged, data=rooms, method="heads", training=SETTINGS)
    result.save_pretrained(tmp_path / "scene")
    again = SimoModel.from_pretrained(tmp_path / "scene")
    assert again.provenance == result.provenance
    assert same(weights(again.heads), weights(result.heads))


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


def test_missing_labels_are_named(merged: SimoModel, rooms: DenseDataset) -> None:
    with pytest.raises(InputError, match=r"'heads' needs labels of every task.*segmentation\."):
        realign(merged, data=rooms.select(["depth"]), method="heads", training=SETTINGS)


@pytest.mark.parametrize("method", ["heads", "adapters"])
def test_a_model_without_heads_is_refused(merged: SimoModel, rooms: DenseDataset, method: str) -> None:
    with pytest.raises(InputError, match="no heads"):
        realign(SimoModel(merged.encoder, {}, {}), data=rooms, method=method, training=SETTINGS)


def test_realign_finds_the_method_by_name(merged: SimoModel, rooms: DenseDataset) -> None:
    by_name = realign(merged, data=rooms, method="heads", training=SETTINGS)
    assert same(weights(by_name), weights(realign(merged, data=rooms, method="heads", training=SETTINGS)))
    with pytest.raises(InputError, match="no re-alignment 'head': did you mean 'heads'"):
        realign(merged, data=rooms, method="head")
