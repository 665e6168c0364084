"""ProDistill: the objective of each block, its gradient and a step of training, against slow loops in plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from simomerge.assembly.realign import realign
from simomerge.assembly.realign.blend import ElementBlend, task_vectors
from simomerge.assembly.realign.blocks import BlockDistillation, BlockSamples
from simomerge.core.errors import InputError
from simomerge.datasets import DenseDataset
from simomerge.datasets.batches import training_batches
from simomerge.datasets.pictures import as_images
from simomerge.datasets.tasks import Task
from simomerge.models.encoders import Encoder
from simomerge.models.model import SimoModel
from simomerge.training.state import TrainingState, TrainLog

from .contract import Killed, same, weights
from .test_symerge import first_rate

Models = tuple[SimoModel, SimoModel, dict[str, SimoModel]]


def moved(model: SimoModel, seed: int, size: float = 0.05) -> SimoModel:
    """A copy whose blocks have other weights."""
    result = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in result.encoder.layout.blocks:
            for parameter in block.parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return result


def named(model: SimoModel, task: str) -> SimoModel:
    """The encoder of a model with a head for one task."""
    return SimoModel(model.encoder, {task: Task(task)}, {task: nn.Identity()}).eval()


@pytest.fixture
def two_blocks() -> Models:
    """The merged model, the base and the experts, with encoders of two blocks."""
    config = Dinov2Config(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32, mlp_ratio=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = SimoModel(Encoder(Dinov2Model(config)), {}, {}).eval()
    experts = {task: named(moved(base, seed), task) for seed, task in enumerate(("depth", "edges"), 1)}
    merged = moved(base, 3, 0.02)
    return SimoModel(merged.encoder, {t: e.tasks[t] for t, e in experts.items()}, experts_heads(experts)), base, experts


def experts_heads(experts: dict[str, SimoModel]) -> dict[str, nn.Module]:
    return {task: copy.deepcopy(expert.heads[task]) for task, expert in experts.items()}


def tokens(model: SimoModel, images: Tensor, blocks: int) -> Tensor:
    """The hidden states after some blocks, by the modules of transformers alone."""
    backbone = model.encoder.backbone
    with torch.no_grad():
        hidden: Tensor = backbone.embeddings((images - model.encoder.mean) / model.encoder.std)
        for block in model.encoder.layout.blocks[:blocks]:
            output = block(hidden)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden


def first_block(model: SimoModel) -> str:
    """The name of the first block in the backbone; it depends on the version of transformers."""
    block = model.encoder.layout.blocks[0]
    return next(name for name, module in model.encoder.backbone.named_modules() if module is block)


IMAGES = torch.rand((6, 3, 24, 32), generator=torch.Generator().manual_seed(0))


def test_samples_are_merged_inputs_and_the_mean_of_the_experts_outputs(two_blocks: Models) -> None:
    merged, base, experts = two_blocks
    distillation = BlockDistillation(merged, base, experts)
    for index in range(2):
        samples = distillation.samples(index, as_images(IMAGES), batch_size=4)
        torch.testing.assert_close(samples.inputs, tokens(merged, IMAGES, index))
        outputs = [tokens(expert, IMAGES, index + 1) for expert in experts.values()]
        torch.testing.assert_close(samples.targets, (outputs[0] + outputs[1]) / 2)
        found = tokens(merged, IMAGES, index + 1)
        # The objective of the paper is the distance from the mean plus a constant, the spread of the experts.
        paper = sum((found - each).square().mean() for each in outputs) / 2
        spread = sum((samples.targets - each).square().mean() for each in outputs) / 2
        assert samples.distance == pytest.approx(float(paper - spread), rel=1e-4)


def slow_gradients(
    merged: SimoModel, samples: BlockSamples, vectors: dict[str, Tensor], batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The gradient of the relative objective with respect to the coefficients: that of a weight times its vector."""
    block = merged.encoder.layout.blocks[0]
    output = block(batch["input"])
    hidden = output[0] if isinstance(output, tuple) else output
    ((hidden - batch["target"]).square().mean() / samples.distance).backward()
    weights_gradient = {name: value.grad for name, value in block.named_parameters()}
    block.zero_grad()
    return {name: torch.stack([weights_gradient[name] * each for each in vectors[name]]) for name in vectors}


def test_one_step_of_training_is_that_of_a_slow_loop(two_blocks: Models, tmp_path: Path) -> None:
    merged, base, experts = two_blocks
    distillation = BlockDistillation(merged, base, experts)
    samples = distillation.samples(0, as_images(IMAGES))
    vectors = {}
    for name, value in base.encoder.layout.blocks[0].named_parameters():
        theirs = [dict(e.encoder.layout.blocks[0].named_parameters())[name].detach() for e in experts.values()]
        vectors[name] = torch.stack([each - value.detach() for each in theirs])
    (batch,) = training_batches(samples, 4, 1, seed=2)
    gradients = slow_gradients(merged, samples, vectors, batch)
    given = {"steps": 1, "batch_size": 4, "lr": 0.1, "seed": 2}
    found = realign(merged, experts, IMAGES, method="prodistill", base=base, **given)
    before, after = (dict(model.encoder.layout.blocks[0].named_parameters()) for model in (merged, found))
    for name, vector in vectors.items():
        coefficients = -first_rate(0.1) * gradients[name] / (gradients[name].abs() + 1e-8)
        expected = before[name].detach() + (coefficients * vector).sum(0)
        big = (gradients[name].abs() > 1e-7).all(0)  # the sign of a gradient of rounding errors is no fact
        torch.testing.assert_close(after[name].detach()[big], expected[big], rtol=1e-3, atol=1e-5)
        assert big.any() or "bias" in name  # a bias of the keys changes no output


