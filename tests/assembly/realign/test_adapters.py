"""Representation re-alignment: adapters and heads learn, the backbone does not."""

from __future__ import annotations

import pytest
import torch

from simomerge.assembly.realign import realign
from simomerge.core.errors import InputError
from simomerge.datasets import DenseDataset
from simomerge.models.model import SimoModel

from .contract import SETTINGS, same, weights


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


@pytest.mark.parametrize(("rank", "activation"), [(0, "none"), (2, "gelu")])
def test_a_wrong_rank_or_activation_is_named(
    merged: SimoModel, rooms: DenseDataset, rank: int, activation: str
) -> None:
    with pytest.raises(InputError, match="adapter"):
        realign(merged, data=rooms, method="adapters", training=SETTINGS, rank=rank, activation=activation)
