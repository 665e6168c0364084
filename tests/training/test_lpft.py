"""LP-FT: heads first, on a frozen base; then heads and encoder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from simomerge.core.errors import InputError
from simomerge.datasets import DenseDataset, random_flip
from simomerge.datasets.augment import augment
from simomerge.datasets.batches import training_batches
from simomerge.models.encoders import load_encoder
from simomerge.models.heads import build_head
from simomerge.models.model import SimoModel
from simomerge.training.lpft import finetune, fresh_head, lpft, trainable_parameters
from simomerge.training.lpft import lpft as lpft_function
from simomerge.training.settings import TrainSettings, TuneOptions

PROBE = TrainSettings(steps=4, batch_size=4, lr=1e-2)
TUNE = TrainSettings(steps=3, batch_size=4, lr=1e-2, encoder_lr=1e-3)
MODULE = sys.modules[lpft_function.__module__]


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def test_the_first_phase_keeps_the_encoder_and_the_second_trains_it(
    make_model: Callable[..., SimoModel], rooms: DenseDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = rooms.select(["depth", "edges"])
    model = make_model(data.tasks)
    base, heads = weights(model.encoder), {name: weights(head) for name, head in model.heads.items()}
    between: dict[str, Any] = {}
    finetune = MODULE.finetune

    def watched(tuned: SimoModel, *arguments: Any, **more: Any) -> Any:
        between["encoder"] = weights(tuned.encoder)
        between["heads"] = {name: weights(head) for name, head in tuned.heads.items()}
        return finetune(tuned, *arguments, **more)

    monkeypatch.setattr(MODULE, "finetune", watched)
    logs = lpft(model, data, PROBE, TUNE, work_folder=tmp_path / "work")
    assert {name: log.steps for name, log in logs.items()} == {"probe/depth": 4, "probe/edges": 4, "tune": 3}
    assert set(logs["tune"].losses) == {"depth", "edges"}
    assert same(base, between["encoder"])
    for name in data.tasks:
        assert not same(heads[name], between["heads"][name])
        assert not same(between["heads"][name], weights(model.heads[name]))
    after = weights(model.encoder)
    moved = {name for name in base if not torch.equal(base[name], after[name])}
    assert all(any(f".layer.{block}." in name for name in moved) for block in range(4))


def test_cached_features_are_not_computed_again(
    make_model: Callable[..., SimoModel], rooms: DenseDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = rooms.select(["depth"])
    lpft(make_model(data.tasks), data, PROBE, TUNE, work_folder=tmp_path)
    monkeypatch.setattr(MODULE, "cache_features", lambda *_, **__: pytest.fail("encoded again"))
    lpft(make_model(data.tasks), data, PROBE, TUNE, work_folder=tmp_path)


@pytest.mark.parametrize("kind", ["linear", "dpt"])
def test_a_fresh_head_depends_on_its_seed_only(tiny_base: Path, rooms: DenseDataset, kind: str) -> None:
    encoder = load_encoder(tiny_base)
    heads = []
    for seed in (3, 3, 4):
        torch.rand(5)  # changes the global generator
        heads.append(weights(fresh_head(encoder, rooms.tasks["normals"], rooms, kind, seed)))
    assert same(heads[0], heads[1]) and not same(heads[0], heads[2])


@pytest.mark.parametrize(
    ("kind", "settings"), [("linear", {}), ("linear", {"subpixels": 4}), ("dpt", {"fusion_channels": 8})]
)
def test_a_fresh_head_starts_at_the_mean_of_the_targets(
    tiny_base: Path, rooms: DenseDataset, kind: str, settings: dict[str, Any]
) -> None:
    encoder = load_encoder(tiny_base)
    mean = torch.stack([rooms[index]["depth"] for index in range(len(rooms))]).mean()
    head = fresh_head(encoder, rooms.tasks["depth"], rooms, kind, **settings)
    torch.testing.assert_close(head.output.bias.detach(), mean.expand_as(head.output.bias))
    with torch.no_grad():
        head.output.weight.zero_()
        logits = head.eval()(encoder(rooms[0]["image"][None]))
    torch.testing.assert_close(logits, mean.expand_as(logits))


def test_a_fresh_head_starts_at_zero_if_logits_have_no_unit(tiny_base: Path, rooms: DenseDataset) -> None:
    encoder = load_encoder(tiny_base)
    for name in ("segmentation", "normals", "edges"):
        assert not fresh_head(encoder, rooms.tasks[name], rooms).output.bias.any(), name


def test_trainable_parameters_counts_those_that_require_a_gradient() -> None:
    head = build_head("linear", [4], 2, {"cls": False})
    assert trainable_parameters(head) == 2 * 4 + (4 * 2 + 2)
    head.norm.requires_grad_(False)
    assert trainable_parameters(head) == 4 * 2 + 2


@pytest.mark.parametrize("name", ["none", "flip", "scale-crop-flip"])
def test_training_uses_the_chosen_augmentation(
    name: str, make_model: Callable[..., SimoModel], rooms: DenseDataset
) -> None:
    data = rooms.select(["depth"])
    model = make_model(data.tasks)
    batches: list[dict[str, Any]] = []

    def losses(model: SimoModel, batch: Any) -> dict[str, torch.Tensor]:
        batches.append(batch)
        return {"depth": model(batch["image"])["depth"].square().mean()}

    finetune(model, data, TUNE, losses=losses, options=TuneOptions(augmentation=name))
    functions = {"none": None, "flip": random_flip, "scale-crop-flip": augment}
    function = functions[name]
    transform = partial(function, data.tasks) if function else None
    expected = list(training_batches(data, TUNE.batch_size, TUNE.steps, TUNE.seed, transform=transform))
    assert len(batches) == len(expected) == 3
    for ours, theirs in zip(batches, expected, strict=True):
        assert torch.equal(ours["image"], theirs["image"]) and torch.equal(ours["depth"], theirs["depth"])
    plain = next(iter(training_batches(data, TUNE.batch_size, 1, TUNE.seed)))
    assert torch.equal(batches[0]["image"], plain["image"]) == (name == "none")


def test_an_unknown_augmentation_is_refused(make_model: Callable[..., SimoModel], rooms: DenseDataset) -> None:
    data = rooms.select(["depth"])
    with pytest.raises(InputError, match="unknown augmentation 'paper'; choose one of: none, flip, scale-crop-flip"):
        finetune(make_model(data.tasks), data, TUNE, options=TuneOptions(augmentation="paper"))
