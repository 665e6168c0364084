"""Representation re-alignment: adapters and heads learn, the backbone does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from simomerge.assembly.realign import realign
from simomerge.assembly.realign.teacher import check_heads
from simomerge.core.errors import InputError
from simomerge.datasets import DenseDataset
from simomerge.models.model import SimoModel

from .contract import SETTINGS, same, weights


def test_heads_that_are_not_the_experts_are_named_with_both_shapes() -> None:
    class Model:
        def __init__(self, size: int, **more: int) -> None:
            layers = {name: torch.nn.Linear(wide, 1, bias=False) for name, wide in {"a": size, **more}.items()}
            self.heads = {"depth": torch.nn.ModuleDict(layers)}

    check_heads(*_filled(Model(3), Model(3), 1, 1))
    for ours, theirs, message in (
        (Model(3), Model(4), r"a.weight: \(1, 3\) in the model, \(1, 4\) in the expert"),
        (Model(3, b=2), Model(3), r"b.weight: \(1, 2\) in the model, not there in the expert"),
        (Model(3), Model(3, b=2), r"b.weight: not there in the model, \(1, 2\) in the expert"),
    ):
        with pytest.raises(InputError, match=message):
            check_heads(*_filled(ours, theirs, 1, 1))
    with pytest.raises(InputError, match=r"a\.weight has other values"):
        check_heads(*_filled(Model(3), Model(3), 1, 1.1))


def _filled(model: Any, expert: Any, ours: float, theirs: float) -> tuple[Any, dict[str, Any]]:
    for one, value in ((model, ours), (expert, theirs)):
        for parameter in one.heads["depth"].parameters():
            torch.nn.init.constant_(parameter, value)
    return model, {"depth": expert}


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
