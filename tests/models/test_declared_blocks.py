"""An encoder of one's own that declares its blocks: every method that needs blocks works on it."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import simomerge as sm
from simomerge.assembly.realign.blend import EncoderBlend, task_vectors
from simomerge.assembly.realign.encoder import trained_names
from simomerge.assembly.realign.lora import lora_config, lora_layers
from simomerge.core.errors import InputError
from simomerge.merging.disk.edit import edit_on_disk
from simomerge.merging.disk.merge import merge_on_disk
from simomerge.models.encoders.custom import declared_blocks
from simomerge.models.encoders.layout import BlockShape
from simomerge.relations.geometry import geometry
from simomerge.training.lpft import lpft
from simomerge.training.optimizer import make_optimizer
from simomerge.training.settings import TrainSettings
from simomerge.training.statistics import input_grams

from .declared import Cnn, Head, Mixer

IMAGES = torch.rand(8, 3, 16, 24, generator=torch.Generator().manual_seed(0))


class Undeclared(Cnn):
    blocks = ()


BLOCKS = ["wide", "mixers.0", "mixers.1", "down"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:expert .* does not record its base"),
    pytest.mark.filterwarnings("ignore:.*images are few"),
    pytest.mark.usefixtures("float32"),
]


def made(kind: type[nn.Module] = Cnn) -> tuple[sm.SimoModel, dict[str, sm.SimoModel]]:
    """A base with random batch norm statistics, and two experts at some distance from it."""
    torch.manual_seed(0)
    base = sm.SimoModel(kind(), {}, {}).eval()
    experts = {}
    with torch.no_grad():
        for name, value in base.encoder.backbone.named_buffers():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5 * ("var" in name))
        for task, channels in (("depth", 1), ("normals", 3)):
            encoder = copy.deepcopy(base.encoder)
            for weight in encoder.parameters():
                weight += 0.3 * torch.randn_like(weight) * (weight.square().mean().sqrt() + 0.01)
            experts[task] = sm.SimoModel(encoder, {task: sm.Task(task)}, {task: Head(channels)}).eval()
    return base, experts


@pytest.fixture
def models() -> tuple[sm.SimoModel, dict[str, sm.SimoModel]]:
    return made()


def weights(model: sm.SimoModel) -> dict[str, Tensor]:
    return model.encoder.backbone.state_dict()


# Declaring ----------------------------------------------------------------------------------------------


def test_a_list_stands_for_its_items_and_shapes_are_measured(models: Any) -> None:
    encoder = models[0].encoder
    assert encoder.layout.names == BLOCKS and encoder.describe()["blocks"] == BLOCKS
    before = {name: value.clone() for name, value in weights(models[0]).items()}
    assert encoder.train().block_shapes() == [
        BlockShape(4, 6, 1),
        BlockShape(6, 6, 1),
        BlockShape(6, 6, 1),
        BlockShape(6, 10, 2),
    ]
    assert encoder.training and all(torch.equal(value, before[name]) for name, value in weights(models[0]).items())


def with_blocks(blocks: Any) -> nn.Module:
    module = Cnn()
    module.blocks = blocks
    return module


def test_a_module_called_blocks_declares_itself() -> None:
    class Named(nn.Module):
        def __init__(self, kind: Any) -> None:
            super().__init__()
            self.blocks = kind(nn.Identity(), nn.Sequential(nn.Identity()))

    assert declared_blocks(Named(nn.Sequential)) == ["blocks.0", "blocks.1"]
    assert declared_blocks(Named(lambda *parts: nn.ModuleList(parts))) == ["blocks.0", "blocks.1"]
    assert declared_blocks(Named(lambda *parts: nn.ModuleList([nn.ModuleList(parts)]))) == ["blocks.0.0", "blocks.0.1"]
    assert declared_blocks(Named(lambda *parts: Mixer(3))) == ["blocks"]
    assert declared_blocks(nn.Identity()) == []


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (("wide", "dwon"), r"Cnn\.blocks names 'dwon', and the encoder has no such module"),
        (("wide", "wide"), "names 'wide' and 'wide', which are not two separate modules"),
        (("mixers", "mixers.1"), r"names 'mixers\.1' and 'mixers\.1'"),
        (("mixers.0", "mixers.0.conv"), r"names 'mixers\.0' and 'mixers\.0\.conv'"),
        (("",), "names ''"),
        ("wide", "blocks is 'wide'; give the names of the modules"),
        (4, "blocks is 4; give the names"),
        ([nn.Identity()], "give the names"),
    ],
)
def test_a_wrong_declaration_is_named(blocks: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sm.SimoModel(with_blocks(blocks), {}, {})


@pytest.mark.parametrize("blocks", [("mixers.0", "wide"), ("wide", "unused")])
def test_blocks_that_run_in_another_order_or_not_at_all_are_refused_before_work(blocks: Any) -> None:
    module = Cnn()
    module.unused, module.blocks = nn.Identity(), blocks
    with pytest.raises(InputError, match=r"but its forward pass runs .*; blocks are run once each, in their order"):
        sm.SimoModel(module, {}, {}).encoder.add_adapters()


def test_a_block_that_takes_no_map_is_refused() -> None:
    class Dictionary(nn.Module):
        def forward(self, x: Mapping[str, Tensor]) -> Tensor:
            return x["x"]

    class Other(Cnn):
        blocks = ("dictionary",)

        def __init__(self) -> None:
            super().__init__()
            self.dictionary = Dictionary()

        def forward(self, images: Tensor) -> list[Tensor]:
            return super().forward(self.dictionary({"x": images}))

    with pytest.raises(InputError, match="the block dictionary does not take a map"):
        sm.SimoModel(Other(), {}, {}).encoder.block_shapes()


@pytest.mark.parametrize(
    ("before", "after", "stride"),
    [
        ((1, 3, 8, 12), (1, 5, 2, 3), 4),
        ((1, 3, 8, 12), (1, 5, 4, 12), 0),
        ((1, 3, 4, 4), (1, 5, 8, 8), 0),
        ((1, 7, 3), (1, 7, 5), 1),
        ((1, 8, 3), (1, 4, 5), 0),
        ((1, 3, 8, 8), (1, 64, 5), 0),
    ],
)
def test_shapes_between(before: tuple[int, ...], after: tuple[int, ...], stride: int) -> None:
    assert BlockShape.between(before, after) == BlockShape(3, 5, stride)


# Adapters -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_block_gives_its_output_plus_b_a_of_the_mean_of_its_input(models: Any, tmp_path: Path) -> None:
    base = models[0]
    adapters = base.encoder.add_adapters(rank=2)
    for adapter in adapters:
        adapter.up.weight.normal_(generator=torch.Generator().manual_seed(1))
    plain: Any = copy.deepcopy(base.encoder.backbone)
    for module in plain.modules():
        module._forward_hooks.clear()

    def low(index: int, x: Tensor) -> Tensor:
        product = adapters[index].up.weight @ adapters[index].down.weight
        return torch.einsum("oc,bchw->bohw", product, x)

    x = plain.first_stem(IMAGES)
    x = (plain.wide(x) + low(0, x)).relu()
    for index, mixer in enumerate(plain.mixers, start=1):
        x = mixer(x) + low(index, x)
    means = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))
    ours = base.encode(IMAGES)
    torch.testing.assert_close(ours.maps[0], x)
    torch.testing.assert_close(ours.maps[1], plain.down(x) + low(3, means))
    base.save_pretrained(tmp_path / "model")
    again = sm.load(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(again.encode(IMAGES).maps, ours.maps, strict=True))


def test_an_output_of_another_size_cannot_have_an_adapter() -> None:
    class Odd(Cnn):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(6, 10, (2, 1), (2, 1))

    with pytest.raises(InputError, match="block 4 has an output whose size does not divide that of its input"):
        sm.SimoModel(Odd(), {}, {}).encoder.add_adapters()


# Merging by depth ---------------------------------------------------------------------------------------


def factor(name: str, values: list[float]) -> float:
    """The value of a tensor's block; the stem, which is outside, counts as the first."""
    return values[max((place for place, block in enumerate(BLOCKS) if name.startswith(f"{block}.")), default=0)]


