"""Representation re-alignment: adapters and heads learn, the backbone does not."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from simomerge.assembly.realign import realign
from simomerge.core.errors import InputError
from simomerge.datasets import DenseDataset
from simomerge.models.model import SimoModel

from .conftest import SETTINGS


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_adapters_and_heads_learn_and_the_backbone_does_not(
    merged: SimoModel, rooms: DenseDataset, activation: str
) -> None:
    before = weights(merged)
    result = realign(merged, data=rooms, method="adapters", training=SETTINGS, rank=3, activation=activation)
    assert same(before, weights(merged)) and merged.encoder.adapters is None and "realign" not in merged.provenance
    assert same(weights(merged.encoder.backbone), weights(result.encoder.backbone))
    assert result.encoder.adapters is not None and len(result.encoder.adapters) == 4
    for adapter in result.encoder.adapters:
        assert adapter.up.weight.shape == (32, 3) and adapter.up.weight.abs().max() > 0  # zero at the start
    for name in merged.tasks:
        assert not torch.equal(merged.heads[name].output.weight, result.heads[name].output.weight)
    assert not result.training


def test_the_provenance_says_all_that_was_done(merged: SimoModel, rooms: DenseDataset) -> None:
    record = realign(merged, data=rooms, method="adapters", training=SETTINGS, rank=3).provenance["realign"]
    assert 0 < record.pop("seconds") < 600
    heads = sum(p.numel() for p in merged.heads.parameters())
    assert record == {
        "method": "adapters",
        "rank": 3,
        "activation": "none",
        **asdict(SETTINGS),
        "last_blocks": 0,
        "checkpointing": False,
        "changes_encoder": True,
        "labelled_images": 8,
        "steps": SETTINGS.steps,
        "trained_parameters": heads + 4 * 2 * 32 * 3,
    }


def test_saved_and_loaded_it_predicts_the_same(merged: SimoModel, rooms: DenseDataset, tmp_path: Path) -> None:
    result = realign(merged, data=rooms, method="adapters", training=SETTINGS, rank=3, activation="relu")
    result.save_pretrained(tmp_path / "scene")
    again = SimoModel.from_pretrained(tmp_path / "scene")
    image = rooms[0]["image"]
    expected, without = result.predict(image), merged.predict(image)
    for name, values in again.predict(image).items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)
    assert any(not np.array_equal(expected[name], without[name]) for name in expected)
    assert again.provenance == result.provenance


def test_the_seed_decides_everything(merged: SimoModel, rooms: DenseDataset) -> None:
    torch.rand(7)
    first = realign(merged, data=rooms, method="adapters", training=SETTINGS, rank=2)
    torch.rand(3)
    assert same(weights(first), weights(realign(merged, data=rooms, method="adapters", training=SETTINGS, rank=2)))


def test_a_model_that_has_adapters_is_refused(merged: SimoModel, rooms: DenseDataset) -> None:
    merged.encoder.add_adapters(2)
    with pytest.raises(InputError, match="has adapters already"):
        realign(merged, data=rooms, method="adapters", training=SETTINGS)


def test_missing_labels_are_named(merged: SimoModel, rooms: DenseDataset) -> None:
    with pytest.raises(InputError, match=r"'adapters' needs labels of every task.*segmentation\."):
        realign(merged, data=rooms.select(["depth"]), method="adapters", training=SETTINGS)


@pytest.mark.parametrize(("rank", "activation"), [(0, "none"), (2, "gelu")])
def test_a_wrong_rank_or_activation_is_named(
    merged: SimoModel, rooms: DenseDataset, rank: int, activation: str
) -> None:
    with pytest.raises(InputError, match="adapter"):
        realign(merged, data=rooms, method="adapters", training=SETTINGS, rank=rank, activation=activation)
