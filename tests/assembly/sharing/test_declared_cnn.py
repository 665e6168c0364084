"""Trees on a small convolutional encoder that declares its blocks: batch norms, another size and width on the way."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import simomerge as sm
from models.declared import Cnn, Head
from simomerge.assembly.experts import check_experts
from simomerge.assembly.sharing.grow import Grower
from simomerge.datasets.pictures import Images
from simomerge.merging.tree import Tree
from simomerge.models.encoders import TreeEncoder
from simomerge.models.model import SimoModel

from .conftest import METHOD, TASKS, equal, predicted, random_stitches

pytestmark = [
    pytest.mark.filterwarnings("ignore:expert .* does not record its base"),
    pytest.mark.filterwarnings("ignore:.*images are few"),
    pytest.mark.filterwarnings("ignore:.*on held-out images the folded head"),
]


@pytest.fixture(scope="module")
def base() -> SimoModel:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        made = SimoModel(Cnn(), {}, {}).eval()
        for name, value in made.encoder.backbone.named_buffers():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5 * ("var" in name))
    return made


@pytest.fixture(scope="module")
def experts(base: SimoModel) -> dict[str, SimoModel]:
    """Three experts whose weights and batch norm statistics differ."""
    made = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for name, task in TASKS.items():
            encoder = copy.deepcopy(base.encoder)
            for weight in encoder.parameters():
                weight += 0.3 * torch.randn_like(weight) * (weight.square().mean().sqrt() + 0.01)
            for key, value in encoder.backbone.named_buffers():
                if value.is_floating_point():
                    value.copy_(torch.rand_like(value) + 0.5 * ("var" in key))
            made[name] = SimoModel(encoder, {name: task}, {name: Head(task.channels)}).eval()
        logits = made["parts"](torch.rand(4, 3, 24, 32))["parts"]
        made["parts"].heads["parts"].out.bias -= logits.mean((0, 2, 3))  # so that every class is predicted somewhere
    return made


@pytest.fixture
def grower(base: SimoModel, experts: dict[str, SimoModel]) -> Grower:
    return Grower(base, check_experts(base, experts), METHOD)


def distance(model: SimoModel, experts: dict[str, SimoModel], picture: Tensor) -> float:
    """The mean over the tasks of the squared distance to the expert, relative to the variance of what it predicts."""
    found = predicted(model, picture)
    wanted = {task: predicted(expert, picture)[task] for task, expert in experts.items()}
    return sum(float((found[task] - value).square().mean() / value.var()) for task, value in wanted.items()) / len(
        found
    )


def test_the_trivial_tree_is_the_merge_and_the_finest_is_the_experts(
    base: SimoModel, experts: dict[str, SimoModel], grower: Grower, picture: Tensor
) -> None:
    assert grower.blocks == 4
    one, each = (grower.grow(Tree.of(text, list(TASKS), 4)) for text in ("all", "each"))
    assert equal(predicted(one, picture), predicted(sm.merge(base, experts, METHOD), picture))
    found = predicted(each, picture)
    for task, expert in experts.items():
        assert equal(predicted(expert, picture), {task: found[task]})


def test_the_extremes_of_a_merge_with_images(
    base: SimoModel, experts: dict[str, SimoModel], images: Images, picture: Tensor
) -> None:
    merged = sm.merge(base, experts, METHOD)
    folded = sm.realign(merged, experts, images, variant="cross-tap")
    assert not equal(predicted(folded, picture), predicted(merged, picture))
    for given in ({"share": 4}, {"budget": 1}):
        assert equal(
            predicted(sm.merge(base, experts, METHOD, images=images, **given), picture), predicted(folded, picture)
        )
    wanted = {task: predicted(expert, picture)[task] for task, expert in experts.items()}
    for given in ({"share": 0}, {"budget": 3}):
        assert equal(predicted(sm.merge(base, experts, METHOD, images=images, **given), picture), wanted)


@torch.no_grad()
def test_a_shared_block_is_the_merge_and_own_blocks_are_the_experts_after_a_stitch(
    base: SimoModel, experts: dict[str, SimoModel], grower: Grower, picture: Tensor
) -> None:
    model = random_stitches(grower.grow(Tree.of("1: all | 3: depth, normals+parts | each", list(TASKS), 4)))
    whole: Any = sm.merge(base, experts, METHOD).encoder.backbone.eval()
    two: Any = sm.merge(base, {task: experts[task] for task in ("normals", "parts")}, METHOD).encoder.backbone.eval()
    assert isinstance(model.encoder, TreeEncoder)
    stitches = model.encoder.stitches
    shared = whole.wide(whole.first_stem(picture))  # the block; what follows it is outside of all blocks
    for task, expert in experts.items():
        own: Any = expert.encoder.backbone
        middle, name = (own, "2-depth") if task == "depth" else (two, "2-normals")
        fine = middle.mixers[1](middle.mixers[0](stitches[name](shared.relu())))
        below = fine if task == "depth" else stitches[f"4-{task}"](fine)
        assert_close(model.encode(picture, [task]).of(task).maps, (fine, own.down(below)))


def test_a_tree_in_between_is_nearer_to_the_experts_and_loads_again(
    base: SimoModel, experts: dict[str, SimoModel], images: Images, picture: Tensor, tmp_path: Path
) -> None:
    by_share = [sm.merge(base, experts, METHOD, share=last, images=images) for last in (4, 2, 1, 0)]
    distances = [distance(model, experts, picture) for model in by_share]
    assert distances == sorted(distances, reverse=True) and distances[-1] == 0 and distances[1] < 0.7 * distances[0]
    record = by_share[2].provenance["merge"]
    assert record["tree"] == "1: depth+normals+parts | 4: depth, normals, parts"
    assert all(fit["r2"] > fit["r2_before"] for fit in record["stitches"].values())
    loaded = sm.load(by_share[2].save_pretrained(tmp_path / "scene"))
    assert equal(predicted(loaded, picture), predicted(by_share[2], picture))


def test_a_budget_chooses_a_tree_that_it_allows(
    base: SimoModel, experts: dict[str, SimoModel], images: Images, picture: Tensor
) -> None:
    model = sm.merge(base, experts, METHOD, budget=2, images=images)
    record, one = model.provenance["merge"], sm.merge(base, experts, METHOD, share=4, images=images)
    tree = Tree.read(record["tree"])
    assert tree.blocks == 4 and not tree.is_trivial and 1 < record["cost"] <= 2
    assert distance(model, experts, picture) < distance(one, experts, picture)