def by_hand(base: sm.SimoModel, experts: Mapping[str, sm.SimoModel], scales: Mapping[str, list[float]]) -> Any:
    theta, merged = weights(base), {}
    for name, value in theta.items():
        if name.endswith(("running_mean", "running_var")):  # statistics are averaged with the scales as weights
            total = sum(factor(name, scales[task]) for task in experts)
            if not total:  # no task vector counts there
                merged[name] = value
                continue
            merged[name] = sum(factor(name, scales[t]) / total * weights(experts[t])[name] for t in experts)
        elif value.is_floating_point():
            merged[name] = value + sum(factor(name, scales[t]) * (weights(experts[t])[name] - value) for t in experts)
    return merged


def assert_equal(model: sm.SimoModel, expected: Mapping[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(weights(model)[name], value, rtol=1e-5, atol=1e-6)


def test_schedules_and_scales_per_block_follow_the_declared_order(models: Any, tmp_path: Path) -> None:
    base, experts = models
    values = [0.1, 0.2, 0.3, 0.6]
    scheduled = sm.merge(base, experts, "task-arithmetic", scale=1.0, schedule=values)
    wanted = by_hand(base, experts, dict.fromkeys(experts, values))
    statistics = [name for name in wanted if "running" in name]
    for name in statistics:
        wanted[name] = sum(weights(expert)[name] for expert in experts.values()) / 2
    assert_equal(scheduled, wanted)
    scales = {"depth": [0.1, 0.2, 0.3, 0.4], "normals": [0.9, 0.7, 0.5, 0.3]}
    per_block = sm.merge(base, experts, "task-arithmetic", scale=scales)
    assert_equal(per_block, by_hand(base, experts, scales))
    # On disk, where the names of the blocks are read from the folder's description.
    base.save_pretrained(tmp_path / "base")
    folders = {task: expert.save_pretrained(tmp_path / task) for task, expert in experts.items()}
    merge_on_disk(tmp_path / "base", folders, tmp_path / "merged", "task-arithmetic", scale=scales)
    assert_equal(sm.load(tmp_path / "merged"), by_hand(base, experts, scales))
    edit_on_disk(tmp_path / "merged", tmp_path / "base", tmp_path / "edited", remove={"depth": folders["depth"]})
    assert_equal(sm.load(tmp_path / "edited"), by_hand(base, {"normals": experts["normals"]}, scales))


def test_lines_rise_from_the_first_declared_block_to_the_last(models: Any) -> None:
    base, experts = models
    ours = sm.merge(base, experts, "average", schedule="lines:alpha=0.1,beta=0.9")
    plain = sm.merge(base, experts, "average")
    for name in ("wide.weight", "mixers.0.conv.bias", "mixers.1.norm.weight", "down.bias"):
        change = weights(plain)[name] - weights(base)[name]
        wanted = weights(base)[name] + factor(name, [0.1, 0.4, 0.7, 1.0]) * change
        torch.testing.assert_close(weights(ours)[name], wanted)


def test_without_blocks_a_schedule_is_refused_and_one_coefficient_is_learned() -> None:
    base, experts = made(Undeclared)
    base.encoder.backbone.mixers = nn.Sequential(*base.encoder.backbone.mixers)  # names without "blocks.0"
    for schedule in ([0.1, 0.5], "lines"):
        with pytest.raises(InputError, match="a schedule over the depth needs blocks"):
            sm.merge(base, experts, "average", schedule=schedule)
    learned = sm.merge(base, experts, scale="learned", images=list(IMAGES))
    assert {len(scale) for scale in learned.provenance["merge"]["scale"].values()} == {1}
    assert sm.merge(base, experts, "auto", images=list(IMAGES)).provenance["realign"]["method"] == "fold"


def test_one_coefficient_per_declared_block_is_learned(models: Any) -> None:
    base, experts = models
    learned = sm.merge(base, experts, scale="learned", images=list(IMAGES))
    scales = learned.provenance["merge"]["scale"]
    assert {len(scale) for scale in scales.values()} == {4}
    assert_equal(learned, by_hand(base, experts, scales))
    blend = EncoderBlend(copy.deepcopy(base), task_vectors(base, experts))
    with torch.no_grad():
        blend.coefficients[0, 1] = 1.0
    task_vector = weights(experts["depth"])["mixers.0.conv.weight"] - weights(base)["mixers.0.conv.weight"]
    torch.testing.assert_close(
        blend.weights()["backbone.mixers.0.conv.weight"], weights(base)["mixers.0.conv.weight"] + task_vector
    )
    assert torch.equal(blend.weights()["backbone.down.weight"], weights(base)["down.weight"])


def test_the_geometry_is_measured_per_declared_block_and_leaves_statistics_out(models: Any) -> None:
    base, experts = models
    found = geometry(base, experts)
    assert [part.name for part in found.parts] == ["all", "outside", "1", "2", "3", "4"]
    theta, theirs = weights(base), weights(experts["normals"])
    trained = {name for name, _ in base.encoder.backbone.named_parameters()}
    for part, block in zip(found.blocks, BLOCKS, strict=True):
        inside = [theirs[n] - theta[n] for n in theta if n.startswith(f"{block}.") and n in trained]
        assert part.norms[1] == pytest.approx(float(torch.cat([x.flatten() for x in inside]).norm()), rel=1e-5)


# Statistics of layers -----------------------------------------------------------------------------------


class Images:
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Tensor:
        return self.images[index]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 2, 2),
        nn.Conv2d(6, 4, 3, padding=1, groups=2),
        nn.Conv2d(5, 5, 3, padding=(2, 1), dilation=2, groups=5),
        nn.Conv2d(3, 2, 3, padding="same", padding_mode="reflect"),
    ],
)
def test_regmean_changes_the_outputs_of_convolutions_least(layer: nn.Conv2d) -> None:
    """The least squares solution, from outputs alone: a convolution is linear in its weights."""

    class One(nn.Module):
        channels, strides = (layer.out_channels,), (1,)

        def __init__(self) -> None:
            super().__init__()
            self.layer = copy.deepcopy(layer)
            self.layer.bias = None

        def forward(self, images: Tensor) -> list[Tensor]:
            return [self.layer(images)]

    def model(seed: int) -> sm.SimoModel:
        made = sm.SimoModel(One().double(), {}, {}).eval()
        with torch.no_grad():
            for weight in made.encoder.parameters():
                weight.normal_(generator=torch.Generator().manual_seed(seed))
        return made

    base, experts = model(0), {"a": model(1), "b": model(2)}
    seen = {
        task: torch.rand(3, layer.in_channels, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed, task in enumerate(experts)
    }
    grams = {task: grams_of(expert, seen[task]) for task, expert in experts.items()}
    inputs = layer.weight[0].numel()
    assert all(each["layer.weight"].shape == (layer.groups, inputs, inputs) for each in grams.values())
    states = {task: weights(expert) for task, expert in experts.items()}
    ours = sm.merging.merge_state_dicts(weights(base), states, "regmean", grams=grams, shrink=1.0)["layer.weight"]
    # Columns: the outputs for each weight set to one.
    zero, columns = One().double().layer, []
    size = layer.weight.numel()
    with torch.no_grad():
        for index in range(size):
            zero.weight.copy_(F.one_hot(torch.tensor(index), size).view_as(zero.weight))
            columns.append(torch.cat([zero(x).flatten() for x in seen.values()]))
        wanted = torch.cat([experts[task].encoder.backbone.layer(x).flatten() for task, x in seen.items()])
    best = torch.linalg.lstsq(torch.stack(columns, 1), wanted[:, None]).solution.view_as(layer.weight)
    torch.testing.assert_close(ours, best, rtol=0, atol=2e-5)


def grams_of(expert: sm.SimoModel, images: Tensor) -> dict[str, np.ndarray]:
    expert.encoder.mean = torch.zeros(1)
    return input_grams(expert.encoder, Images(images), batch_size=2)


def test_regmean_merges_a_cnn_by_name(models: Any) -> None:
    base, experts = models
    merged = sm.merge(base, experts, "regmean", images=list(IMAGES))
    mean = sm.merge(base, experts, "average")
    layers = {"first_stem", "wide", "mixers.0.conv", "mixers.1.conv", "down"}
    for name, value in weights(merged).items():
        if value.is_floating_point():
            differs = (value - weights(mean)[name]).abs().max() > 1e-4
            # All experts see the same images, so the first layer's mean is its best merge.
            assert differs == (name in {f"{layer}.weight" for layer in layers - {"first_stem"}}), name


def test_grams_of_the_wrong_shape_are_named(models: Any) -> None:
    base, experts = models
    grams = {task: {"down.weight": np.eye(54)} for task in experts}
    with pytest.raises(
        InputError, match=r"the shape is \(54, 54\), but a tensor \(10, 6, 3, 3\) needs \(1, 54, 54\) o"
    ):
        sm.merge(base, experts, "regmean", grams=grams)


# Training -----------------------------------------------------------------------------------------------


def rates(model: sm.SimoModel, settings: TrainSettings) -> dict[str, float]:
    named = dict(model.named_parameters())
    optimizer = make_optimizer(named, settings, model.encoder.depth)
    by_id = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: by_id[id(p)] for name, p in named.items()}


