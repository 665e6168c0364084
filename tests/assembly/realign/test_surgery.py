"""Representation surgery: what it minimises, and that nothing but the corrections learns."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from simomerge.assembly.realign import realign
from simomerge.core.classes import register_encoder, register_head
from simomerge.core.errors import InputError
from simomerge.datasets import DenseDataset
from simomerge.datasets.batches import training_batches
from simomerge.datasets.pictures import as_images
from simomerge.datasets.tasks import Task
from simomerge.models.encoders import Features
from simomerge.models.heads.surgery import SurgeryHead
from simomerge.models.model import SimoModel
from simomerge.training.settings import TrainSettings

from .contract import same, weights

SETTINGS = TrainSettings(steps=60, batch_size=4, lr=1e-2, seed=1, weight_decay=0.0)
RANK = 4


def stacked(data: DenseDataset) -> Tensor:
    return torch.stack([data.image(index) for index in range(len(data))])


def encoded(model: SimoModel, images: Tensor) -> Features:
    with torch.no_grad():
        features: Features = model.encode(images)
    return features


def halved(features: Features) -> list[Tensor]:
    """Patches, then CLS tokens, as the cache keeps them: in half precision."""
    return [each.half().float() for each in (*features.maps, *features.cls)]


def correct(z: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """z - W_up relu(W_down z), written out."""
    names = "bchw,bihw" if z.ndim == 4 else "bc,bi"
    tokens, hidden = names.split(",")
    inner = torch.einsum(f"ic,{tokens}->{hidden}", down, z).clamp(min=0)
    return z - torch.einsum(f"ci,{hidden}->{tokens}", up, inner)


def l1(model: SimoModel, task: str, expert: SimoModel, images: Tensor) -> list[float]:
    """Mean absolute difference of the features that the head reads from the expert's, per tap."""
    head: Any = model.heads[task]
    ours = encoded(model, images)
    with torch.no_grad():
        ours = head.corrections(ours) if isinstance(head, SurgeryHead) else ours
    theirs = encoded(expert, images)
    pairs = zip((*ours.maps, *ours.cls), (*theirs.maps, *theirs.cls), strict=True)
    return [float((a - b).abs().mean()) for a, b in pairs]


def operated(merged: SimoModel, experts: dict[str, SimoModel], data: Any, **more: Any) -> SimoModel:
    return realign(merged, experts, data, method="surgery", **{"rank": RANK, "training": SETTINGS, **more})


def test_every_feature_comes_nearer_to_the_experts(
    merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
) -> None:
    result, images = operated(merged, experts, rooms), stacked(rooms)
    for task, expert in experts.items():
        before, after = l1(merged, task, expert, images), l1(result, task, expert, images)
        assert len(before) == 8 and all(new < old for new, old in zip(after, before, strict=True))
        with torch.no_grad():
            wanted = expert(images)[task]
            near, far = ((model(images)[task] - wanted).abs().mean() for model in (result, merged))
        assert near < far


def test_the_training_is_adam_on_l1_relative_to_its_start(
    merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
) -> None:
    """Three steps, against a loop with the same batches that computes every feature itself."""
    settings = replace(SETTINGS, steps=3, clip=1e9)
    result = operated(merged, experts, rooms, training=settings)
    images = stacked(rooms)
    for task, expert in experts.items():
        torch.manual_seed(settings.seed)
        fresh = SurgeryHead(merged.encoder.channels, 1, nn.Identity(), rank=RANK)
        pairs = [(each.down.weight, each.up.weight) for each in (*fresh.corrections.maps, *fresh.corrections.cls)]
        ours, theirs = halved(encoded(merged, images)), halved(encoded(expert, images))
        start = [(a - b).abs().mean() for a, b in zip(ours, theirs, strict=True)]
        parameters = [weight for pair in pairs for weight in pair]
        optimizer = torch.optim.Adam(parameters, settings.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, settings.lr, total_steps=settings.steps + 1, pct_start=settings.warmup
        )
        for batch in training_batches(Numbers(len(rooms)), settings.batch_size, settings.steps, settings.seed):
            chosen = batch["index"].tolist()
            parts = zip(ours, theirs, pairs, start, strict=True)
            losses = [(correct(a[chosen], *pair) - b[chosen]).abs().mean() / s for a, b, pair, s in parts]
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            optimizer.step()
            schedule.step()
        head: Any = result.heads[task]
        for wanted, found in zip(parameters, head.corrections.parameters(), strict=True):
            assert float(wanted.detach().abs().max()) > 0
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_order_of_tasks_does_not_matter(
    merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
) -> None:
    short, other = replace(SETTINGS, steps=2), list(reversed(merged.tasks))
    one = operated(merged, experts, rooms, training=short)
    two = operated(merged.select(other), {task: experts[task] for task in other}, rooms, training=short)
    assert list(one.tasks) != list(two.tasks)
    for task, head in one.heads.items():
        assert same(weights(head), weights(two.heads[task]))


