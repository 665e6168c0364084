"""The encoder against the backbone class of transformers, its settings, and what loading refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Dinov2Backbone,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
)

from simomerge.core.errors import InputError
from simomerge.models.encoders import Encoder, load_backbone, load_encoder
from simomerge.models.encoders.encoder import IMAGENET_MEAN, IMAGENET_STD, default_taps

MEAN = torch.tensor([0.5, 0.45, 0.4]).view(1, 3, 1, 1)  # what the tiny base's preprocessor_config.json holds
STD = torch.tensor([0.25, 0.24, 0.23]).view(1, 3, 1, 1)


@pytest.fixture
def encoder(tiny_base):
    return load_encoder(tiny_base)


def random_images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def copy_with(tiny_base, folder, change=None, keep=None):
    """A copy of the base with a ``change`` of its config, or with only the first ``keep`` bytes of its weights."""
    shutil.copytree(tiny_base, folder)
    if change is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
    if keep is not None:
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[:keep])
    return folder


# What it gives ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apply_layernorm", [True, False])
@pytest.mark.parametrize("size", [(80, 80), (64, 96)])
def test_maps_equal_those_of_the_backbone_class_of_transformers(tiny_base, apply_layernorm, size):
    theirs = Dinov2Backbone.from_pretrained(
        tiny_base, out_indices=[1, 3, 4], apply_layernorm=apply_layernorm, attn_implementation="eager"
    ).eval()
    ours = load_encoder(tiny_base, taps=(1, 3, 4), apply_layernorm=apply_layernorm)
    images = random_images(2, 3, *size)
    with torch.no_grad():
        expected = theirs((images - MEAN) / STD).feature_maps
        features = ours(images)
    assert len(features.maps) == 3
    for ours_map, theirs_map in zip(features.maps, expected, strict=True):
        torch.testing.assert_close(ours_map, theirs_map, rtol=0, atol=1e-5)


# Settings -----------------------------------------------------------------------------------------------


def test_default_taps_are_the_papers_for_twelve_blocks():
    assert default_taps(12) == (3, 6, 9, 12)
    assert default_taps(24) == (6, 12, 18, 24)
    assert default_taps(4) == (1, 2, 3, 4)
    assert default_taps(2) == (1, 2)  # no block twice


def test_taps_are_checked_when_an_encoder_is_loaded(tiny_base):
    with pytest.raises(InputError, match=r"blocks 1 to 4; .*no block 7"):
        load_encoder(tiny_base, taps=[1, 7])


def test_an_architecture_without_blocks_is_refused():
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    with pytest.raises(InputError, match=r"ResNetModel.*no stages of blocks.*`simomerge encoders`"):
        Encoder(model)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("dinov4", "'dinov4' is no vision encoder.*Similar names: dinov2"),
        ("bert", "'bert'.*no vision encoder"),
        ("", "cannot load"),
    ],
)
def test_what_is_no_vision_encoder_is_refused_with_near_ones(tiny_base, tmp_path, model_type, message):
    folder = copy_with(tiny_base, tmp_path / "other", {"model_type": model_type})
    if model_type == "bert":
        from transformers import BertConfig, BertModel

        size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        BertModel(BertConfig(**size, vocab_size=9)).save_pretrained(folder)
    with pytest.raises(InputError, match=message):
        load_backbone(folder)


def test_normalisation_comes_from_the_folder_else_imagenets(tiny_base, tmp_path):
    assert load_encoder(tiny_base).preprocessing == {"mean": [0.5, 0.45, 0.4], "std": [0.25, 0.24, 0.23]}
    bare = copy_with(tiny_base, tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    assert load_encoder(bare).preprocessing == {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}


def test_preprocessing_numbers_give_back_the_same_float32(tiny_base):
    backbone = load_backbone(tiny_base)
    clip_mean, clip_std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 1 / 3)
    encoder = Encoder(backbone, mean=clip_mean, std=clip_std)
    again = Encoder(backbone, **encoder.preprocessing)
    assert encoder.preprocessing["mean"] == pytest.approx(clip_mean, abs=1e-7)
    assert torch.equal(encoder.mean, again.mean) and torch.equal(encoder.std, again.std)


def test_channels_patch_and_cls_are_read_from_the_model(encoder):
    assert (encoder.channels, encoder.multiple, encoder.has_cls) == ((32,) * 4, 8, True)


# What loading refuses -----------------------------------------------------------------------------------


def test_a_truncated_checkpoint_is_refused_by_name(tiny_base, tmp_path):
    size = (tiny_base / "model.safetensors").stat().st_size
    for keep in (0, 5, 200, size // 2, size - 1):
        folder = copy_with(tiny_base, tmp_path / f"first_{keep}", keep=keep)
        with pytest.raises(InputError, match=f"first_{keep}"):
            load_encoder(folder)


def test_missing_weights_are_refused_by_name(tiny_base, tmp_path):
    folder = copy_with(tiny_base, tmp_path / "weightless")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"weightless holds no weights.*model\.safetensors"):
        load_encoder(folder)


def test_a_missing_config_is_refused_by_name(tiny_base, tmp_path):
    folder = copy_with(tiny_base, tmp_path / "configless")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="configless: cannot load"):
        load_encoder(folder)


def test_a_checkpoint_without_a_tensor_is_refused_not_filled_with_random_numbers(tiny_base, tmp_path):
    folder = copy_with(tiny_base, tmp_path / "deeper", change={"num_hidden_layers": 5})
    with pytest.raises(InputError, match=r"deeper: \d+ tensors are missing or have another shape"):
        load_encoder(folder)


@pytest.mark.parametrize("change", [{"hidden_size": 48}, {"image_size": 96}, {"patch_size": 16}])
def test_a_checkpoint_of_other_shapes_is_refused_by_name(tiny_base, tmp_path, change):
    folder = copy_with(tiny_base, tmp_path / "wider", change=change)
    with pytest.raises(InputError, match="wider"):
        load_encoder(folder)


@pytest.mark.parametrize("content", ["{", '{"image_mean": [0.5', "\x00"])
def test_a_damaged_preprocessor_config_is_refused_by_name(tiny_base, tmp_path, content):
    folder = copy_with(tiny_base, tmp_path / "folder")
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(InputError, match=r"preprocessor_config\.json"):
        load_encoder(folder)


@pytest.mark.parametrize("source", ["/no/such/encoder", "./no-such", "~/no-such", "runs/no/such"])
def test_a_folder_that_is_not_there_is_called_a_folder(source):
    with pytest.raises(InputError, match="no such folder") as caught:
        load_encoder(source)
    assert str(caught.value).startswith(source)


@pytest.mark.parametrize("source", ["facebook/not-in-the-cache", "not-in-the-cache"])
def test_a_hub_id_without_a_network_names_the_remedy(source):
    with pytest.raises(InputError, match="while online") as caught:
        load_encoder(source)
    assert str(caught.value).startswith(f"{source}: no such folder, and as a hub id: cannot load")
    assert "\n" not in str(caught.value)


def test_weights_are_loaded_in_float32_whatever_the_file_holds(tiny_base, tmp_path):
    Dinov2Model.from_pretrained(tiny_base).bfloat16().save_pretrained(tmp_path / "half")
    assert {p.dtype for p in load_backbone(tmp_path / "half").parameters()} == {torch.float32}


def test_a_position_grid_of_another_size_still_loads_where_the_config_says_so(tmp_path):
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(tmp_path / "small")
    with torch.no_grad():
        features = load_encoder(tmp_path / "small")(random_images(1, 3, 48, 24))
    assert features.maps[0].shape == (1, 16, 6, 3)


def test_normalisation_of_a_processor_that_transformers_5_wrote(tiny_base, tmp_path):
    folder = copy_with(tiny_base, tmp_path / "clip")
    (folder / "preprocessor_config.json").unlink()
    content = {
        "processor_class": "CLIPProcessor",
        "image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]},
    }
    (folder / "processor_config.json").write_text(json.dumps(content))
    assert load_encoder(folder).preprocessing == {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}


@pytest.mark.parametrize(("text", "message"), [('{"image_mean": null}', "image_mean is None"), ("[]", "not a mapping")])
def test_a_strange_preprocessor_is_refused_by_name(tiny_base, tmp_path, text, message):
    folder = copy_with(tiny_base, tmp_path / "strange")
    (folder / "preprocessor_config.json").write_text(text)
    with pytest.raises(InputError, match=rf"preprocessor_config\.json: .*{message}"):
        load_encoder(folder)


def test_encoders_with_another_layout_of_tokens_are_refused(tmp_path):
    """YOLOS has detection tokens behind the patches, RegNet other strides than a pyramid's, Siglip2 another input."""
    from transformers import RegNetConfig, RegNetModel, Siglip2VisionConfig, Siglip2VisionModel, YolosConfig, YolosModel

    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    yolos = YolosModel(YolosConfig(**size, image_size=[32, 32], patch_size=8, num_detection_tokens=5))
    siglip2 = Siglip2VisionModel(Siglip2VisionConfig(**size, patch_size=8))
    regnet = RegNetModel(RegNetConfig(embedding_size=4, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], groups_width=4))
    for name, model in (("yolos", yolos), ("siglip2", siglip2), ("regnet", regnet)):
        model.save_pretrained(tmp_path / name)
        with pytest.raises(InputError, match=r"cannot be read here|no vision encoder that can be read"):
            load_encoder(tmp_path / name)


