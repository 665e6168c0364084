"""What blocks cost: parameters, or measured time; and trees on pyramids, where the two differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.encoders.families import save_tiny
from simomerge.assembly.experts import check_experts
from simomerge.assembly.merge import merge
from simomerge.assembly.sharing import cost, search
from simomerge.assembly.sharing.cost import time_shares
from simomerge.assembly.sharing.grow import Grower, share_blocks
from simomerge.core.errors import InputError
from simomerge.datasets.pictures import Images, as_images
from simomerge.datasets.tasks import Task
from simomerge.merging import get_method
from simomerge.merging.tree import Tree
from simomerge.models.encoders import Encoder, TreeEncoder
from simomerge.models.encoders.units import unit_names
from simomerge.models.heads import head_for
from simomerge.models.model import SimoModel, load

from .conftest import equal, predicted

PYRAMIDS = ("swin", "convnext", "resnet")
TASKS = {"depth": Task("depth"), "edges": Task("edges"), "normals": Task("normals")}


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Callable[[Encoder, list[float]], None]:
    """Give the blocks of an encoder a time each, by a clock that only they move."""
    clock = [0.0]
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])

    def slow(encoder: Encoder, each: list[float]) -> None:
        for name, length in zip(unit_names(encoder), each, strict=True):
            block = encoder.backbone.get_submodule(name)

            def forward(*args: Any, length: float = length, run: Any = block.forward, **named: Any) -> Any:
                clock[0] += length
                return run(*args, **named)

            monkeypatch.setattr(block, "forward", forward)

    return slow


def test_the_share_in_the_time_is_that_of_the_blocks(tmp_path: Path, seconds: Any) -> None:
    encoder = load(save_tiny("convnext", tmp_path / "base")).encoder
    seconds(encoder, [1.0, 2.0, 3.0, 4.0])
    blocks = [encoder.backbone.get_submodule(name) for name in unit_names(encoder)]
    before = [len(block._forward_hooks) for block in blocks]
    assert time_shares(encoder, torch.rand(1, 3, 64, 64)) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert [len(block._forward_hooks) for block in blocks] == before


def test_equal_blocks_on_equal_maps_share_their_times(base: SimoModel, picture: Tensor, seconds: Any) -> None:
    seconds(base.encoder, [1.0, 2.0, 3.0, 4.0])
    assert time_shares(base.encoder, picture[:1]) == pytest.approx([0.25] * 4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_budget_of_time_counts_measured_time(
    pyramid: tuple[SimoModel, dict[str, SimoModel]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first block takes nearly all the time, so that the others can be the tasks' own for 1.3 encoders.
    base, experts = pyramid
    pictures = torch.rand(12, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    times = [0.85, *[0.15 / (len(unit_names(base.encoder)) - 1)] * (len(unit_names(base.encoder)) - 1)]
    monkeypatch.setattr(search, "time_shares", lambda encoder, image: times)
    by_time = merge(base, experts, scale=0.4, images=pictures, budget=1.3, budget_of="time").provenance["merge"]
    tree = Tree.read(by_time["tree"])
    assert 1 < by_time["time"] <= 1.3 and by_time["time"] == pytest.approx(tree.cost(times), abs=1e-3)
    assert by_time["cost"] > 1.3  # that of parameters, most of which are in the last stages
    by_size = merge(base, experts, scale=0.4, images=pictures, budget=1.3).provenance["merge"]
    assert "time" not in by_size and by_size.get("cost", 1) <= 1.3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": 1.5, "budget_of": "watts"}, "a budget of 'watts': give parameters or time"),
        ({"budget_of": "time"}, "budget_of is what a budget counts: give budget too"),
    ],
)
def test_mistakes(
    given: dict[str, Any], message: str, base: SimoModel, experts: dict[str, SimoModel], images: Images
) -> None:
    with pytest.raises(InputError, match=message):
        merge(base, experts, scale=0.4, images=images, **given)


@pytest.fixture(params=PYRAMIDS)
def pyramid(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[SimoModel, dict[str, SimoModel]]:
    """A base and experts on a tiny pyramid of four stages."""
    base = load(save_tiny(request.param, tmp_path / "base"))
    experts = {}
    for seed, (name, task) in enumerate(TASKS.items()):
        encoder = load(tmp_path / "base").encoder
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        experts[name] = SimoModel(encoder, {name: task}, {name: head_for(encoder, "linear", task.channels)}).eval()
    return base, experts


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trees_on_pyramids(pyramid: tuple[SimoModel, dict[str, SimoModel]], tmp_path: Path) -> None:
    base, experts = pyramid
    checked = check_experts(base, experts)
    grower = Grower(base, checked, get_method("task-arithmetic", scale=0.4))
    pictures = as_images(torch.rand(12, 3, 48, 64, generator=torch.Generator().manual_seed(0)))
    picture = torch.stack([pictures.image(0), pictures.image(1)])
    assert grower.blocks == len(unit_names(base.encoder)) >= 4

    finest = grower.grow(Tree.of(0, list(TASKS), grower.blocks))
    for name, expert in checked.items():
        assert equal(predicted(finest, picture, [name]), predicted(expert, picture))
    shared = share_blocks(grower, Tree.of(f"{grower.blocks - 1}: all | each", list(TASKS), grower.blocks), pictures)
    assert isinstance(shared.encoder, TreeEncoder) and len(shared.encoder.stitches) == 3
    together = predicted(shared, picture)
    for name in TASKS:
        assert equal({name: together[name]}, predicted(shared, picture, [name]))
    again = load(shared.save_pretrained(tmp_path / "shared"))
    assert equal(together, predicted(again, picture))
    alone = shared.select(["edges"])
    assert equal({"edges": together["edges"]}, predicted(alone, picture))


@pytest.mark.parametrize(("family", "first"), [("swin", ".blocks.0."), ("convnext", ".layers.0.")])
def test_a_stitch_belongs_to_the_first_block_of_its_stage(family: str, first: str, tmp_path: Path) -> None:
    base = load(save_tiny(family, tmp_path / "base"))
    blocks, rank = len(unit_names(base.encoder)), 2 if family == "swin" else None
    tree = TreeEncoder(Tree.of(blocks - 1, list(TASKS), blocks), base.encoder, rank)
    depth = tree.depth(name for name, _ in tree.backbone.named_parameters())
    plain = base.encoder.depth(name for name, _ in base.encoder.backbone.named_parameters())
    assert depth.blocks == plain.blocks
    found = {name: depth.position(name) for name, _ in tree.backbone.named_parameters()}
    stitches = {place for name, place in found.items() if ".stitch." in name}
    stage = unit_names(base.encoder)[-1]
    assert stitches == {plain.position(f"{stage}{first}weight")}
    for name, place in found.items():
        if "._factors." in name:
            layer = name.split("._factors.")[1].rpartition(".")[0].replace("/", ".")
            assert place == plain.position(f"{stage}.{layer}.weight")


def test_the_stages_of_a_pyramid_differ_in_time_and_in_parameters(tmp_path: Path) -> None:
    encoder = load(save_tiny("convnext", tmp_path / "base")).encoder
    sizes = TreeEncoder(Tree.of(0, list(TASKS), len(unit_names(encoder))), encoder).shares()
    times = time_shares(encoder, torch.rand(1, 3, 256, 256))
    assert len(sizes) == len(times) and sum(times) == pytest.approx(1)
    assert times[0] > 2 * sizes[0]  # large maps and few channels