def test_the_gradient_of_the_coefficients_is_that_of_a_slow_loop(two_blocks: Models) -> None:
    merged, base, experts = two_blocks
    samples = BlockDistillation(merged, base, experts).samples(0, as_images(IMAGES))
    vectors = task_vectors(base, experts, first_block(merged))
    expected = slow_gradients(merged, samples, vectors, {"input": samples.inputs, "target": samples.targets})
    blend = ElementBlend(merged.encoder.layout.blocks[0], vectors)
    output = samples.call.replaced(samples.inputs).run(blend)
    ((output - samples.targets).square().mean() / samples.distance).backward()
    for name, gradient in zip(vectors, (each.grad for each in blend.coefficients), strict=True):
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_with_zero_coefficients_a_block_is_the_given_one(two_blocks: Models) -> None:
    merged, base, experts = two_blocks
    block = merged.encoder.layout.blocks[0]
    before = weights(block)
    blend = ElementBlend(block, task_vectors(base, experts, first_block(merged)))
    assert all(each.shape[0] == 2 and not each.any() for each in blend.coefficients)
    assert all(torch.equal(value, before[name]) for name, value in blend.weights().items())
    assert blend.settle() is block and same(weights(block), before)


def test_the_objective_of_every_block_falls_and_nothing_else_changes(two_blocks: Models, tmp_path: Path) -> None:
    merged, base, experts = two_blocks
    trained = realign(merged, experts, IMAGES, method="prodistill", base=base, steps=60, batch_size=6)
    # The first block's inputs stay; those of the second come from the trained first block.
    half = copy.deepcopy(merged)
    half.encoder.layout.blocks[0].load_state_dict(trained.encoder.layout.blocks[0].state_dict())
    for index, (old, new) in enumerate(((merged, half), (half, trained))):
        before, after = (BlockDistillation(m, base, experts).samples(index, as_images(IMAGES)) for m in (old, new))
        assert torch.equal(before.inputs, after.inputs) and after.distance < 0.5 * before.distance
    kept, found = weights(merged.encoder.backbone), weights(trained.encoder.backbone)
    changed = {name for name, value in kept.items() if not torch.equal(value, found[name])}
    assert changed and all("layer.0." in name or "layer.1." in name for name in changed)


def test_a_single_expert_is_found_again(two_blocks: Models) -> None:
    _, base, experts = two_blocks
    depth = {"depth": experts["depth"]}
    model = SimoModel(copy.deepcopy(base.encoder), depth["depth"].tasks, experts_heads(depth)).eval()
    found = realign(model, depth, IMAGES, method="prodistill", base=base, steps=300, batch_size=6)
    with torch.no_grad():
        wanted, before, after = (m.encode(IMAGES).maps[-1] for m in (depth["depth"], model, found))
    assert (after - wanted).square().mean() < 0.01 * (before - wanted).square().mean()


def test_a_fold_may_follow(
    merged: SimoModel, base: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
) -> None:
    found = realign(merged, experts, rooms, method="prodistill", base=base, steps=2, batch_size=4)
    folded = realign(found, experts, rooms, method="fold", ridge=0.1)
    assert folded.provenance["realign"]["after"] == found.provenance["realign"]
    assert same(weights(folded.encoder), weights(found.encoder))


def test_finished_blocks_are_not_trained_again(
    two_blocks: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged, base, experts = two_blocks
    given = {"method": "prodistill", "base": base, "steps": 3, "batch_size": 3}
    expected = realign(merged, experts, IMAGES, **given)
    seen: list[int] = []

    def die_in_the_second_block(state: TrainingState, log: TrainLog) -> None:
        seen.append(log.steps)
        if len(seen) == 5:
            state.save(log)
            raise Killed

    monkeypatch.setattr(TrainingState, "save_once_in_a_while", die_in_the_second_block)
    with pytest.raises(Killed):
        realign(merged, experts, IMAGES, work_folder=tmp_path, **given)
    assert seen == [1, 2, 3, 1, 2]
    found = {each.name for each in tmp_path.iterdir()}
    assert found == {"inputs.json", "block-0.safetensors", "block-1-state.safetensors"}
    assert same(weights(realign(merged, experts, IMAGES, work_folder=tmp_path, **given)), weights(expected))
    assert seen == [1, 2, 3, 1, 2, 3]


class Custom(nn.Module):
    channels, strides = (4,), (8,)

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 8, 8)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.patches(images),)


class TwoSizes(DenseDataset):
    """A dataset of images of two sizes."""

    def __init__(self) -> None:
        super().__init__({}, 4)

    def image(self, index: int) -> Tensor:
        return IMAGES[index] if index % 2 else IMAGES[index, :, :16]

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        return {}


def test_what_it_cannot_train_is_named(
    two_blocks: Models, make_model: Callable[..., SimoModel], rooms: DenseDataset
) -> None:
    merged, base, experts = two_blocks

    custom = SimoModel(Custom(), {"depth": Task("depth")}, {"depth": nn.Identity()})
    with pytest.raises(InputError, match="Custom is a custom encoder, whose blocks are unknown"):
        realign(custom, {"depth": custom}, IMAGES, method="prodistill", base=custom)

    with pytest.raises(InputError, match="image 1 is 32 x 24 pixels, the first 32 x 16; this needs images of one"):
        realign(merged, experts, TwoSizes(), method="prodistill", base=base)
    with pytest.raises(InputError, match="the base does not fit expert 'depth'"):
        realign(merged, experts, IMAGES, method="prodistill", base=make_model([]))