def test_the_learning_rate_falls_per_declared_block(models: Any) -> None:
    found = rates(models[0], TrainSettings(lr=1.0, encoder_lr=0.8, layer_decay=0.5))
    wanted = {"down.bias": 0.8, "mixers.1.conv.weight": 0.4, "mixers.0.norm.bias": 0.2, "wide.bias": 0.1}
    assert {name: found[f"encoder.backbone.{name}"] for name in wanted} == wanted
    assert found["encoder.backbone.first_stem.weight"] == 0.1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_learning_rate_falls_per_declared_block_of_a_tree(models: Any) -> None:
    base, experts = models
    tree = sm.merge(base, experts, scale=0.4, share=2, images=IMAGES)
    plain = rates(base, TrainSettings(lr=1.0, encoder_lr=0.8, layer_decay=0.5))
    found = rates(tree, TrainSettings(lr=1.0, encoder_lr=0.8, layer_decay=0.5))
    inside = {name: re.sub(r"^encoder\.backbone\.\d+\.backbone\.", "encoder.backbone.", name) for name in found}
    inside = {name: short.replace(".inner.", ".") for name, short in inside.items()}
    known = {name: short for name, short in inside.items() if short in plain}
    assert len(known) > len(plain) / 2 and {found[name] == plain[short] for name, short in known.items()} == {True}
    stitches = {rate for name, rate in found.items() if ".stitch." in name}
    assert len(stitches) == 1 and stitches < set(plain.values())


