"""Calibration of the encoder's linear layers: an independent computation, exact cases, and the encoders it can take."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel

from models.encoders.families import save_tiny
from simomerge.assembly.realign import realign
from simomerge.assembly.realign.layers import Calibration
from simomerge.core.errors import InputError
from simomerge.datasets import groups
from simomerge.datasets.pictures import as_images
from simomerge.datasets.tasks import Task
from simomerge.models.encoders import Encoder, load_encoder
from simomerge.models.heads import build_head
from simomerge.models.model import SimoModel
from simomerge.recipes.recipe import Recipe, RecipeError

from .contract import same, weights

TASKS = ("depth", "edges")
IMAGES = list(torch.rand((12, 3, 24, 32), generator=torch.Generator().manual_seed(0)))


def small(bias: bool = True) -> Encoder:
    """Two blocks whose weights are so large that the blocks matter."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "patch_size": 8}
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**sizes, layerscale_value=1.0, qkv_bias=bias))
    with torch.no_grad():
        for layer in linear_layers(model).values():
            layer.weight.normal_(0, 0.4)
    return Encoder(model)


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}


def noisy(encoder: Encoder, seed: int, whole: bool = False) -> Encoder:
    """A copy that differs in the linear layers inside its blocks, or in all its weights."""
    encoder = copy.deepcopy(encoder)
    generator = torch.Generator().manual_seed(seed)
    layers = [layer for block in encoder.layout.blocks for layer in linear_layers(block).values()]
    with torch.no_grad():
        for module in [encoder.backbone] if whole else layers:
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return encoder


def model_of(encoder: Encoder, *tasks: str) -> SimoModel:
    torch.manual_seed(1)
    heads = {task: build_head("linear", encoder.channels, 1) for task in TASKS}
    return SimoModel(encoder, {task: Task(task) for task in tasks}, {task: heads[task] for task in tasks}).eval()


def scene(encoder: Encoder, tasks: tuple[str, ...] = TASKS) -> tuple[SimoModel, dict[str, SimoModel]]:
    """A model of some tasks and its experts, which differ from it in all weights."""
    experts = {task: model_of(noisy(encoder, seed, whole=True), task) for seed, task in enumerate(tasks)}
    return model_of(encoder, *tasks), experts


def run(model: SimoModel, experts: dict[str, SimoModel], images: Any = IMAGES, **parameters: Any) -> SimoModel:
    return realign(model, experts, images, method="calibrate", **parameters)


def inputs_of(model: SimoModel, name: str, images: Any = IMAGES) -> np.ndarray:
    """(N, D): what a layer receives in a pass through the whole encoder, image by image."""
    rows: list[Tensor] = []
    layer = model.encoder.backbone.get_submodule(name)
    hook = layer.register_forward_hook(lambda _, args, __: rows.append(args[0][0]))
    with torch.no_grad():
        for image in images:
            model.encode(image[None])
    hook.remove()
    return torch.cat(rows).double().numpy()


def arrays(model: SimoModel, name: str) -> tuple[np.ndarray, np.ndarray]:
    layer: Any = model.encoder.backbone.get_submodule(name)
    return layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()


def targets_of(model: SimoModel, experts: dict[str, SimoModel], name: str, mix: float, images: Any) -> list[np.ndarray]:
    """The target of a layer by task."""
    found = []
    for expert in experts.values():
        w, b = arrays(expert, name)
        found.append((mix * inputs_of(expert, name, images) + (1 - mix) * inputs_of(model, name, images)) @ w.T + b)
    return found


def calibrated_slowly(model: SimoModel, experts: dict[str, SimoModel], mix: float, ridge: float) -> SimoModel:
    """One layer after the other, each by least squares of the rows of all tasks and of the penalty."""
    model = copy.deepcopy(model)
    for name in linear_layers(model.encoder.backbone):  # Dinov2 lists its layers in the order in which they run
        (w, b), x = arrays(model, name), inputs_of(model, name)
        share = math.sqrt(1 / len(experts))
        rows = [share * np.hstack([x, np.ones((len(x), 1))])] * len(experts)
        wanted = [share * (y - x @ w.T - b) for y in targets_of(model, experts, name, mix, IMAGES)]
        strength = math.sqrt(ridge * len(x) * np.mean(np.var(x, 0)))
        rows.append(strength * np.eye(x.shape[1], x.shape[1] + 1))
        wanted.append(np.zeros((x.shape[1], len(w))))
        solution = np.linalg.lstsq(np.vstack(rows), np.vstack(wanted), rcond=None)[0]
        layer: Any = model.encoder.backbone.get_submodule(name)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(w + solution[:-1].T))
            layer.bias.copy_(torch.from_numpy(b + solution[-1]))
    return model


def distance(model: SimoModel, expert: SimoModel, images: Any = IMAGES) -> float:
    """The mean square difference of features, as a share of the variance of the expert's features."""
    with torch.no_grad():
        pairs = [(model.encode(image[None]), expert.encode(image[None])) for image in images]
    parts = [[torch.cat([part[side].maps[-1].flatten() for part in pairs]) for side in (0, 1)]][0]
    return float((parts[0] - parts[1]).square().mean() / parts[1].var())


@pytest.mark.parametrize(("mix", "ridge"), [(0.0, 0.1), (0.25, 1e-2), (1.0, 1.0)])
def test_it_equals_least_squares_layer_by_layer(mix: float, ridge: float) -> None:
    model, experts = scene(small())
    found = run(model, experts, mix=mix, ridge=ridge, images_at_once=5)
    expected = calibrated_slowly(model, experts, mix, ridge)
    assert len(linear_layers(found.encoder)) == 12
    for name, weight in weights(expected).items():
        np.testing.assert_allclose(weights(found)[name], weight, atol=2e-5, rtol=1e-4, err_msg=name)
    assert found.provenance["realign"]["layers_changed"] == 12