def test_a_broken_torchvision_is_reported_as_by_the_doctor(tiny_base, tmp_path):
    """In a process of its own: transformers looks for torchvision once."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "torchvision-0.1.dist-info").mkdir()
    text = "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n"
    (tmp_path / "torchvision-0.1.dist-info/METADATA").write_text(text)
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    for arguments in (["doctor"], ["train", "--base", str(tiny_base), "--task", "depth", "--count", "2", "-o", "x"]):
        done = subprocess.run(
            [sys.executable, "-m", "simomerge", *arguments],
            env={**os.environ, "PYTHONPATH": paths, "SIMOMERGE_CACHE": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert "torchvision 0.1 is broken" in done.stdout + done.stderr
        assert "pip uninstall torchvision" in done.stdout + done.stderr and "Traceback" not in done.stderr
        assert done.returncode == (1 if arguments == ["doctor"] else 2)


def test_a_path_below_a_folder_that_is_here_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`runs/deth` next to a folder runs/ is not looked up on the hub, which takes a minute without network."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="runs/deth: no such folder"):
        load_backbone("runs/deth")


def test_the_fast_attention_is_used_where_no_gradient_is_needed(make_model: Any, monkeypatch: Any) -> None:
    encoder = make_model({}).encoder
    config = encoder.backbone.config
    assert config._attn_implementation == "eager"
    used: list[str] = []
    run = encoder._encode

    def noted(pixels: Tensor) -> Any:
        used.append(config._attn_implementation)
        return run(pixels)

    monkeypatch.setattr(encoder, "_encode", noted)
    images = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    slow = encoder(images)
    with torch.no_grad():
        fast = encoder(images)
    assert used == ["eager", "sdpa"] and config._attn_implementation == "eager"
    for ours, theirs in zip(fast.maps, slow.maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
