"""The encoder against transformers' own backbone and hidden states, padding, taps, and what loading refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    Dinov2Backbone,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetModel,
)

from simomerge.core.errors import InputError
from simomerge.models.encoders import Encoder, default_taps, load_backbone, load_encoder
from simomerge.models.encoders.encoder import IMAGENET_MEAN, IMAGENET_STD

MEAN = torch.tensor([0.5, 0.45, 0.4]).view(1, 3, 1, 1)  # what the tiny base's preprocessor_config.json holds
STD = torch.tensor([0.25, 0.24, 0.23]).view(1, 3, 1, 1)


@pytest.fixture
def encoder(tiny_base):
    return load_encoder(tiny_base)


def random_images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def copy_with(tiny_base, folder, change=None, keep=None):
    """A copy of the base whose config has ``change``, or of whose weights the first ``keep`` bytes are left."""
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


def test_cls_and_patches_are_the_hidden_states_split(tiny_base):
    model = Dinov2Model.from_pretrained(tiny_base).eval()
    images = random_images(2, 3, 40, 56)
    with torch.no_grad():
        hidden = model((images - MEAN) / STD, output_hidden_states=True).hidden_states
        features = load_encoder(tiny_base, taps=(2, 4), apply_layernorm=False)(images)
    for tap, patches, cls in zip((2, 4), features.maps, features.cls, strict=True):
        torch.testing.assert_close(cls, hidden[tap][:, 0], rtol=0, atol=1e-5)
        rows = hidden[tap][:, 1:].reshape(2, 5, 7, 32)  # patches run along the rows of the image
        torch.testing.assert_close(patches.permute(0, 2, 3, 1), rows, rtol=0, atol=1e-5)


def test_with_layernorm_the_last_tap_is_the_models_output(tiny_base):
    model = Dinov2Model.from_pretrained(tiny_base).eval()
    images = random_images(1, 3, 80, 80)
    with torch.no_grad():
        last = model((images - MEAN) / STD).last_hidden_state
        features = load_encoder(tiny_base)(images)
    torch.testing.assert_close(features.cls[-1], last[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(features.maps[-1].flatten(2).transpose(1, 2), last[:, 1:], rtol=0, atol=1e-5)


def test_taps_come_in_the_order_asked(tiny_base):
    images = random_images(1, 3, 16, 16)
    with torch.no_grad():
        forward = load_encoder(tiny_base, taps=(1, 4))(images)
        backward = load_encoder(tiny_base, taps=(4, 1))(images)
    assert torch.equal(forward.maps[0], backward.maps[1]) and torch.equal(forward.maps[1], backward.maps[0])
    assert not torch.equal(forward.maps[0], forward.maps[1])


def test_register_tokens_stand_in_no_map():
    config = Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32, num_register_tokens=3
    )
    model = Dinov2WithRegistersModel(config).eval()
    images = random_images(1, 3, 32, 32)
    with torch.no_grad():
        features = Encoder(model, taps=(2,), mean=(0, 0, 0), std=(1, 1, 1))(images)
        last = model(images).last_hidden_state
    assert last.shape[1] == 1 + 3 + 16
    torch.testing.assert_close(features.cls[0], last[:, 0])
    torch.testing.assert_close(features.maps[0].flatten(2).transpose(1, 2), last[:, 4:])


# Sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "padded"), [((60, 80), (64, 80)), ((8, 24), (8, 24)), ((9, 17), (16, 24)), ((1, 1), (8, 8))]
)
def test_sizes_are_padded_up_to_whole_patches(encoder, size, padded):
    with torch.no_grad():
        features = encoder(random_images(2, 3, *size))
    assert (features.image_size, features.padded_size) == (size, padded)
    assert len(features) == 2
    for tapped, cls in zip(features.maps, features.cls, strict=True):
        assert tapped.shape == (2, 32, padded[0] // 8, padded[1] // 8)
        assert cls.shape == (2, 32)


def test_padding_repeats_the_last_row_and_column_at_the_bottom_right(encoder):
    images = random_images(1, 3, 13, 22)
    rows = [min(row, 12) for row in range(16)]
    columns = [min(column, 21) for column in range(24)]
    by_hand = images[:, :, rows][:, :, :, columns]
    seen = []
    handle = encoder.backbone.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    with torch.no_grad():
        features, reference = encoder(images), encoder(by_hand)
    handle.remove()
    torch.testing.assert_close(seen[0], (by_hand - MEAN) / STD)
    assert all(torch.equal(a, b) for a, b in zip(features.maps, reference.maps, strict=True))


def test_no_features_are_kept_after_a_call(encoder):
    encoder(random_images(1, 3, 16, 16))
    assert encoder._tapped is None


# Settings -----------------------------------------------------------------------------------------------


def test_default_taps_are_the_papers_for_twelve_blocks():
    assert default_taps(12) == (3, 6, 9, 12)
    assert default_taps(24) == (6, 12, 18, 24)
    assert default_taps(4) == (1, 2, 3, 4)
    assert default_taps(2) == (1, 2)  # no block twice


@pytest.mark.parametrize("taps", [[5], [0], [-1], [1, 9, 2], [], [2, 2]])
def test_taps_that_are_no_blocks_are_refused_with_the_range(tiny_base, taps):
    with pytest.raises(InputError, match="blocks 1 to 4"):
        load_encoder(tiny_base, taps=taps)


def test_a_missing_tap_is_named(tiny_base):
    with pytest.raises(InputError, match="no block 7"):
        load_encoder(tiny_base, taps=[1, 7])


def test_an_architecture_without_blocks_is_refused():
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    with pytest.raises(InputError, match=r"ResNetModel.*no stages of blocks.*`simomerge encoders`"):
        Encoder(model)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [("dinov4", "'dinov4' is no vision encoder.*dinov2"), ("bert", "'bert'.*no vision encoder"), ("", "cannot load")],
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
    with pytest.raises(InputError, match=r"weightless: cannot load.*model\.safetensors"):
        load_encoder(folder)


def test_a_missing_config_is_refused_by_name(tiny_base, tmp_path):
    folder = copy_with(tiny_base, tmp_path / "configless")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="configless: cannot load"):
        load_encoder(folder)


def test_a_checkpoint_that_lacks_a_tensor_is_refused_not_filled_with_random_numbers(tiny_base, tmp_path):
    folder = copy_with(tiny_base, tmp_path / "deeper", change={"num_hidden_layers": 5})
    with pytest.raises(InputError, match=r"deeper: \d+ tensors are missing or misshapen"):
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
def test_a_hub_id_without_a_network_is_one_sentence_and_the_mend(source):
    with pytest.raises(InputError, match="while online") as caught:
        load_encoder(source)
    assert str(caught.value).startswith(f"{source}: no such folder, and as a hub id: cannot load an encoder")
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
    said = {
        "processor_class": "CLIPProcessor",
        "image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]},
    }
    (folder / "processor_config.json").write_text(json.dumps(said))
    assert load_encoder(folder).preprocessing == {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}


@pytest.mark.parametrize(("text", "message"), [('{"image_mean": null}', "image_mean is None"), ("[]", "no mapping")])
def test_a_strange_preprocessor_is_told(tiny_base, tmp_path, text, message):
    folder = copy_with(tiny_base, tmp_path / "strange")
    (folder / "preprocessor_config.json").write_text(text)
    with pytest.raises(InputError, match=rf"preprocessor_config\.json: .*{message}"):
        load_encoder(folder)


def test_encoders_whose_tokens_are_otherwise_are_refused(tmp_path):
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


def test_a_broken_torchvision_is_told_as_the_doctor_tells_it(tiny_base, tmp_path):
    """In a process of its own: transformers looks for torchvision once."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "torchvision-0.1.dist-info").mkdir()
    text = "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n"
    (tmp_path / "torchvision-0.1.dist-info/METADATA").write_text(text)
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    for arguments in (["doctor"], ["train", "--base", str(tiny_base), "--task", "depth", "--images", "2", "-o", "x"]):
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
    """`runs/deth` where there is a runs/: the hub is not asked, which takes a minute where there is no network."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="runs/deth: no such folder"):
        load_backbone("runs/deth")
