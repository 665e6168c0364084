"""From experts to one re-aligned model, with every family of encoders."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import simomerge
from simomerge.assembly.realign.blocks import BlockDistillation
from simomerge.datasets import DenseDataset, load_data
from simomerge.datasets.tasks import Task
from simomerge.merging.disk.merge import merge_on_disk
from simomerge.models.encoders import load_encoder
from simomerge.models.heads import head_for
from simomerge.models.model import SimoModel, load

from .encoders.families import TINY, save_tiny


@pytest.fixture(autouse=True)
def always_float32(float32: None) -> None:
    """Comparisons here are of float32."""


@pytest.fixture(scope="module")
def rooms() -> DenseDataset:
    return load_data("rooms", split="val", count=16, size=(40, 56)).select(["depth", "normals"])


def perturbed(base: SimoModel, rooms: DenseDataset, task: str, head: str, seed: int) -> SimoModel:
    """An expert: the base moved a little, with a head of its own."""
    torch.manual_seed(seed)
    encoder = load_encoder(base.source)
    with torch.no_grad():
        for parameter in encoder.backbone.parameters():
            parameter.add_(0.05 * parameter.std(correction=0).nan_to_num() * torch.randn_like(parameter))
    settings = {"fusion_channels": 8} if head == "dpt" else {}
    heads = {task: head_for(encoder, head, rooms.tasks[task].channels, **settings)}
    origin = {"base": {"source": base.source, "fingerprint": base.encoder_fingerprint()}}
    return SimoModel(encoder, {task: rooms.tasks[task]}, heads, origin).eval()


@pytest.mark.parametrize("head", ["linear", "dpt"])
@pytest.mark.parametrize("model_type", TINY)
def test_experts_of_every_family_become_one_model(
    tmp_path: Path, rooms: DenseDataset, model_type: str, head: str
) -> None:
    base = load(save_tiny(model_type, tmp_path / "base"))
    experts = {task: perturbed(base, rooms, task, head, seed) for seed, task in enumerate(rooms.tasks)}
    merged = simomerge.merge(base, experts, "task-arithmetic", scale=0.5)
    before, original = simomerge.evaluate(merged, rooms), copy.deepcopy(merged.state_dict())
    model = simomerge.realign(merged, experts, images=rooms, method="fold")
    scores = simomerge.evaluate(model, rooms)
    assert set(scores) == {"depth", "normals"} and scores != before
    assert all(torch.equal(value, original[name]) for name, value in merged.state_dict().items())
    # What the fold is for: the model's predictions are nearer to its experts'.
    nearer = [_distance(model, experts, rooms, task) < _distance(merged, experts, rooms, task) for task in experts]
    assert all(nearer)
    model.save_pretrained(tmp_path / "scene")
    image = rooms[0]["image"]
    ours, again = model.predict(image), load(tmp_path / "scene").predict(image)
    assert {name: value.shape for name, value in ours.items()} == {"depth": (40, 56), "normals": (3, 40, 56)}
    for name, value in ours.items():
        np.testing.assert_allclose(again[name], value, atol=1e-5)


@pytest.mark.parametrize("model_type", [name for name in TINY if name != "resnet"])  # it has no linear layers
def test_calibration_brings_every_family_nearer_to_an_expert(tmp_path: Path, model_type: str) -> None:
    base = load(save_tiny(model_type, tmp_path))
    base = SimoModel(base.encoder, {"depth": Task("depth")}, {"depth": head_for(base.encoder, "linear", 1)}).eval()
    expert = copy.deepcopy(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for module in (module for block in expert.encoder.layout.blocks for module in block.modules()):
            if isinstance(module, torch.nn.Linear):
                module.weight.add_(0.1 * torch.randn_like(module.weight))
    images = list(torch.rand(16, 3, 48, 64))
    model = simomerge.realign(base, {"depth": expert}, images, method="calibrate", mix=1, ridge=1e-4)
    with torch.no_grad():
        maps = [[each.encode(image[None]).maps[-1] for image in images] for each in (base, model, expert)]
    before, after = (sum((a - b).square().mean() for a, b in zip(each, maps[2], strict=True)) for each in maps[:2])
    assert after < 0.5 * before


def _distance(model: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset, task: str) -> float:
    images = torch.stack([rooms[index]["image"] for index in range(len(rooms))])
    with torch.no_grad():
        return float((model(images)[task] - experts[task](images)[task]).square().mean())


@pytest.mark.parametrize("model_type", TINY)
def test_the_blocks_of_every_family_learn_from_the_experts(
    tmp_path: Path, rooms: DenseDataset, model_type: str
) -> None:
    base = load(save_tiny(model_type, tmp_path / "base"))
    experts = {task: perturbed(base, rooms, task, "linear", seed) for seed, task in enumerate(rooms.tasks)}
    merged = simomerge.merge(base, experts, "task-arithmetic", scale=0.3)
    model = simomerge.realign(merged, experts, rooms, method="prodistill", base=base, steps=40, batch_size=6)
    for index in range(len(base.encoder.layout.blocks)):
        before, after = (BlockDistillation(each, base, experts).samples(index, rooms) for each in (merged, model))
        assert after.distance < before.distance


@pytest.mark.parametrize("model_type", TINY)
def test_folders_merge_on_disk_as_in_memory(tmp_path: Path, rooms: DenseDataset, model_type: str) -> None:
    base = load(save_tiny(model_type, tmp_path / "base"))
    experts = {task: perturbed(base, rooms, task, "linear", seed) for seed, task in enumerate(rooms.tasks)}
    folders = {task: expert.save_pretrained(tmp_path / task) for task, expert in experts.items()}
    merge_on_disk(tmp_path / "base", folders, tmp_path / "merged", "ties", scale=0.5)
    in_memory = simomerge.merge(base, experts, "ties", scale=0.5)
    on_disk = load(tmp_path / "merged")
    theirs = on_disk.encoder.backbone.state_dict()
    for name, value in in_memory.encoder.backbone.state_dict().items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("model_type", ["swin", "resnet", "siglip"])
def test_labels_re_align_other_families_too(tmp_path: Path, rooms: DenseDataset, model_type: str) -> None:
    from simomerge.training.settings import TrainSettings

    base = load(save_tiny(model_type, tmp_path / "base"))
    experts = {task: perturbed(base, rooms, task, "linear", seed) for seed, task in enumerate(rooms.tasks)}
    merged = simomerge.merge(base, experts, "average")
    settings = TrainSettings(steps=2, batch_size=3, lr=1e-3)
    for method in ("heads", "adapters"):
        model = simomerge.realign(merged, data=rooms, method=method, training=settings)
        model.save_pretrained(tmp_path / method)
        again = load(tmp_path / method)
        for name, value in model.predict(rooms[0]["image"]).items():
            np.testing.assert_allclose(again.predict(rooms[0]["image"])[name], value, atol=1e-5)