def test_the_errors_are_those_of_held_out_images() -> None:
    model, experts = scene(small())
    result = copy.deepcopy(model)
    fits = Calibration(result, experts, 0.5, "auto").run(as_images(IMAGES))
    held_out = [IMAGES[index] for index in groups.held_out(IMAGES)]
    name = next(iter(linear_layers(model.encoder.backbone)))
    (w, b), y = arrays(model, name), np.mean(targets_of(model, experts, name, 0.5, held_out), 0)
    error = np.square(y - inputs_of(model, name, held_out) @ w.T - b).sum()
    first = next(iter(fits.values()))
    assert first.before == pytest.approx(error / np.square(y - y.mean(0)).sum(), rel=1e-4)
    assert len(fits) == 12 and all(fit.after <= fit.before for fit in fits.values())
    assert sum(fit.after for fit in fits.values()) < 0.8 * sum(fit.before for fit in fits.values())
    record = run(model, experts, mix=0.5).provenance["realign"]
    assert record["error_before"] == pytest.approx(np.mean([fit.before for fit in fits.values()]), abs=1e-4)
    assert record["error"] == pytest.approx(np.mean([fit.after for fit in fits.values()]), abs=1e-4)


def test_no_ridge_leaves_every_bit_of_the_encoder() -> None:
    model, experts = scene(small())
    result = run(model, experts, ridge="none")
    assert same(weights(model), weights(result)) and result.provenance["realign"]["layers_changed"] == 0


def test_a_model_that_equals_its_expert_stays_as_it_is() -> None:
    model = model_of(small(), "depth")
    result = run(model, {"depth": copy.deepcopy(model)}, mix=1)
    assert same(weights(model), weights(result)) and result.provenance["realign"]["error"] == 0


@pytest.mark.parametrize("bias", [True, False])
def test_one_expert_that_differs_in_linear_layers_is_recovered(bias: bool) -> None:
    model, expert = model_of(small(bias), "depth"), model_of(noisy(small(bias), 3), "depth")
    assert distance(model, expert) > 0.02
    result = run(model, {"depth": expert}, mix=1, ridge=0)
    assert distance(result, expert) < 1e-6
    found, wanted = (next(iter(linear_layers(each.encoder.layout.blocks[0]).values())) for each in (result, expert))
    # The inputs come from a layer norm and sum to zero, so a constant can be added to all weights of an output.
    centred = [(layer.weight - layer.weight.mean(1, keepdim=True)).detach() for layer in (found, wanted)]
    np.testing.assert_allclose(*centred, atol=1e-4)
    assert (found.bias is not None) == bias


def test_neither_the_order_of_tasks_nor_the_batches_matter() -> None:
    model, experts = scene(small())
    turned = model.select(TASKS[::-1])
    expected = weights(run(model, experts).encoder)
    for found in (run(turned, dict(reversed(experts.items()))), run(model, experts, images_at_once=1)):
        for name, weight in weights(found.encoder).items():
            torch.testing.assert_close(weight, expected[name], atol=1e-4, rtol=1e-4)


def test_two_images_are_too_few_to_choose_a_ridge() -> None:
    model, experts = scene(small())
    result, given = run(model, experts, IMAGES[:2]), run(model, experts, IMAGES[:2], ridge=0.1)
    assert same(weights(result), weights(given)) and result.provenance["realign"]["error"] is None


def test_an_encoder_without_linear_layers_is_refused() -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [2, 2], "layer_type": "basic"}
    model, experts = scene(Encoder(ResNetModel(ResNetConfig(**sizes))))
    with pytest.raises(InputError, match="ResNetModel has no linear layers in its blocks"):
        run(model, experts)


class Tiny(nn.Module):
    channels, strides = (4,), (4,)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, 4)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.stem(images),)


def test_a_custom_encoder_is_refused() -> None:
    model = SimoModel(Tiny(), {"depth": Task("depth")}, {"depth": build_head("linear", (4,), 1, {"cls": False})})
    with pytest.raises(InputError, match="Tiny is a custom encoder, whose blocks are unknown"):
        run(model, {"depth": copy.deepcopy(model)})


def test_a_fold_may_follow() -> None:
    model, experts = scene(small())
    calibrated = run(model, experts)
    folded = realign(calibrated, experts, IMAGES)
    assert same(weights(folded.encoder), weights(calibrated.encoder))
    assert folded.provenance["realign"]["after"] == calibrated.provenance["realign"]
    rows = ("average+calibrate+fold-cross", "average+calibrate(mix=1)+distill")
    assert Recipe(merges=("average",), realigned=rows).realigned == rows
    for row in ("average+heads+calibrate+fold", "auto+calibrate+fold", "average+calibrate+fold+fold"):
        with pytest.raises(RecipeError, match="a fold comes right after a merge"):
            Recipe(merges=("average",), realigned=(row,))


def test_a_layer_whose_input_does_not_depend_on_the_image_stays_as_it_is(tmp_path: Path) -> None:
    """In batches of one image too: Swin V2 makes its position biases by linear layers."""
    model, experts = scene(load_encoder(save_tiny("swinv2", tmp_path)), ("depth",))
    results = [run(model, experts, images_at_once=number) for number in (1, 12)]
    for result in results:
        for name, layer in linear_layers(result.encoder.backbone).items():
            same_weight = torch.equal(layer.weight, model.encoder.backbone.get_submodule(name).weight)
            assert same_weight or "position_bias" not in name, name
    one, many = (weights(result.encoder) for result in results)
    for name, weight in one.items():
        torch.testing.assert_close(weight, many[name], atol=1e-4, rtol=1e-4, msg=name)
