"""Gram matrices and Fisher information of a tiny model, compared with explicit hooks and gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from simomerge.checkpoints import canonicalise
from simomerge.core.errors import InputError
from simomerge.core.progress import show_progress
from simomerge.datasets import DenseDataset
from simomerge.merging import MergeMethod, get_method, merge_state_dicts
from simomerge.models.encoders import Encoder, load_encoder
from simomerge.models.model import SimoModel
from simomerge.training.lpft import image_losses
from simomerge.training.statistics import fisher_information, input_grams

MakeModel = Callable[..., SimoModel]


@pytest.fixture(scope="module")
def encoder(tiny_base: object) -> Encoder:
    return load_encoder(tiny_base)  # type: ignore[arg-type]


def all_inputs(encoder: Encoder, images: torch.Tensor) -> dict[str, np.ndarray]:
    """Name of each linear weight on disk -> all its inputs (tokens, C), float64."""
    inputs_of: dict[str, list[np.ndarray]] = {}
    handles = []
    linear = {n: m for n, m in encoder.backbone.named_modules() if isinstance(m, nn.Linear)}
    on_disk = {own: name for name, own in canonicalise(f"{n}.weight" for n in linear).items()}
    for name, module in linear.items():
        rows = inputs_of.setdefault(on_disk[f"{name}.weight"], [])
        handles.append(
            module.register_forward_hook(
                lambda m, inputs, output, rows=rows: rows.append(inputs[0].detach().flatten(0, -2).double().numpy())
            )
        )
    with torch.no_grad():
        for image in images:
            encoder.eval()(image[None])
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(rows) for name, rows in inputs_of.items()}


def hooks(encoder: Encoder) -> int:
    return sum(len(module._forward_pre_hooks) for module in encoder.modules())


def test_grams_are_the_second_moments_of_all_tokens(encoder: Encoder, rooms: DenseDataset) -> None:
    images = torch.stack([rooms.image(i) for i in range(len(rooms))])
    inputs = all_inputs(encoder, images)
    grams = input_grams(encoder, rooms, batch_size=5)  # a short batch at the end
    patches = grams.pop("embeddings.patch_embeddings.projection.weight")  # a convolution of patches
    pixels = (images - encoder.mean) / encoder.std
    size = encoder.multiple
    cut = pixels.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2).double()
    np.testing.assert_allclose(patches, (cut.T @ cut / len(cut))[None], rtol=1e-4, atol=1e-4)
    assert set(grams) == set(inputs)
    assert "encoder.layer.0.attention.attention.query.weight" in grams and len(grams) == 4 * 6
    for name, x in inputs.items():
        assert len(x) == 12 * (3 * 4 + 1)  # patches and CLS
        assert grams[name].dtype == np.float64 and grams[name].shape == (x.shape[1],) * 2
        np.testing.assert_allclose(grams[name], x.T @ x / len(x), rtol=0, atol=1e-6 * np.abs(x).max() ** 2)
        np.testing.assert_allclose(grams[name], grams[name].T, rtol=1e-12)


def test_the_batch_size_and_the_targets_do_not_matter(
    encoder: Encoder, rooms: DenseDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(rooms), "targets", lambda *_: pytest.fail("read a target"))
    one, all_at_once = (input_grams(encoder, rooms, batch_size=size) for size in (1, 100))
    for name, gram in one.items():
        np.testing.assert_allclose(all_at_once[name], gram, rtol=0, atol=1e-5 * np.abs(gram).max())


def test_input_grams_do_not_change_the_encoder(encoder: Encoder, rooms: DenseDataset) -> None:
    encoder.train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    input_grams(encoder, rooms.take(2))
    assert encoder.training and hooks(encoder) == 0
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())

    def stop(*line: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), show_progress(stop):
        input_grams(encoder, rooms)
    assert encoder.training and hooks(encoder) == 0
    encoder.eval()


def test_progress_counts_images(encoder: Encoder, make_model: MakeModel, rooms: DenseDataset) -> None:
    lines: list[tuple] = []
    with show_progress(lambda *line: lines.append(line[:3])):
        input_grams(encoder, rooms, batch_size=8)
    assert lines == [("input Grams", 8, 12), ("input Grams", 12, 12)]
    lines.clear()
    data = rooms.select("depth").take(2)
    with show_progress(lambda *line: lines.append(line[:3])):
        fisher_information(make_model(data.tasks), data, label="depth")
    assert lines == [("depth", 1, 2), ("depth", 2, 2)]


def test_fisher_is_the_mean_squared_gradient_of_each_image(make_model: MakeModel, rooms: DenseDataset) -> None:
    data = rooms.select(["depth", "segmentation"])
    model = make_model(data.tasks)
    model.requires_grad_(True)
    expected = {name: np.zeros(p.shape) for name, p in model.encoder.backbone.named_parameters()}
    for i in range(3):
        model.zero_grad()
        batch = {key: value[None] for key, value in data[i].items()}
        sum(image_losses(model, batch).values()).backward()  # type: ignore[union-attr]
        for name, parameter in model.encoder.backbone.named_parameters():
            if parameter.grad is not None:
                expected[name] += parameter.grad.double().numpy() ** 2 / 3
    fishers = fisher_information(model, data, count=3)
    assert list(fishers) == list(canonicalise(expected))
    for name, own_name in canonicalise(expected).items():
        assert fishers[name].dtype == np.float32 and fishers[name].shape == expected[own_name].shape
        np.testing.assert_allclose(fishers[name], expected[own_name], rtol=1e-3, atol=1e-5 * expected[own_name].max())
    assert not fishers["embeddings.mask_token"].any()
    moved = [name for name, fisher in fishers.items() if fisher.any()]
    assert len(moved) > 0.9 * len(fishers) and all((fisher >= 0).all() for fisher in fishers.values())


def test_fisher_does_not_change_the_model(make_model: MakeModel, rooms: DenseDataset) -> None:
    data = rooms.select("depth")
    model = make_model(data.tasks).train()
    model.encoder.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one, two = (fisher_information(model, data, count=count) for count in (2, 2))
    assert model.training and not any(p.requires_grad for p in model.encoder.parameters())
    assert all(p.grad is None for p in model.parameters()) and all(p.requires_grad for p in model.heads.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(np.array_equal(value, two[name]) for name, value in one.items())
    with torch.no_grad():
        inside = fisher_information(model, data, count=2)
    assert all(np.array_equal(value, inside[name]) for name, value in one.items())
    everything = fisher_information(model, data.take(3), count=100)
    assert not np.array_equal(everything["embeddings.cls_token"], one["embeddings.cls_token"])


def test_mistakes(encoder: Encoder, make_model: MakeModel, rooms: DenseDataset) -> None:
    depth = make_model({"depth": rooms.tasks["depth"]})
    with pytest.raises(InputError, match="there are no images"):
        input_grams(encoder, [])
    with pytest.raises(InputError, match="the model has no tasks"):
        fisher_information(make_model({}), rooms)
    with pytest.raises(InputError, match="unknown task 'depth'"):
        fisher_information(depth, rooms.select("segmentation"))
    with pytest.raises(InputError, match="count is 0; give a whole number"):
        fisher_information(depth, rooms, count=0)
    with torch.no_grad():
        depth.encoder.backbone.encoder.layer[1].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="the loss of image 0 is not finite"):
        fisher_information(depth, rooms)
    with pytest.raises(InputError, match=r"the inputs of 'encoder\.layer\.1\.mlp\.fc2' are not finite"):
        input_grams(depth.encoder, rooms)


def test_the_merge_methods_take_them(make_model: MakeModel, rooms: DenseDataset) -> None:
    base = make_model({}).encoder.backbone.state_dict()
    experts, grams, fishers = {}, {}, {}
    for seed, task in enumerate(("depth", "segmentation")):
        data = rooms.select(task).take(4)
        model = make_model(data.tasks)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.encoder.backbone.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        experts[task] = model.encoder.backbone.state_dict()
        grams[task] = input_grams(model.encoder, data)
        fishers[task] = fisher_information(model, data)
    mean = merge_state_dicts(base, experts, "average")

    def changed(method: MergeMethod) -> set[str]:
        merged = merge_state_dicts(base, experts, method)
        assert list(merged) == list(base) and all(torch.isfinite(tensor).all() for tensor in merged.values())
        return {n for n, own in canonicalise(base).items() if (merged[own] - mean[own]).abs().max() > 1e-5}

    # Not the patches: both experts see the same ones, so their mean keeps the outputs best.
    regmean = set(grams["depth"]) - {"embeddings.patch_embeddings.projection.weight"}
    assert changed(get_method("regmean", grams=grams)) == regmean
    # Not changed: the mask token, which no loss depends on, and the biases of keys, which cancel in the softmax.
    assert changed(get_method("fisher", fishers=fishers)) >= {n for n in fishers["depth"] if n.endswith("weight")}
