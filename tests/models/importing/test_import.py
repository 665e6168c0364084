"""Experts from elsewhere predict what their sources predict, and misfits are named."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import (
    BeitConfig,
    BeitModel,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2Model,
    DPTConfig,
    DPTForDepthEstimation,
    SwinConfig,
    ViTConfig,
    ViTModel,
)
from transformers.models.dpt.modeling_dpt import DPTNeck, DPTSemanticSegmentationHead

import simomerge as sm
from simomerge.checkpoints.experts import trained_size
from simomerge.cli import cli
from simomerge.core.errors import InputError
from simomerge.models.importing import import_expert
from simomerge.models.importing.transformers import largest_difference, source_model
from simomerge.runtime import Scene

from . import models


@pytest.fixture(autouse=True)
def always_float32(float32: None) -> None:
    """Every test here computes in float32."""


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    models.base().save_pretrained(folder)
    return folder


SOURCES = {
    "depth-anything": (models.depth_anything, "disparity"),
    "metric": (lambda folder: models.depth_anything(folder, "metric"), "depth"),
    "dpt-depth": (models.dpt_depth, "depth"),
    "dpt-ignore": (lambda folder: models.dpt_depth(folder, "ignore"), "depth"),
    "dpt-segmentation": (models.dpt_segmentation, "segmentation"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_an_imported_expert_predicts_what_its_source_predicts(tmp_path: Path, name: str) -> None:
    make, kind = SOURCES[name]
    folder = make(tmp_path / "source")
    expert = import_expert(folder, "scene")
    assert expert.tasks["scene"].kind == kind
    assert expert.encoder.preprocessing["mean"] == pytest.approx(models.CLIP_MEAN)
    expert.save_pretrained(tmp_path / "expert")
    again = sm.load(tmp_path / "expert")
    original = source_model(str(folder))
    assert original is not None
    step = expert.encoder.multiple
    square = name == "dpt-segmentation"  # that one of transformers' takes square images only
    for size in [(4 * step, 4 * step), (6 * step, 6 * step) if square else (3 * step, 5 * step)]:
        for model in (expert, again):
            difference, largest = largest_difference(model, original, size)
            assert largest > 0.01 and difference < 1e-5 * max(1, largest)


@pytest.mark.parametrize("pooling", [True, False])
def test_dpt_on_beit_reads_its_blocks_without_a_layer_norm(tmp_path: Path, pooling: bool) -> None:
    torch.manual_seed(4)
    size = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
    beit = BeitConfig(**size, patch_size=16, image_size=64, use_mean_pooling=pooling, **models.OUT)
    config = DPTConfig(backbone_config=beit, neck_ignore_stages=[], **models.NECK)
    folder = models.make(DPTForDepthEstimation(config), tmp_path / "source")
    expert = import_expert(folder, "depth")
    assert expert.tasks["depth"].kind == "disparity"  # as all DPTs of MiDaS
    difference, largest = largest_difference(expert, source_model(str(folder)), (64, 64))  # type: ignore[arg-type]
    assert difference < 1e-5 * max(1, largest)


def test_dpt_on_a_swiglu_dinov2(tmp_path: Path) -> None:
    torch.manual_seed(4)
    backbone = Dinov2Config(**models.BACKBONE, **models.OUT, apply_layernorm=False, use_swiglu_ffn=True)
    config = DPTConfig(backbone_config=backbone, neck_ignore_stages=[], **models.NECK)
    folder = models.make(DPTForDepthEstimation(config), tmp_path / "source")
    expert = import_expert(folder, "depth")
    difference, largest = largest_difference(expert, source_model(str(folder)))  # type: ignore[arg-type]
    assert expert.tasks["depth"].kind == "depth" and largest > 0.01 and difference < 1e-5


@pytest.mark.parametrize("name", ["depth-anything", "dpt-segmentation"])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_no_attention_or_weights_that_a_file_names_are_fetched(tmp_path: Path, name: str, key: str) -> None:
    folder = SOURCES[name][0](tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    for place in (config, config["backbone_config"] or {}):
        place.update({key: "attacker/kernels", "transformers_weights": "../other.safetensors"})
    (folder / "config.json").write_text(json.dumps(config))
    expert, original = import_expert(folder, "scene"), source_model(str(folder))
    assert original is not None
    backbone = getattr(original, "backbone", original)
    for each in (expert.encoder.backbone, original, backbone):
        assert each.config._attn_implementation in ("eager", "sdpa")
    assert largest_difference(expert, original)[0] < 1e-5


def test_dpt_on_a_pyramid_and_hybrids_are_refused(tmp_path: Path) -> None:
    swin = SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], out_indices=[1, 2, 3, 4])
    config = DPTConfig(backbone_config=swin, neck_ignore_stages=[], **models.NECK)
    config.architectures = ["DPTForDepthEstimation"]
    config.save_pretrained(tmp_path / "swin")
    torch.save({"a": torch.zeros(1)}, tmp_path / "swin/pytorch_model.bin")
    with pytest.raises(InputError, match="SwinModel, a pyramid"):
        import_expert(tmp_path / "swin", "depth")
    config = json.loads((tmp_path / "swin/config.json").read_text())
    (tmp_path / "swin/config.json").write_text(json.dumps({**config, "is_hybrid": True}))
    with pytest.raises(InputError, match="DPT hybrids"):
        import_expert(tmp_path / "swin", "depth")


def test_an_import_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.depth_anything(tmp_path / "source")
    monkeypatch.setattr("simomerge.models.importing.transformers.largest_difference", lambda *given: (0.1, 1.0))
    with pytest.raises(InputError, match=r"would differ from it by 1\.0e-01.*nothing was written"):
        cli.main(["import", str(folder), "--task", "depth", "-o", str(tmp_path / "expert")], standalone_mode=False)
    assert not (tmp_path / "expert").exists()


def test_mask_tokens_of_a_head_may_not_be_missing(tmp_path: Path, base_folder: Path) -> None:
    state = {f"decode.{n}": v for n, v in Decoder(32, 3).state_dict().items() if n != "classifier.bias"}
    torch.save(state, tmp_path / "mine.pth")
    with pytest.raises(InputError, match=r"1 tensors are missing \(decode\.mask_tokens\.weight"):
        import_expert(
            tmp_path / "mine.pth",
            "segmentation",
            classes=("a", "b", "c"),
            encoder=base_folder,
            head_prefix="decode.",
            head=f"{Masked.__module__}:Masked",
        )


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(32, 3, 1, bias=False)
        self.mask_tokens = nn.Embedding(2, 3)


def test_classes_and_activation_are_the_sources(tmp_path: Path) -> None:
    expert = import_expert(models.dpt_segmentation(tmp_path / "source"), "rooms")
    assert expert.tasks["rooms"].classes == ("wall", "floor", "cat")
    metric = import_expert(models.depth_anything(tmp_path / "metric", "metric"), "depth")
    image = torch.rand(3, 70, 84)
    with torch.no_grad():
        wanted = source_model(str(tmp_path / "metric"))(  # type: ignore[misc]
            pixel_values=(image[None] - metric.encoder.mean) / metric.encoder.std
        ).predicted_depth[0]
    np.testing.assert_allclose(metric.predict(image)["depth"], wanted, atol=1e-4)


class SegmentationNet(nn.Module):
    """The model of some training code: DINOv2, DPT's neck and head, and an auxiliary layer."""

    def __init__(self) -> None:
        super().__init__()
        config = DPTConfig(backbone_config=models.dinov2(), num_labels=3, neck_ignore_stages=[], **models.NECK)
        self.backbone = Dinov2Backbone(models.dinov2())
        self.neck, self.head = DPTNeck(config), DPTSemanticSegmentationHead(config)
        self.auxiliary = nn.Conv2d(16, 3, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        height, width = (side // 14 for side in pixels.shape[-2:])
        logits = self.head(self.neck(self.backbone(pixels).feature_maps, height, width))
        return F.interpolate(logits, pixels.shape[-2:], mode="bilinear", align_corners=False)


class Decoder(nn.Module):
    """The head of some training code, with other names than ours."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.settings = {"width": width, "classes": classes}
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, features: Any) -> torch.Tensor:
        return F.interpolate(self.classifier(features.maps[-1]), features.padded_size, mode="bilinear")


def trained(base: nn.Module) -> SegmentationNet:
    torch.manual_seed(5)
    net = SegmentationNet().eval()
    ours = dict(net.backbone.named_parameters())
    with torch.no_grad():
        for name, value in base.named_parameters():
            ours[name].copy_(value + 0.05 * torch.randn_like(value))
    return net


@pytest.mark.filterwarnings("ignore:expert .* does not record its base")
def test_depth_anything_and_a_dpt_segmentation_of_one_base_become_one_model(tmp_path: Path, base_folder: Path) -> None:
    """Two experts of two training codes become one encoder with both heads."""
    net = trained(models.base())
    state = {name: value for name, value in net.state_dict().items() if not name.startswith("auxiliary.")}
    torch.save(state, tmp_path / "segmentation.pth")
    depth = import_expert(models.depth_anything(tmp_path / "anything", start=models.base()), "depth")
    depth.encoder.mean.copy_(torch.tensor(sm.load(base_folder).encoder.preprocessing["mean"]).view(1, 3, 1, 1))
    depth.encoder.std.copy_(torch.tensor(sm.load(base_folder).encoder.preprocessing["std"]).view(1, 3, 1, 1))
    segmentation = import_expert(
        tmp_path / "segmentation.pth",
        "segmentation",
        classes=("wall", "floor", "cat"),
        encoder=base_folder,
        encoder_prefix="backbone.",
        head_prefix="",
        head="transformers",
        head_settings={
            "architecture": "DPTForSemanticSegmentation",
            "config": {**models.NECK, "num_labels": 3},
        },
    )
    image = torch.rand(1, 3, 70, 56)
    with torch.no_grad():
        wanted = net((image - segmentation.encoder.mean) / segmentation.encoder.std)
        torch.testing.assert_close(segmentation(image)["segmentation"], wanted, rtol=1e-5, atol=1e-5)
    experts = {"depth": depth, "segmentation": segmentation}
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 255, (70, 84, 3), dtype=np.uint8)) for _ in range(16)]
    merged = sm.merge(sm.load(base_folder), experts, "task-arithmetic", scale=0.6)
    model = sm.realign(merged, experts, images=pictures)
    for task, expert in experts.items():
        with torch.no_grad():
            wanted = expert(image)[task]
            before, after = ((each(image)[task] - wanted).square().mean() for each in (merged, model))
        assert after < before
    model.save_pretrained(tmp_path / "scene")
    maps = sm.load(tmp_path / "scene").predict(pictures[0])
    assert {name: value.shape for name, value in maps.items()} == {"depth": (70, 84), "segmentation": (70, 84)}


def original_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' DINOv2 as DINOv2's own code would save it, written out by hand."""
    out = {}
    for name, value in state.items():
        match = re.match(r"encoder\.layer\.(\d+)\.(.*)", name)
        if match:
            number, rest = match.groups()
            if ".query." in rest:
                kind = rest.rpartition(".")[2]
                parts = [state[name.replace("query", part)] for part in ("query", "key", "value")]
                out[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat(parts)
            elif ".key." not in rest and ".value." not in rest:
                rest = rest.replace("attention.output.dense", "attn.proj")
                rest = rest.replace("layer_scale1.lambda1", "ls1.gamma").replace("layer_scale2.lambda1", "ls2.gamma")
                out[f"blocks.{number}.{rest}"] = value
            continue
        name = name.replace("embeddings.position_embeddings", "pos_embed").replace("layernorm", "norm")
        name = name.replace("embeddings.patch_embeddings.projection", "patch_embed.proj").replace("embeddings.", "")
        out[name] = value
    return out


def on_disk(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    model.save_pretrained(folder)  # type: ignore[operator]
    return load_file(folder / "model.safetensors")


def test_checkpoints_with_dinov2s_names_and_a_custom_head(tmp_path: Path, base_folder: Path) -> None:
    net = trained(models.base())
    state = {f"encoder.{n}": v for n, v in original_names(on_disk(net.backbone, tmp_path / "net")).items()}
    decoder = Decoder(32, 3)
    state |= {f"decode.{name}": value for name, value in decoder.state_dict().items()}
    torch.save({"state_dict": {f"{name}": value for name, value in state.items()}}, tmp_path / "mine.pth")
    expert = import_expert(
        tmp_path / "mine.pth",
        "segmentation",
        classes=("wall", "floor", "cat"),
        encoder=base_folder,
        encoder_prefix="encoder.",
        head_prefix="decode.",
        head=f"{Decoder.__module__}:Decoder",
        head_settings={"width": 32, "classes": 3},
        taps=[2, 4],
    )
    image = torch.rand(1, 3, 56, 70)
    with torch.no_grad():
        last = net.backbone((image - expert.encoder.mean) / expert.encoder.std).feature_maps[-1]
        grid = last[:, 1:].transpose(1, 2).unflatten(2, (4, 5))
        wanted = F.interpolate(decoder.classifier(grid), (56, 70), mode="bilinear")
        torch.testing.assert_close(expert(image)["segmentation"], wanted, rtol=1e-5, atol=1e-5)
    assert expert.provenance["base"]["fingerprint"] == sm.load(base_folder).encoder_fingerprint()


@pytest.mark.parametrize("bias", [True, False])
def test_the_head_of_plain_training_code_is_one_convolution(tmp_path: Path, base_folder: Path, bias: bool) -> None:
    net, layer = trained(models.base()), nn.Conv2d(32, 3, 1, bias=bias)
    state = {f"encoder.{n}": v for n, v in net.backbone.state_dict().items()}
    torch.save({**state, **{f"head.{n}": v for n, v in layer.state_dict().items()}}, tmp_path / "mine.pth")
    given = {"encoder": base_folder, "encoder_prefix": "encoder.", "head_prefix": "head.", "classes": ("a", "b", "c")}
    expert = import_expert(
        tmp_path / "mine.pth", "segmentation", **given, head="conv", taps=[2, 4], head_settings={"taps": [1]}
    )
    parts = import_expert(tmp_path / "mine.pth", "parts", **given, head="conv", taps=[4])  # classes say what it is
    assert parts.tasks["parts"].kind == "segmentation"
    sized = import_expert(tmp_path / "mine.pth", "segmentation", **given, head="conv", taps=[4], size="56x70")
    assert (trained_size(sized.provenance), trained_size(expert.provenance)) == ((56, 70), None)
    with pytest.raises(InputError, match="size 56: give HEIGHTxWIDTH"):
        import_expert(tmp_path / "mine.pth", "segmentation", **given, head="conv", taps=[4], size="56")
    image = torch.rand(1, 3, 56, 70)
    with torch.no_grad():
        last = expert.encode(image).maps[-1]
        wanted = F.interpolate(layer(last), (56, 70), mode="bilinear")
        torch.testing.assert_close(expert(image)["segmentation"], wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"the head in it is one layer \(head\.weight.*give --head conv"):
        import_expert(tmp_path / "mine.pth", "segmentation", **given, head="linear", taps=[2, 4])
    with pytest.raises(InputError, match=r"another size\. Check --taps, --classes and .*: subpixels, taps"):
        import_expert(tmp_path / "mine.pth", "segmentation", **given, head="conv", taps=[2, 4])


@sm.register_head
class Sums(nn.Module):
    """A head that reads one tap, with as many channels as it is given."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.channels = channels

    def forward(self, features: Any) -> torch.Tensor:
        (found,) = features.maps
        return self.weight * F.interpolate(found[:, : self.channels], features.padded_size)


def test_a_head_that_cannot_read_the_features_is_refused(tmp_path: Path, base_folder: Path) -> None:
    state = {f"backbone.{key}": value for key, value in sm.load(base_folder).encoder.backbone.state_dict().items()}
    torch.save(state | {"head.weight": torch.ones(1)}, tmp_path / "mine.pth")
    given: dict[str, Any] = {"encoder": base_folder, "encoder_prefix": "backbone.", "head_prefix": "head."}
    given |= {"head": f"{__name__}:Sums"}
    import_expert(tmp_path / "mine.pth", "normals", **given, taps=[4])
    with pytest.raises(InputError, match=r"Sums fails on the encoder's features \(ValueError: too many.*--taps"):
        import_expert(tmp_path / "mine.pth", "normals", **given, taps=[2, 4])
    with pytest.raises(InputError, match=r"Sums gives \(1, 2, \d+, \d+\) for one image, and the task 'normals' needs"):
        import_expert(tmp_path / "mine.pth", "normals", **given, taps=[4], head_settings={"channels": 2})


# Training files and adapters ------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", ["", "module.", "model.", "_orig_mod.", "model._orig_mod."])
@torch.no_grad()
def test_a_training_file_of_lightning(tmp_path: Path, base_folder: Path, wrapper: str) -> None:
    """The weights are chosen by their key, and what a wrapper puts before all names needs no option."""
    torch.manual_seed(11)
    encoder, layer, average = models.base(), nn.Conv2d(32, 2, 1), nn.Conv2d(32, 2, 1)
    for parameter in encoder.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    states = {}
    for key, head in (("state_dict", layer), ("state_dict_ema", average)):
        named = {f"backbone.{name}": value for name, value in encoder.state_dict().items()}
        named |= {f"head.{name}": value for name, value in head.state_dict().items()}
        states[key] = {f"{wrapper}{name}": value for name, value in named.items()}
    file = tmp_path / "last.ckpt"
    torch.save({"epoch": 3, "hyper_parameters": {"lr": 0.1}, **states}, file)
    options: dict[str, Any] = {"encoder": base_folder, "encoder_prefix": "backbone.", "head_prefix": "head."}
    options |= {"head": "conv", "taps": [4], "classes": ("a", "b")}
    with pytest.raises(InputError, match=r"state_dict, state_dict_ema \(an average\)"):
        import_expert(file, "segmentation", **options)
    image = torch.rand(1, 3, 56, 70)
    for key, head in (("state_dict", layer), ("state_dict_ema", average)):
        expert = import_expert(f"{file}::{key}", "segmentation", **options)
        assert expert.provenance["imported"]["source"] == f"last.ckpt::{key}"
        pixels = (image - expert.encoder.mean) / expert.encoder.std
        ((last, _),) = layers(encoder, pixels, [4], True)
        wanted = F.interpolate(head(last), (56, 70), mode="bilinear", align_corners=False)
        torch.testing.assert_close(expert(image)["segmentation"], wanted, rtol=1e-4, atol=1e-5)


class Segmenter(nn.Module):
    """A model of some training code, to which peft adds LoRA; the head has statistics, and is saved in full."""

    def __init__(self, auxiliary: bool = False) -> None:
        super().__init__()
        self.backbone = models.base()
        self.decode_head = nn.Sequential(nn.Conv2d(32, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))
        if auxiliary:
            self.auxiliary = nn.Conv2d(32, 3, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        ((last, _),) = layers(self.backbone, pixels, [4], True)
        return F.interpolate(self.decode_head(last), pixels.shape[-2:], mode="bilinear", align_corners=False)


class ConvHead(nn.Sequential):
    """The head of that code."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(32, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))

    def forward(self, features: Any) -> torch.Tensor:
        return F.interpolate(super().forward(features.maps[-1]), features.padded_size, mode="bilinear")


HEAD = f"{ConvHead.__module__}:ConvHead"


def adapter(folder: Path, model: nn.Module, **settings: Any) -> nn.Module:
    """Write a trained LoRA adapter; the model that peft merges."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(12)
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "fc1"], "init_lora_weights": False} | settings)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.train()
    adapted(torch.rand(2, 3, 56, 56))  # batch norms measure
    adapted.save_pretrained(folder)
    return adapted.eval().merge_and_unload()


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@torch.no_grad()
def test_an_adapter_with_its_head_predicts_what_peft_merges(
    tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = adapter(tmp_path / "adapter", Segmenter(), modules_to_save=["decode_head"])
    options: dict[str, Any] = {"encoder": base_folder, "head": HEAD, "head_prefix": "decode_head.", "taps": [4]}
    expert = import_expert(tmp_path / "adapter", "segmentation", classes=("a", "b", "c"), **options)
    image = torch.rand(2, 3, 56, 70)
    wanted = merged((image - expert.encoder.mean) / expert.encoder.std)
    torch.testing.assert_close(expert(image)["segmentation"], wanted, rtol=1e-4, atol=1e-5)
    assert wanted.std() > 0.1
    assert expert.provenance["imported"] == {"source": "adapter", "as": "LoRA adapter"}
    assert expert.provenance["base"]["source"] == base_folder.name
    assert expert.provenance["base"]["fingerprint"] == sm.load(base_folder).encoder_fingerprint()
    assert expert.encoder_fingerprint() != expert.provenance["base"]["fingerprint"]
    arguments = ["import", str(tmp_path / "adapter"), "--task", "segmentation", "--classes", "a,b,c", "--taps", "4"]
    arguments += ["--encoder", str(base_folder), "--head", HEAD, "--head-prefix", "decode_head."]
    cli.main([*arguments, "-o", str(tmp_path / "expert")], standalone_mode=False)
    assert "segmentation of 3 channels, taps [4]" in capsys.readouterr().out
    again = sm.load(tmp_path / "expert", trust_code=True)
    torch.testing.assert_close(again(image)["segmentation"], wanted, rtol=1e-4, atol=1e-5)
    # The merge of such an expert alone, at full scale, is the expert itself.
    result = sm.merge(base_folder, {"segmentation": again}, "task-arithmetic", scale=1.0)
    torch.testing.assert_close(result.eval()(image)["segmentation"], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@torch.no_grad()
def test_an_adapter_with_one_layer_as_its_head(tmp_path: Path, base_folder: Path) -> None:
    class Linear(Segmenter):
        def __init__(self) -> None:
            super().__init__()
            self.decode_head = nn.Conv2d(32, 3, 1)

    class Lightning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Linear()

        def forward(self, pixels: torch.Tensor) -> Any:
            return self.model(pixels)

    options: dict[str, Any] = {"encoder": base_folder, "head": "conv", "head_prefix": "decode_head.", "taps": [4]}
    for number, make in enumerate((Linear, Lightning)):
        folder = tmp_path / str(number)
        merged = adapter(folder, make(), modules_to_save=["decode_head"], bias="all")
        expert = import_expert(folder, "parts", classes=("a", "b", "c"), **options)
        image = torch.rand(1, 3, 70, 56)
        wanted = merged((image - expert.encoder.mean) / expert.encoder.std)
        torch.testing.assert_close(expert(image)["parts"], wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"the head in it is one layer .*'linear' has several"):
        import_expert(folder, "parts", classes=("a", "b", "c"), **{**options, "head": "linear"})


class Placed(nn.Module):
    """An encoder in an attribute of any name, and a head of one layer."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.net, self.head = encoder, nn.Conv2d(32, 2, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden = self.net(pixel_values=pixels).last_hidden_state
        side = pixels.shape[-1] // 14
        logits = self.head(hidden[:, -side * side :].transpose(1, 2).unflatten(2, (side, side)))
        return F.interpolate(logits, pixels.shape[-2:], mode="bilinear", align_corners=False)


WIDE = {name: value for name, value in models.BACKBONE.items() if name != "mlp_ratio"} | {"intermediate_size": 48}
FAMILIES = {
    "swiglu": lambda: Dinov2Model(Dinov2Config(**models.BACKBONE, use_swiglu_ffn=True)),
    "pooler": lambda: ViTModel(ViTConfig(**WIDE)),
    "shared bias": lambda: BeitModel(BeitConfig(**WIDE, use_shared_relative_position_bias=True)),
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_adapters_on_families_whose_names_differ_on_disk(tmp_path: Path, family: str) -> None:
    torch.manual_seed(13)
    encoder = FAMILIES[family]()
    encoder.save_pretrained(tmp_path / "base")
    targets = r".*\.(q_proj|query|dense|gate_proj|up_proj|fc1)"  # with that of the pooler
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=targets, modules_to_save=["head"], init_lora_weights=False)
    adapted = peft.get_peft_model(Placed(encoder), config)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload().eval()
    options: dict[str, Any] = {"encoder": tmp_path / "base", "head": "conv", "head_prefix": "head.", "taps": [4]}
    expert = import_expert(tmp_path / "adapter", "parts", classes=("a", "b"), **options)
    image = torch.rand(1, 3, 70, 70)
    wanted = merged((image - expert.encoder.mean) / expert.encoder.std)
    torch.testing.assert_close(expert(image)["parts"], wanted, rtol=1e-4, atol=1e-5)
    assert wanted.std() > 0.05


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_adapters_that_cannot_be_an_expert_yet(tmp_path: Path, base_folder: Path) -> None:
    folder = tmp_path / "adapter"
    adapter(folder, Segmenter(auxiliary=True), modules_to_save=["decode_head", "auxiliary"])
    options: dict[str, Any] = {"encoder": base_folder, "head": HEAD, "head_prefix": "decode_head.", "taps": [4]}
    options |= {"classes": ("a", "b", "c")}
    for change, message in (
        ({}, r"2 tensors are used by nothing \(auxiliary\.\w+, auxiliary\.\w+\).*--drop"),
        ({"drop": ("auxiliary.",), "head_prefix": "head."}, r"used by nothing \(decode_head\..*missing \(head\.0"),
        ({"encoder": None}, r"adapter is a LoRA adapter: give --encoder"),
        ({"head": ""}, "is a LoRA adapter: give --head "),
        ({"encoder_prefix": "backbone."}, "--encoder-prefix does nothing here, names in an adapter say"),
    ):
        with pytest.raises(InputError, match=message):
            import_expert(folder, "segmentation", **{**options, **change})
    import_expert(folder, "segmentation", **options, drop=("auxiliary.",))
    with pytest.raises(InputError, match=rf"a peft adapter.*simomerge import {folder} .*--head-prefix decode_head\."):
        sm.load(folder)
    adapter(tmp_path / "bare", models.base(), target_modules=["q_proj"])
    with pytest.raises(InputError, match=r"bare: the adapter holds no whole head\. .* \(simomerge merge BASE"):
        import_expert(tmp_path / "bare", "segmentation", **options)
    with pytest.raises(InputError, match=r"lost\.ckpt::ema: no such file"):
        import_expert(tmp_path / "lost.ckpt::ema", "segmentation", **options)


# DINOv2's own heads ---------------------------------------------------------------------------------------


def layers(
    base: nn.Module, pixels: torch.Tensor, taps: list[int], normed: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(map, CLS) of some blocks."""
    hidden = base(pixel_values=pixels, output_hidden_states=True).hidden_states
    chosen = [base.layernorm(hidden[tap]) if normed else hidden[tap] for tap in taps]  # type: ignore[operator]
    grid = (pixels.shape[-2] // 14, pixels.shape[-1] // 14)
    return [(each[:, 1:].transpose(1, 2).unflatten(2, grid), each[:, 0]) for each in chosen]


def test_dinov2_large_heads_read_the_blocks_that_dinov2_says(tmp_path: Path) -> None:
    """Not the quarters of 24: its configuration has 4, 11, 17 and 23, counted from 0."""
    config = {**models.BACKBONE, "num_hidden_layers": 24, "hidden_size": 8, "num_attention_heads": 1}
    Dinov2Model(Dinov2Config(**config)).save_pretrained(tmp_path / "large")
    state = {"decode_head.conv_depth.weight": torch.zeros(4, 64, 1, 1), "decode_head.conv_depth.bias": torch.zeros(4)}
    torch.save(state, tmp_path / "dinov2_vitl14_nyu_linear4_head.pth")
    expert = import_expert(tmp_path / "dinov2_vitl14_nyu_linear4_head.pth", "depth", encoder=tmp_path / "large")
    assert expert.encoder.taps == (5, 12, 18, 24) and not expert.encoder.apply_layernorm


@pytest.mark.parametrize(("count", "taps"), [(1, [4]), (4, [1, 2, 3, 4])])
@torch.no_grad()
def test_dinov2s_linear_depth_heads(tmp_path: Path, base_folder: Path, count: int, taps: list[int]) -> None:
    torch.manual_seed(6)
    weight, bias = torch.randn(16, count * 64, 1, 1), torch.randn(16)
    file = tmp_path / "dinov2_vits14_kitti_linear_head.pth"
    torch.save({"state_dict": {"decode_head.conv_depth.weight": weight, "decode_head.conv_depth.bias": bias}}, file)
    expert = import_expert(file, "depth", encoder=base_folder)
    image = torch.rand(2, 3, 56, 70)
    found = layers(models.base(), (image - expert.encoder.mean) / expert.encoder.std, taps, False)
    # As its code does it: concatenate, enlarge by four, project, normalise, take the mean of the bins, enlarge.
    wide = torch.cat([torch.cat([m, c[:, :, None, None].expand_as(m)], 1) for m, c in found], 1)
    wide = F.interpolate(wide, (16, 20), mode="bilinear", align_corners=False)
    weights = F.conv2d(wide, weight, bias).relu() + 0.1
    bins = torch.linspace(0.001, 80, 16)
    depth = (weights / weights.sum(1, keepdim=True) * bins[:, None, None]).sum(1, keepdim=True).clamp(0.001, 80)
    wanted = F.interpolate(depth, (56, 70), mode="bilinear", align_corners=False)
    torch.testing.assert_close(expert(image)["depth"], wanted, rtol=1e-4, atol=2e-3)
    assert expert.encoder.taps == tuple(taps)


@torch.no_grad()
def test_dinov2s_linear_segmentation_head(tmp_path: Path, base_folder: Path) -> None:
    torch.manual_seed(7)
    norm, layer = nn.BatchNorm2d(32), nn.Conv2d(32, 3, 1)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    state = {f"decode_head.bn.{n}": v for n, v in norm.state_dict().items()}
    state |= {f"decode_head.conv_seg.{n}": v for n, v in layer.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "dinov2_vits14_ade20k_linear_head.pth")
    expert = import_expert(
        tmp_path / "dinov2_vits14_ade20k_linear_head.pth", "rooms", classes=("a", "b", "c"), encoder=base_folder
    )
    image = torch.rand(2, 3, 56, 70)
    ((last, _),) = layers(models.base(), (image - expert.encoder.mean) / expert.encoder.std, [4], True)
    wanted = F.interpolate(layer(norm.eval()(last)), (56, 70), mode="bilinear", align_corners=False)
    torch.testing.assert_close(expert(image)["rooms"], wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def dpt_head(file: Path) -> DPTForDepthEstimation:
    """A model with DINOv2's DPT depth head, whose file has DINOv2's names, written out from transformers' by hand."""
    torch.manual_seed(8)
    config = DPTConfig(
        backbone_config=models.dinov2(False),
        readout_type="project",
        use_bias_in_fusion_residual=False,
        add_projection=True,
        neck_ignore_stages=[],
        neck_hidden_sizes=[8, 12, 16, 24],
        fusion_hidden_size=256,  # what transformers' projection is fixed to
    )
    source = DPTForDepthEstimation(config).eval()
    source.backbone.load_state_dict(models.base().state_dict())
    source.head.head[4].weight.mul_(3e7)  # depths below the least and beyond the largest depth
    source.head.head[4].bias.fill_(130)
    state = {}
    for name, value in source.state_dict().items():
        new = name.replace("neck.reassemble_stage.readout_projects.", "reassemble_blocks.readout_projects.")
        new = re.sub(r"neck\.reassemble_stage\.layers\.(\d)\.projection", r"reassemble_blocks.projects.\1.conv", new)
        new = re.sub(r"neck\.reassemble_stage\.layers\.(\d)\.resize", r"reassemble_blocks.resize_layers.\1", new)
        new = re.sub(r"neck\.convs\.(\d)", r"convs.\1.conv", new)
        new = re.sub(r"neck\.fusion_stage\.layers\.(\d)\.projection", r"fusion_blocks.\1.project.conv", new)
        new = re.sub(
            r"neck\.fusion_stage\.layers\.(\d)\.residual_layer(\d)\.convolution(\d)",
            r"fusion_blocks.\1.res_conv_unit\2.conv\3.conv", new,
        )  # fmt: skip
        new = new.replace("head.projection", "project.conv").replace("head.head", "conv_depth.head")
        if not name.startswith("backbone") and "blocks.0.res_conv_unit1" not in new:
            state[f"decode_head.{new}"] = value
    state["decode_head.conv_depth.weight"] = torch.zeros(1, 256, 1, 1)  # unused there too
    state["decode_head.conv_depth.bias"] = torch.zeros(1)
    torch.save({"state_dict": state}, file)
    return source


@torch.no_grad()
@pytest.mark.parametrize(("data", "most"), [("nyu", 10.0), ("kitti", 80.0)])
def test_dinov2s_dpt_depth_head(tmp_path: Path, base_folder: Path, data: str, most: float) -> None:
    """Transformers' numbers plus the least depth, clamped before they are resized to the image, as DINOv2 does."""
    file = tmp_path / f"dinov2_vits14_{data}_dpt_head.pth"
    source, image = dpt_head(file), torch.rand(1, 3, 56, 70)
    expert = import_expert(file, "depth", encoder=base_folder)
    theirs = source(pixel_values=(image - expert.encoder.mean) / expert.encoder.std).predicted_depth
    clamped = [min(max(value + 0.001, 0.001), most) for value in theirs.flatten().tolist()]
    assert min(clamped) == 0.001 and max(clamped) == most and 0.3 < np.mean(np.isin(clamped, (0.001, most))) < 0.97
    wanted = torch.tensor(clamped).view(1, 1, *theirs.shape[1:])
    wanted = F.interpolate(wanted, (56, 70), mode="bilinear", align_corners=False)
    torch.testing.assert_close(expert(image)["depth"], wanted, rtol=1e-4, atol=2e-3)
    again = sm.load(expert.save_pretrained(tmp_path / "expert"))
    torch.testing.assert_close(again(image)["depth"], wanted, rtol=1e-4, atol=2e-3)
    settings = json.loads((tmp_path / "expert/simo.json").read_text())["heads"]["depth"]["settings"]
    assert settings["limit"] == [0.001, most]


@torch.no_grad()
def test_a_head_of_earlier_versions_has_no_limit(tmp_path: Path, base_folder: Path) -> None:
    file = tmp_path / "dinov2_vits14_nyu_dpt_head.pth"
    source, image = dpt_head(file), torch.rand(1, 3, 56, 70)
    folder = import_expert(file, "depth", encoder=base_folder).save_pretrained(tmp_path / "expert")
    content = json.loads((folder / "simo.json").read_text())
    del content["heads"]["depth"]["settings"]["limit"]
    (folder / "simo.json").write_text(json.dumps(content))
    expert = sm.load(folder)
    theirs = source(pixel_values=(image - expert.encoder.mean) / expert.encoder.std).predicted_depth[:, None]
    wanted = F.interpolate(theirs, (56, 70), mode="bilinear", align_corners=False) + 0.001
    torch.testing.assert_close(expert(image)["depth"], wanted, rtol=1e-4, atol=2e-3)
    content["heads"]["depth"]["settings"]["limit"] = [3, 1]
    (folder / "simo.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"simo\.json.*limit is \[3, 1\]: give the smallest and the largest"):
        sm.load(folder)


def test_the_limits_of_a_head_are_exported(tmp_path: Path, base_folder: Path) -> None:
    pytest.importorskip("onnxruntime")
    file = tmp_path / "dinov2_vits14_nyu_dpt_head.pth"
    dpt_head(file)
    expert = import_expert(file, "depth", encoder=base_folder)
    sm.export(expert, tmp_path / "expert.onnx", (56, 70))
    image = np.random.default_rng(0).integers(0, 256, (56, 70, 3), dtype=np.uint8)
    with torch.no_grad():
        ours = expert(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)["depth"]
    found = Scene(tmp_path / "expert.onnx").predict(image)["depth"]
    assert float(ours.max()) <= 10.0001 and float(ours.min()) >= 0.0009
    np.testing.assert_allclose(np.squeeze(found), ours.squeeze().numpy(), rtol=1e-3, atol=2e-3)


# Refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_prefix": "model."}, r"tensors are used by nothing \(backbone\..*missing \(model\."),
        ({"drop": ()}, r"2 tensors are used by nothing \(auxiliary\.weight, auxiliary\.bias\).*--drop"),
        ({"head": ""}, r"is a weight file: give --head \(module:Class"),
        ({"encoder": None}, "give --encoder"),
        ({"head": "nowhere:Head"}, "nowhere:Head: the module 'nowhere' cannot be imported"),
        ({"head_prefix": "backbone."}, "--encoder-prefix and --head-prefix are both 'backbone.'"),
        ({"mean": (0.5, 0.5)}, "give three numbers"),
        (
            {"head_settings": {"width": 32, "classes": 4}},
            r"decode.*classifier\.weight.*another architecture or another size",
        ),
    ],
)
def test_mappings_that_do_not_fit_list_what_does_not(
    tmp_path: Path, base_folder: Path, change: dict[str, Any], message: str
) -> None:
    net = trained(models.base())
    state = {f"backbone.{n}": v for n, v in net.backbone.state_dict().items()}
    state |= {f"decode.{n}": v for n, v in Decoder(32, 3).state_dict().items()}
    state |= {f"auxiliary.{n}": v for n, v in net.auxiliary.state_dict().items()}
    torch.save(state, tmp_path / "mine.pth")
    options: dict[str, Any] = {
        "encoder": base_folder,
        "encoder_prefix": "backbone.",
        "head_prefix": "decode.",
        "head": f"{Decoder.__module__}:Decoder",
        "head_settings": {"width": 32, "classes": 3},
        "classes": ("a", "b", "c"),
        "drop": ("auxiliary.",),
    }
    import_expert(tmp_path / "mine.pth", "segmentation", **options)
    with pytest.raises(InputError, match=message):
        import_expert(tmp_path / "mine.pth", "segmentation", **{**options, **change})


@pytest.mark.parametrize("value", [{"a": 1}, math.inf, "DPTForDepthEstimation", [], 3])
def test_architectures_that_are_no_list_of_names_are_refused(value: Any, tmp_path: Path) -> None:
    models.depth_anything(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": value}))
    with pytest.raises(InputError, match=r"config\.json|only DepthAnythingForDepthEstimation"):
        import_expert(tmp_path, "depth")


def test_other_architectures_are_named(tmp_path: Path, base_folder: Path) -> None:
    with pytest.raises(InputError, match="Dinov2Model, but only DepthAnythingForDepthEstimation"):
        import_expert(base_folder, "depth")
    with pytest.raises(InputError, match="no such folder, and as a hub id"):
        import_expert("someone/some-depth-model", "depth")
    with pytest.raises(InputError, match=r"nosuch\.pth: no such file"):
        import_expert(base_folder / "nosuch.pth", "depth", encoder=base_folder, head="linear")


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"encoder": "base"}, "--encoder"),
        ({"taps": [1, 2]}, "--taps"),
        ({"apply_layernorm": False}, "--layernorm"),
        ({"drop": ["foo."]}, "--drop"),
        ({"head_settings": {"a": 1}}, "--head-arg"),
        ({"mean": (0, 0, 0)}, "--mean"),
    ],
)
def test_what_would_be_ignored_is_refused(
    tmp_path: Path, base_folder: Path, given: dict[str, Any], option: str
) -> None:
    folder = models.depth_anything(tmp_path / "source")
    with pytest.raises(InputError, match=f"{option} does nothing here, a folder"):
        import_expert(folder, "depth", **given)
    with pytest.raises(InputError, match="predicts depth, which has no classes"):
        import_expert(folder, "depth", classes=("a", "b"))
    file = tmp_path / "dinov2_vits14_nyu_linear_head.pth"
    state = {"decode_head.conv_depth.weight": torch.zeros(4, 64, 1, 1), "decode_head.conv_depth.bias": torch.zeros(4)}
    torch.save(state, file)
    with pytest.raises(InputError, match="--head-prefix does nothing here, the file is a head that DINOv2 publishes"):
        import_expert(file, "depth", encoder=base_folder, head_prefix="q.")
    with pytest.raises(InputError, match="give --encoder, the DINOv2"):
        import_expert(file, "depth")


def test_a_task_is_not_named_after_another_sort_of_prediction(tmp_path: Path) -> None:
    folder = models.dpt_segmentation(tmp_path / "source")
    with pytest.raises(InputError, match="predicts segmentation: choose another task name than 'depth'"):
        import_expert(folder, "depth")
    assert import_expert(models.depth_anything(tmp_path / "d"), "depth").tasks["depth"].kind == "disparity"


def test_a_readout_that_is_added_cannot_be_folded_into(tmp_path: Path) -> None:
    expert = import_expert(models.dpt_depth(tmp_path / "source", "add"), "depth")
    with pytest.raises(InputError, match="adds the CLS token"):
        expert.heads["depth"].projections()


def test_the_command_says_how_far_it_is_from_its_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = models.depth_anything(tmp_path / "source")
    arguments = ["import", str(folder), "--task", "depth", "-o", str(tmp_path / "expert")]
    cli.main([*arguments, "--json"], standalone_mode=False)
    printed = json.loads(capsys.readouterr().out)
    assert printed["largest_difference"] < 1e-4 and printed["taps"] == [1, 2, 3, 4]
    cli.main([*arguments, "--overwrite"], standalone_mode=False)
    assert "differ from the source's by at most" in capsys.readouterr().out
    assert sm.load(tmp_path / "expert").tasks["depth"].kind == "disparity"


def test_an_option_that_is_misspelt_is_named_with_the_nearest_one() -> None:
    with pytest.raises(InputError, match=r"import_expert has no option 'clases': did you mean 'classes'\?"):
        import_expert("nowhere.pth", "depth", clases=["a"])
