"""SyMerge: coefficients per expert and block are trained with the heads, against slow loops in plain torch."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import simomerge
from simomerge.assembly.realign import realign
from simomerge.assembly.realign.blend import EncoderBlend, task_vectors
from simomerge.assembly.realign.predictions import TeacherPredictions
from simomerge.core.errors import InputError
from simomerge.datasets import DenseDataset, random_flip
from simomerge.datasets.batches import training_batches
from simomerge.datasets.pictures import as_images
from simomerge.models.model import SimoModel

from .contract import same, weights

IMAGES = torch.rand((3, 3, 24, 30), generator=torch.Generator().manual_seed(0))


def first_rate(peak: float) -> float:
    """The learning rate of the first of two planned steps of the one-cycle schedule (one step of training)."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    return float(torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, 2, pct_start=0.05).get_last_lr()[0])


def block_of(name: str) -> int:
    """The block whose coefficient a parameter of the tiny base has: embeddings the first, the norm the last."""
    numbered = re.search(r"layer\.(\d)\.", name)
    return int(numbered.group(1)) if numbered else 0 if name.startswith("embeddings") else 3


def coefficient_gradients(model: SimoModel, base: SimoModel, experts: dict[str, SimoModel]) -> Tensor:
    """Gradients (experts, blocks) from those of the weights: sum over a block's weights of gradient times vector."""
    found = torch.zeros(len(experts), 4)
    theta = dict(base.encoder.backbone.named_parameters())
    for row, expert in enumerate(experts.values()):
        theirs = dict(expert.encoder.backbone.named_parameters())
        for name, parameter in model.encoder.backbone.named_parameters():
            if parameter.grad is not None:
                product = parameter.grad * (theirs[name].detach() - theta[name].detach())
                found[row, block_of(name)] += product.sum()
    return found


def test_with_zero_coefficients_the_encoder_is_the_given_one(
    merged: SimoModel, base: SimoModel, experts: dict[str, SimoModel]
) -> None:
    before = weights(merged.encoder)
    blend = EncoderBlend(merged, task_vectors(base, experts))
    assert blend.coefficients.shape == (2, 4) and not blend.coefficients.any()
    assert [name for name, value in blend.named_parameters() if value.requires_grad] == ["coefficients"]
    assert all(torch.equal(value, before[name]) for name, value in blend.weights().items())
    assert blend.settle() is merged.encoder and same(weights(merged.encoder), before)
    moved = copy.deepcopy(blend).double()  # as .to("cuda"): the task vectors go where the module goes
    assert {value.dtype for value in moved.vectors.values()} == {torch.float64}


def test_coefficients_scale_the_task_vectors_of_their_block(
    merged: SimoModel, base: SimoModel, experts: dict[str, SimoModel]
) -> None:
    blend = EncoderBlend(merged, task_vectors(base, experts))
    with torch.no_grad():
        blend.coefficients.copy_(torch.tensor([[0.1, 0.9, -0.4, 0.3], [0.5, 0.0, 0.2, 1.3]]))
    start = weights(merged.encoder.backbone)
    theta, theirs = weights(base.encoder.backbone), [weights(each.encoder.backbone) for each in experts.values()]
    blend.settle()
    for name, value in weights(merged.encoder.backbone).items():
        expected = start[name].clone()
        for row, expert in enumerate(theirs):
            expected += blend.coefficients[row, block_of(name)].detach() * (expert[name] - theta[name])
        torch.testing.assert_close(value, expected, msg=name)


def test_the_gradient_of_the_coefficients_is_that_of_a_slow_loop(
    merged: SimoModel, base: SimoModel, experts: dict[str, SimoModel]
) -> None:
    merged(IMAGES)["depth"].square().mean().backward()
    expected = coefficient_gradients(merged, base, experts)
    blend = EncoderBlend(merged, task_vectors(base, experts))
    merged.decode(blend(IMAGES))["depth"].square().mean().backward()
    assert blend.coefficients.grad is not None and (expected != 0).all()
    torch.testing.assert_close(blend.coefficients.grad, expected, rtol=1e-3, atol=1e-7)


