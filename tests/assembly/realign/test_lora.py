"""LoRA re-alignment: the trained low-rank changes are added to the weights, and the encoder is a plain one again."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Dinov2Model

from simomerge.assembly.realign import realign, training
from simomerge.assembly.realign.fold import Fold
from simomerge.assembly.realign.lora import lora_config, lora_layers
from simomerge.checkpoints import open_checkpoint
from simomerge.core.errors import InputError
from simomerge.datasets import DenseDataset
from simomerge.models.model import SimoModel
from simomerge.training.state import TrainingState

from .contract import SETTINGS, Killed, same, weights

LAYERS = 4 * 6  # of each block: query, key, value, output and the two of the MLP, whatever transformers calls them
IMAGES = torch.rand((3, 3, 24, 30), generator=torch.Generator().manual_seed(0))


def factors(backbone: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every layer that has LoRA."""
    return {
        name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for name, layer in backbone.named_modules()
        if hasattr(layer, "lora_A")
    }


def as_if_trained(backbone: nn.Module) -> None:
    """B is zero at the start; here it is not."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, b in factors(backbone).values():
            b.normal_(0, 0.05, generator=generator)


@pytest.fixture
def before_the_fold(monkeypatch: pytest.MonkeyPatch) -> list[SimoModel]:
    """Copies of the models as they were trained, LoRA still in them."""
    found: list[SimoModel] = []
    train = training.train_with_heads

    def keep(model: SimoModel, *arguments: Any, **named: Any) -> dict[str, Any]:
        cost = train(model, *arguments, **named)
        found.append(copy.deepcopy(model))
        return cost

    monkeypatch.setattr(training, "train_with_heads", keep)
    return found


# Folding ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_folded_encoder_computes_what_the_unfolded_does(merged: SimoModel) -> None:
    without = merged.encode(IMAGES)
    with lora_layers(merged.encoder, lora_config(merged.encoder, rank=3, alpha=5)):
        for ours, theirs in zip(merged.encode(IMAGES).maps, without.maps, strict=True):
            assert torch.equal(ours, theirs)  # it begins as nothing
        as_if_trained(merged.encoder.backbone)
        unfolded, logits = merged.encode(IMAGES), merged(IMAGES)
    folded = merged.encode(IMAGES)
    for ours, theirs, start in zip(folded.maps, unfolded.maps, without.maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        assert (theirs - start).abs().max() > 0.05
    torch.testing.assert_close(merged(IMAGES), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rank", "alpha", "scale"), [(3, None, 1.0), (2, 5, 2.5), (4, 1.5, 0.375)])
def test_folded_weights_are_the_weights_plus_the_scaled_product(
    merged: SimoModel, rank: int, alpha: float | None, scale: float
) -> None:
    before = weights(merged.encoder.backbone)
    with lora_layers(merged.encoder, lora_config(merged.encoder, rank, alpha)):
        as_if_trained(merged.encoder.backbone)
        learned = {name: (a.double(), b.double()) for name, (a, b) in factors(merged.encoder.backbone).items()}
    assert len(learned) == LAYERS
    for name, value in weights(merged.encoder.backbone).items():
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or layer not in learned:
            assert torch.equal(value, before[name]), name
            continue
        a, b = learned[layer]
        assert a.shape[0] == b.shape[1] == rank
        by_hand = before[name].double() + scale * b @ a
        torch.testing.assert_close(value.double(), by_hand, rtol=0, atol=1e-6, msg=name)


def test_nothing_of_lora_is_left(merged: SimoModel) -> None:
    backbone, blocks = merged.encoder.backbone, list(merged.encoder.layout.blocks)
    looks, names, attributes = str(merged), list(merged.state_dict()), set(vars(backbone))
    with lora_layers(merged.encoder, lora_config(merged.encoder, 2)):
        assert list(merged.state_dict()) != names
    assert (str(merged), list(merged.state_dict()), set(vars(backbone))) == (looks, names, attributes)
    assert merged.encoder.backbone is backbone
    assert all(now is then for now, then in zip(merged.encoder.layout.blocks, blocks, strict=True))


@torch.no_grad()
def test_copies_hear_their_own_blocks_during_and_after_lora(merged: SimoModel) -> None:
    with lora_layers(merged.encoder, lora_config(merged.encoder, 2)):
        as_if_trained(merged.encoder.backbone)
        during, expected = copy.deepcopy(merged), merged(IMAGES)
    after = copy.deepcopy(merged)
    merged.requires_grad_(False)
    for parameter in merged.parameters():
        parameter.zero_()
    torch.testing.assert_close(during(IMAGES), expected, rtol=0, atol=0)
    torch.testing.assert_close(after(IMAGES), expected, rtol=0, atol=1e-5)


# Training -----------------------------------------------------------------------------------------------


def test_lora_and_heads_learn_and_nothing_else(
    merged: SimoModel, rooms: DenseDataset, before_the_fold: list[SimoModel]
) -> None:
    before = weights(merged)
    result = realign(merged, data=rooms, method="lora", training=SETTINGS, rank=3)
    assert same(before, weights(merged)) and "realign" not in merged.provenance
    (trained,) = before_the_fold
    learned = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    assert learned and all(".lora_" in name or name.startswith("heads.") for name in learned)
    for name, value in trained.encoder.state_dict(prefix="encoder.").items():
        if name not in learned:
            assert torch.equal(value, before[name.replace(".base_layer", "")]), name
    assert all(b.abs().max() > 0 for _, b in factors(trained.encoder.backbone).values())
    for name in merged.tasks:
        assert not torch.equal(merged.heads[name].output.weight, result.heads[name].output.weight)
    with torch.no_grad():
        torch.testing.assert_close(result(IMAGES), trained.eval()(IMAGES), rtol=0, atol=1e-5)
    assert not result.training


def test_the_result_is_a_plain_model_with_the_same_names(merged: SimoModel, rooms: DenseDataset) -> None:
    result = realign(merged, data=rooms, method="lora", training=SETTINGS, rank=3)
    assert list(result.state_dict()) == list(merged.state_dict()) and str(result) == str(merged)
    assert result.encoder.adapters is None and result.encoder_fingerprint() != merged.encoder_fingerprint()
    ours = {p.data_ptr() for p in merged.parameters()}
    assert not any(p.data_ptr() in ours for p in result.parameters())


def test_lora_learns_what_heads_alone_do_not(merged: SimoModel, rooms: DenseDataset) -> None:
    """LoRA of no rate to speak of leaves the heads alone."""
    task = merged.tasks["segmentation"]
    batch = {key: torch.stack([rooms[i][key] for i in range(8)]) for key in ("image", "segmentation")}
    losses = {}
    for encoder_lr in (1e-9, 3e-2):
        settings = replace(SETTINGS, steps=40, batch_size=8, lr=1e-4, encoder_lr=encoder_lr)
        result = realign(
            merged, data=rooms, method="lora", training=settings, rank=4
        ).train()  # so few steps leave the statistics behind
        with torch.no_grad():
            losses[encoder_lr] = float(task.loss(result(batch["image"])["segmentation"], batch["segmentation"]))
    assert losses[3e-2] < 0.9 * losses[1e-9]


def test_the_provenance_records_alpha_and_targets(merged: SimoModel, rooms: DenseDataset) -> None:
    result = realign(merged, data=rooms, method="lora", training=SETTINGS, rank=3)
    again = realign(result, data=rooms, method="lora", training=SETTINGS, rank=2, alpha=8, targets=("fc2", "mlp.fc1"))
    record = again.provenance["realign"]
    assert (record["alpha"], record["targets"]) == (8, ["fc2", "mlp.fc1"])
    assert record["after"] == result.provenance["realign"] and again.provenance["merge"] == {"method": "average"}


def test_only_the_targets_change(merged: SimoModel, rooms: DenseDataset) -> None:
    result = realign(merged, data=rooms, method="lora", training=SETTINGS, rank=2, targets=["fc2", "mlp.fc1"])
    after = weights(result.encoder.backbone)
    changed = {n for n, value in weights(merged.encoder.backbone).items() if not torch.equal(value, after[n])}
    assert len(changed) == 8 and all(name.endswith(("mlp.fc1.weight", "mlp.fc2.weight")) for name in changed)


@pytest.mark.parametrize("method", ["lora", "distill-lora"])
@pytest.mark.filterwarnings("ignore:.*the fold stays close to the unfolded head:UserWarning")
def test_every_linear_layer_changes_and_nothing_else(
    merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset, method: str
) -> None:
    inputs = {"data": rooms} if method == "lora" else {"experts": experts, "images": rooms, "hold_out": 0}
    result = realign(merged, **inputs, method=method, training=SETTINGS, rank=3)
    after = weights(result.encoder.backbone)
    changed = {n for n, value in weights(merged.encoder.backbone).items() if not torch.equal(value, after[n])}
    assert len(changed) == LAYERS and "activation" not in result.provenance["realign"]


def test_the_state_of_a_killed_run_holds_only_what_learns(
    merged: SimoModel, rooms: DenseDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_and_die(self: Any, log: Any) -> None:
        self.save(log)
        raise Killed

    monkeypatch.setattr(TrainingState, "save_once_in_a_while", save_and_die)
    with pytest.raises(Killed):
        realign(merged, data=rooms, method="lora", training=SETTINGS, rank=3, work_folder=tmp_path)
    names = list(open_checkpoint(tmp_path / "state.safetensors"))
    assert not any(name.endswith("base_layer.weight") for name in names)


def test_transformers_loads_the_encoder(merged: SimoModel, rooms: DenseDataset, tmp_path: Path) -> None:
    result = realign(merged, data=rooms, method="lora", training=SETTINGS, rank=3)
    result.save_pretrained(tmp_path / "scene")
    plain, loading = Dinov2Model.from_pretrained(tmp_path / "scene" / "encoder", output_loading_info=True)
    assert not loading["unexpected_keys"] and same(weights(plain), weights(result.encoder.backbone))


# Distilling ---------------------------------------------------------------------------------------------


def test_distillation_refuses_what_lora_has_not_before_it_folds(
    merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fold, "apply", lambda *_, **__: pytest.fail("folded"))
    with pytest.raises(InputError, match="activation does nothing unless trains is adapters"):
        realign(merged, experts, rooms, method="distill", training=SETTINGS, trains="lora", activation="relu")
    with pytest.raises(InputError, match="rank must be a number at least 1, got 0"):
        realign(merged, experts, rooms, method="distill", training=SETTINGS, trains="lora", rank=0)
    wrong: Any = "dora"
    with pytest.raises(InputError, match="trains must be one of heads, adapters, lora, encoder, got 'dora'"):
        realign(merged, experts, rooms, method="distill", training=SETTINGS, trains=wrong)
    merged.encoder.add_adapters(2)
    with pytest.raises(InputError, match="has adapters already; distill its heads alone"):
        realign(merged, experts, rooms, method="distill", training=SETTINGS, trains="lora")


# Mistakes -----------------------------------------------------------------------------------------------

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"rank": 0}, "rank must be a number at least 1, got 0"),
    ({"alpha": 0}, "alpha must be a number above 0, got 0"),
    ({"alpha": float("nan")}, "alpha must be .*got nan"),
    (
        {"targets": ["fc1", "c1"]},
        "no linear layer or .* ends in 'c1'; name some of .*, fc2, projection, or 'all-linear'",
    ),
    ({"targets": "norm1"}, "no linear layer or .* ends in 'norm1'.*or 'all-linear'"),
    ({"targets": []}, "none named; name some of .*fc1"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_a_mistake_is_named(merged: SimoModel, rooms: DenseDataset, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        realign(merged, data=rooms, method="lora", training=SETTINGS, **options)


def test_an_encoder_without_layers_that_lora_can_change_is_refused(merged: SimoModel, rooms: DenseDataset) -> None:
    merged.encoder.backbone = nn.Sequential(nn.Conv2d(3, 9, 3, groups=3), nn.LayerNorm(8))
    with pytest.raises(InputError, match="Sequential has no linear layers and no convolutions of one group, and LoRA"):
        realign(merged, data=rooms, method="lora", training=SETTINGS)


def test_without_peft_the_command_that_installs_it_is_named(
    merged: SimoModel, rooms: DenseDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r'LoRA needs peft .*: pip install .*\[lora\]"'):
        realign(merged, data=rooms, method="lora", training=SETTINGS)
