"""Models in half precision predict what they predict in single precision, up to rounding."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import simomerge as sm
from simomerge.datasets.tasks import Task
from simomerge.models.encoders import CustomEncoder, Encoder
from simomerge.models.heads import build_head
from simomerge.models.model import SimoModel

from .declared import Cnn

KINDS = ("linear", "dpt", "binned-depth")
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 6e-2}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("kind", KINDS)
def test_every_head_predicts_in_half_precision(
    make_model: Callable[..., SimoModel], kind: str, dtype: torch.dtype, adapted: bool
) -> None:
    encoder = make_model({}).encoder
    torch.manual_seed(0)
    settings = {"fusion_channels": 8} if kind == "dpt" else {}
    model = SimoModel(encoder, {"depth": Task("depth")}, {"depth": build_head(kind, encoder.channels, 1, settings)})
    if adapted:
        for adapter in model.encoder.add_adapters(2):
            torch.nn.init.normal_(adapter.up.weight, std=0.1)
    image = np.random.default_rng(0).integers(0, 255, (37, 45, 3), dtype=np.uint8)
    wanted = model.predict(image)["depth"]
    found = copy.deepcopy(model).to(dtype).predict(image)["depth"]
    assert found.dtype == np.float32 and found.shape == (37, 45)
    assert np.abs(found - wanted).mean() < TOLERANCE[dtype] * np.abs(wanted).mean()


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "ConvNeXt V2": lambda: transformers.ConvNextV2Model(
        transformers.ConvNextV2Config(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1])
    ),
    "Swin": lambda: transformers.SwinModel(
        transformers.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, image_size=64)
    ),
    "BEiT": lambda: transformers.BeitModel(
        transformers.BeitConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            patch_size=8,
            image_size=32,
        )
    ),
    "a class of one's own": Cnn,
}
"""Backbones that do not cast images to the dtype of their weights."""


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_cast_to_the_dtype_of_the_weights(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    backbone = FAMILIES[family]()
    encoder = CustomEncoder(backbone) if isinstance(backbone, Cnn) else Encoder(backbone)
    model = SimoModel(encoder, {"depth": Task("depth")}, {"depth": build_head("conv", encoder.channels, 1)}).eval()
    image = torch.rand(3, 32, 32)
    wanted, cast = model.predict(image)["depth"], copy.deepcopy(model).to(dtype)
    for given in (image, image.double()):  # whatever the dtype of the images
        found = cast.predict(given)["depth"]
        assert np.abs(found - wanted).mean() < TOLERANCE.get(dtype, 1e-5) * np.abs(wanted).mean()
    assert cast(image[None])["depth"].dtype == dtype


def test_autocast_chooses_the_dtype_of_images_itself() -> None:
    model, seen = SimoModel(Cnn(), {}, {}).to(torch.float16), list[torch.dtype]()
    for mixer in model.encoder.backbone.mixers:
        mixer.norm.float()  # on a CPU, a batch norm in half precision takes no other dtype
    model.encoder.backbone.first_stem.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encode(torch.rand(1, 3, 8, 8)).maps[0].dtype == torch.bfloat16
    model.encode(torch.rand(1, 3, 8, 8))
    assert seen == [torch.float32, torch.float16]


# Normalisation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64])
def test_the_normalisation_of_images_is_never_rounded(
    make_model: Callable[..., SimoModel], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make_model([Task("depth")])
    exact = {"mean": [0.5, 0.45, 0.4], "std": [0.25, 0.24, 0.23]}
    assert model.encoder.preprocessing == exact
    cast = copy.deepcopy(model).to(dtype)
    assert cast.encoder.backbone.dtype == dtype and cast.encoder.preprocessing == exact
    folder = cast.save_pretrained(tmp_path / "cast")
    written = json.loads((folder / "simo.json").read_text())["encoder"]
    assert {name: written[name] for name in exact} == exact
    processor = json.loads((folder / "encoder" / "preprocessor_config.json").read_text())
    assert [processor[f"image_{name}"] for name in exact] == list(exact.values())
    # Back in float32, only the rounding of the weights is left.
    again = cast.float()
    assert torch.equal(again.encoder.mean, model.encoder.mean) and torch.equal(again.encoder.std, model.encoder.std)
    assert copy.deepcopy(model).to("meta").encoder.mean.is_meta


@pytest.mark.filterwarnings("ignore:expert .* does not record its base", "ignore:The task vector of")
def test_an_expert_in_half_precision_merges_with_others(
    make_model: Callable[..., SimoModel], tiny_base: Path, tmp_path: Path
) -> None:
    half = make_model([Task("depth")]).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    for depth in (half, sm.load(tmp_path / "half")):
        merged = sm.merge(sm.load(tiny_base), {"depth": depth, "normals": make_model([Task("normals")])}, scale=0.5)
        assert merged.encoder.preprocessing == {"mean": [0.5, 0.45, 0.4], "std": [0.25, 0.24, 0.23]}