def test_one_step_of_training_is_that_of_a_slow_loop(
    merged: SimoModel, base: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset, tmp_path: Path
) -> None:
    given = {"steps": 1, "batch_size": 4, "lr": 1e-3, "encoder_lr": 0.05, "seed": 3}
    found = realign(merged, experts, rooms, method="symerge", base=base, **given)
    predictions = TeacherPredictions(as_images(rooms), experts, tmp_path)
    flip = partial(random_flip, merged.tasks)
    (batch,) = training_batches(predictions, 4, 1, seed=3, transform=flip)
    first = {key: torch.stack([predictions[index][key] for index in range(8)]) for key in batch}
    with torch.no_grad():
        logits = merged(first["image"])
        units = {name: task.distance(logits[name], first[name]) for name, task in merged.tasks.items()}
    merged.heads.train()  # as in training: batch norms use the statistics of the batch
    logits = merged(batch["image"])
    total = sum(task.distance(logits[name], batch[name]) / units[name] for name, task in merged.tasks.items()) / 2
    total.backward()
    # The gradients are clipped too; that changes nothing here, as the first step of Adam depends on the signs.
    gradients = coefficient_gradients(merged, base, experts)
    coefficients = -first_rate(0.05) * gradients / (gradients.abs() + 1e-8)
    theta = weights(base.encoder.backbone)
    for name, value in merged.encoder.backbone.named_parameters():
        expected = value.detach().clone()
        for row, expert in enumerate(experts.values()):
            difference = dict(expert.encoder.backbone.named_parameters())[name].detach() - theta[name]
            expected += coefficients[row, block_of(name)] * difference
        torch.testing.assert_close(dict(found.encoder.backbone.named_parameters())[name], expected, rtol=0, atol=1e-5)
    heads = dict(found.heads.named_parameters())
    for name, value in merged.heads.named_parameters():
        assert value.grad is not None
        decay = 1 - first_rate(1e-3) * 0.01 * (value.ndim > 1)
        expected = value.detach() * decay - first_rate(1e-3) * value.grad / (value.grad.abs() + 1e-8)
        torch.testing.assert_close(heads[name].detach(), expected, rtol=1e-4, atol=1e-5)


def distances(model: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset) -> dict[str, float]:
    images = torch.stack([rooms.image(index) for index in range(len(rooms))])
    with torch.no_grad():
        logits = model(images)
        return {n: float(t.distance(logits[n], experts[n](images)[n])) for n, t in model.tasks.items()}


def test_predictions_come_nearer(
    merged: SimoModel, base: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
) -> None:
    found = realign(merged, experts, rooms, method="symerge", base=base, steps=30, batch_size=8)
    before, after = distances(merged, experts, rooms), distances(found, experts, rooms)
    assert all(after[task] < 0.8 * before[task] for task in after)


def test_it_may_follow_a_fold_across_taps(
    merged: SimoModel, base: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
) -> None:
    folded = realign(merged, experts, rooms, method="fold-cross", ridge=0.1)
    found = realign(folded, experts, rooms, method="symerge", base=base, steps=2, batch_size=8)
    assert found.provenance["realign"]["after"] == folded.provenance["realign"]
    assert not same(weights(found.encoder), weights(folded.encoder))


def test_a_base_that_does_not_fit_is_refused(
    merged: SimoModel, base: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
) -> None:
    origin = {"base": {"source": "tiny", "fingerprint": base.encoder_fingerprint()}}
    for expert in experts.values():
        expert.provenance = dict(origin)
    model = simomerge.merge(base, experts, scale=0.3)
    with pytest.raises(InputError, match="is not what the model was merged from as the base"):
        realign(model, experts, rooms, method="symerge", base=experts["depth"])
    backbone = base.encoder.backbone
    backbone.layernorm.weight = torch.nn.Parameter(torch.ones(5))
    with pytest.raises(InputError, match=r"layernorm.weight is \(5,\) in the base and \(32,\) in the expert"):
        realign(merged, experts, rooms, method="symerge", base=base)