def test_a_decay_without_blocks_is_refused_before_the_first_phase(tmp_path: Path) -> None:
    _, experts = made(Undeclared)
    model = experts["depth"]
    model.encoder.backbone.mixers = nn.Sequential(*model.encoder.backbone.mixers)
    steps = TrainSettings(steps=1, layer_decay=0.5)
    with pytest.raises(InputError, match=r"layer_decay is 0\.5, and the encoder's blocks are unknown"):
        lpft(model, None, steps, steps, work_folder=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_distilling_the_last_blocks_trains_them_alone(models: Any) -> None:
    base, experts = models
    assert trained_names(base.encoder, 2) == {
        f"mixers.1.{n}" for n, _ in base.encoder.backbone.mixers[1].named_parameters()
    } | {
        "down.weight",
        "down.bias",
    }
    merged = sm.merge(base, experts, scale=0.5)
    before = copy.deepcopy(weights(merged))
    given: dict[str, Any] = {"trains": "encoder", "last_blocks": 2, "steps": 3, "hold_out": 0.0}
    after = weights(sm.realign(merged, experts, list(IMAGES), method="distill", **given))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and changed <= trained_names(base.encoder, 2)
    with pytest.raises(InputError, match="last_blocks is 5, and 4 blocks of the encoder are known"):
        sm.realign(merged, experts, list(IMAGES), method="distill", trains="encoder", last_blocks=5)


@torch.no_grad()
def test_lora_of_convolutions_folds_into_their_weights(models: Any) -> None:
    base = models[0]
    config = lora_config(base.encoder, rank=2, alpha=3)
    assert set(config.target_modules) == {"first_stem", "wide", "down"}  # not the depthwise ones
    before = copy.deepcopy(weights(base))
    with lora_layers(base.encoder, config):
        for layer in (base.encoder.backbone.get_submodule(name) for name in config.target_modules):
            layer.lora_B["default"].weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        low, high = (base.encoder.backbone.down.get_submodule(f"lora_{name}.default").weight for name in "AB")
        product = 3 / 2 * torch.einsum("or,rikl->oikl", high[:, :, 0, 0], low)
        unfolded = base.encode(IMAGES)
    after = weights(base)
    assert list(after) == list(before)
    torch.testing.assert_close(after["down.weight"], before["down.weight"] + product)
    for ours, theirs in zip(base.encode(IMAGES).maps, unfolded.maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    named = lora_config(base.encoder, rank=2, targets=["down"])
    assert set(named.target_modules) == {"down"}
    with pytest.raises(InputError, match=r"no linear layer or convolution of one group ends in 'conv'"):
        lora_config(base.encoder, rank=2, targets="conv")


def test_prodistill_trains_each_declared_block(models: Any) -> None:
    base, experts = models
    merged = sm.merge(base, experts, scale=0.1)
    changed = sm.realign(merged, experts, list(IMAGES), method="prodistill", base=base, steps=30)
    theta, after = weights(merged), weights(changed)
    moved = {name for name, value in theta.items() if not torch.equal(value, after[name])}
    blocks = {name for name, _ in base.encoder.backbone.named_parameters() if not name.startswith("first_stem")}
    assert moved == blocks

    def distance(model: sm.SimoModel) -> float:
        with torch.no_grad():
            theirs = [expert.encode(IMAGES).maps for expert in experts.values()]
            wanted = [torch.stack(each).mean(0) for each in zip(*theirs, strict=True)]
            return sum(float((a - b).square().mean()) for a, b in zip(model.encode(IMAGES).maps, wanted, strict=True))

    assert distance(changed) < 0.7 * distance(merged)


@pytest.mark.parametrize("method", ["distill-adapters", "distill-lora"])
def test_distillation_inside_a_cnn(models: Any, method: str) -> None:
    base, experts = models
    merged = sm.merge(base, experts, scale=0.5)
    changed = sm.realign(merged, experts, list(IMAGES), method=method, steps=2, rank=2, hold_out=0.0)
    assert (changed.encoder.adapters is not None) == (method == "distill-adapters")
    assert changed.provenance["realign"]["trained_parameters"] > 0