class Numbers(DenseDataset):
    """Samples that name themselves."""

    def __init__(self, count: int) -> None:
        super().__init__({}, count)

    def image(self, index: int) -> Tensor:
        raise AssertionError("read an image")

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        raise AssertionError("read a label")

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index}


def test_heads_are_wrapped_and_keep_their_weights(
    merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
) -> None:
    result = operated(merged, experts, rooms, training=replace(SETTINGS, steps=2))
    for name, head in result.heads.items():
        assert isinstance(head, SurgeryHead) and same(weights(head.inner), weights(merged.heads[name]))
        assert head.settings["inner"] == "linear" and head.settings["rank"] == RANK and head.settings["cls"]
    added = sum(p.numel() for p in result.parameters()) - sum(p.numel() for p in merged.parameters())
    assert result.provenance["realign"]["trained_parameters"] == added == 2 * 8 * 2 * 32 * RANK


def test_a_model_after_surgery_has_no_plain_heads(
    merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
) -> None:
    result = operated(merged, experts, rooms, training=replace(SETTINGS, steps=2))
    with pytest.raises(InputError, match=r"head 'depth' of the model is not its expert's.*before any re-alignment"):
        realign(result, experts, rooms, method="fold")
    short = replace(SETTINGS, steps=2)
    trained = realign(result, data=rooms, method="heads", training=short)
    assert trained.provenance["realign"]["after"]["method"] == "surgery"
    assert not same(weights(trained.heads["depth"].inner), weights(merged.heads["depth"]))


def test_an_expert_that_equals_the_model_leaves_it(merged: SimoModel, rooms: DenseDataset) -> None:
    experts = {task: copy.deepcopy(merged).select(task) for task in merged.tasks}
    result, images = operated(merged, experts, rooms), stacked(rooms)
    with torch.no_grad():
        for task, wanted in merged(images).items():
            assert torch.equal(result(images)[task], wanted)


def test_no_label_is_read_and_pictures_must_have_one_size(
    merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
) -> None:
    class Unlabelled(DenseDataset):
        def image(self, index: int) -> Tensor:
            return rooms.image(index)

        def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
            raise AssertionError("read a label")

    short = replace(SETTINGS, steps=2)
    operated(merged, experts, Unlabelled(merged.tasks, len(rooms)), training=short)
    pictures = [np.zeros((24, 32, 3), np.uint8), np.zeros((32, 32, 3), np.uint8)]
    with pytest.raises(InputError, match="this needs images of one size"):
        operated(merged, experts, as_images(pictures), training=short)


def test_large_images_are_downscaled_as_in_a_prediction(
    merged: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fitted = SimoModel.fit
    monkeypatch.setattr(SimoModel, "fit", lambda self, image: fitted(self, image, max_patches=12))
    images = list(np.random.default_rng(0).random((4, 48, 64, 3)).astype(np.float32))
    operated(merged, experts, images, training=replace(SETTINGS, steps=2), work_folder=tmp_path)
    assert np.load(tmp_path / "features" / "map0.npy").shape == (4, 32, 3, 4)
    assert np.load(tmp_path / "features-depth" / "cls3.npy").shape == (4, 32)


@register_encoder
class Tiny(nn.Module):
    """A custom encoder without CLS tokens, of two taps that differ in width and stride."""

    channels, strides = (4, 6), (4, 8)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 6, 2, 2)

    def forward(self, images: Tensor) -> list[Tensor]:
        first = self.first(images)
        return [first, self.second(first.relu())]


@register_head
class OwnHead(nn.Module):
    """A custom head."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Conv2d(6, 1, 1)

    def forward(self, features: Features) -> Tensor:
        return nn.functional.interpolate(self.output(features.maps[1]), features.padded_size)


def test_an_own_head_on_an_own_encoder_without_cls_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expert = SimoModel(Tiny(), {"depth": Task("depth")}, {"depth": OwnHead()}).eval()
    merged = SimoModel(Tiny(), {"depth": Task("depth")}, {"depth": copy.deepcopy(expert.heads["depth"])}).eval()
    images = list(np.random.default_rng(0).random((6, 16, 24, 3)).astype(np.float32))
    result = operated(merged, {"depth": expert}, images)
    head: Any = result.heads["depth"]
    assert len(head.corrections.maps) == 2 and len(head.corrections.cls) == 0
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    before, after = l1(merged, "depth", expert, batch), l1(result, "depth", expert, batch)
    assert all(math.isfinite(new) and new < old for new, old in zip(after, before, strict=True))
    again = SimoModel.from_pretrained(result.save_pretrained(tmp_path / "scene"))
    with torch.no_grad():
        assert torch.equal(again(batch)["depth"], result(batch)["depth"])


def test_two_workers_train_what_one_does(merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset) -> None:
    short = replace(SETTINGS, steps=3)
    one, two = (operated(merged, experts, rooms, training=short, workers=workers) for workers in (1, 2))
    for ours, theirs in zip(one.heads.parameters(), two.heads.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=3e-3)  # workers choose their precision themselves
