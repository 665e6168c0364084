"""Head re-alignment: the encoder does not move, every head moves by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from simomerge.assembly.realign import realign
from simomerge.datasets import DenseDataset
from simomerge.models.model import SimoModel
from simomerge.training.evaluate import evaluate

from .contract import SETTINGS, same, weights


def test_it_lowers_the_error_on_the_images_it_saw(merged: SimoModel, rooms: DenseDataset) -> None:
    result = realign(merged, data=rooms, method="heads", training=replace(SETTINGS, steps=40, lr=5e-2))
    before, after = evaluate(merged, rooms), evaluate(result, rooms)
    assert after["depth"]["abs_err"] < 0.5 * before["depth"]["abs_err"]
    assert after["segmentation"]["miou"] > before["segmentation"]["miou"] + 5


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
