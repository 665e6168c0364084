"""Every family of encoders keeps the contract, and gives transformers' own hidden states."""

import copy
from functools import partial

import pytest
import torch
from safetensors import safe_open

from simomerge.checkpoints import canonical_name, canonicalise, fingerprint, open_checkpoint
from simomerge.core.errors import InputError
from simomerge.models.encoders import Encoder, load_backbone, load_encoder
from simomerge.models.encoders.families import FAMILIES

from .contract import EncoderContract, padded_by_hand, random_images
from .families import TINY, save_tiny

SIZES = [(64, 96), (60, 90), (9, 7)]
"""Whole places, no whole places, and less than one place of the last stage."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(model_type):
        if model_type not in made:
            made[model_type] = save_tiny(model_type, tmp_path_factory.mktemp(model_type) / "tiny")
        return made[model_type]

    return folder


@torch.no_grad()
def hidden_maps(backbone, images, taps, prefix):
    """Maps (B, C, h, w) and CLS tokens of the taps, out of transformers' hidden states."""
    learned = backbone.config.model_type in ("vit", "clip_vision_model", "siglip_vision_model", "beit", "deit")
    arguments = {"interpolate_pos_encoding": True} if learned else {}
    hidden = backbone(pixel_values=images, output_hidden_states=True, **arguments).hidden_states
    height, width = images.shape[-2:]
    if hidden[-1].ndim == 4:  # convolutions: the last four are the stages
        return [hidden[tap - 5] for tap in taps], []
    if "Swin" in type(backbone).__name__:
        return [hidden[tap] for tap in taps], []
    grid = (height // backbone.config.patch_size, width // backbone.config.patch_size)
    maps = [hidden[tap][:, prefix:].transpose(1, 2).unflatten(2, grid) for tap in taps]
    return maps, [hidden[tap][:, 0] for tap in taps] if prefix else []


def prefix_tokens(backbone, model_type):
    if "siglip" in model_type:
        return 0
    return {"deit": 2}.get(model_type, 1 + getattr(backbone.config, "num_register_tokens", 0))


class TestFamilies(EncoderContract):
    cases = tuple(TINY)

    @pytest.fixture
    def make(self, case, folders):
        return partial(load_encoder, folders(case))


def test_every_family_is_tested():
    assert {model_type for family in FAMILIES for model_type in family.model_types} == set(TINY)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model_type", TINY)
def test_taps_are_the_hidden_states(folders, model_type, size):
    backbone = load_backbone(folders(model_type))
    encoder = Encoder(backbone, mean=(0, 0, 0), std=(1, 1, 1), apply_layernorm=False)
    images = random_images(*size)
    with torch.no_grad():
        features = encoder(images)
    height, width = features.padded_size
    padded = padded_by_hand(images, features.padded_size)
    plain = load_backbone(folders(model_type))  # without hooks
    expected, cls = hidden_maps(plain, padded, encoder.taps, prefix_tokens(plain, model_type))
    assert encoder.has_cls == bool(cls) == bool(features.cls)
    assert features.image_size == size
    for index, (stride, channels) in enumerate(zip(encoder.strides, encoder.channels, strict=True)):
        ours = features.maps[index]
        assert ours.shape == (2, channels, height // stride, width // stride)
        if "swin" in model_type and index < 3:  # transformers shows them after the next stage's downsampling
            stage = plain.encoder.layers[index]
            tokens = stage.downsample(ours.flatten(2).transpose(1, 2), ours.shape[-2:])
            torch.testing.assert_close(tokens, expected[index], rtol=0, atol=1e-5)
        elif "swin" in model_type:
            torch.testing.assert_close(ours.flatten(2).transpose(1, 2), expected[index], rtol=0, atol=1e-5)
        else:
            torch.testing.assert_close(ours, expected[index], rtol=0, atol=1e-5)
        if cls:
            torch.testing.assert_close(features.cls[index], cls[index], rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", TINY)
def test_layer_norm_is_the_models_last(folders, model_type):
    encoder = load_encoder(folders(model_type))
    plain = load_backbone(folders(model_type))
    images = random_images(64, 64)
    with torch.no_grad():
        features = encoder(images)
        last = plain(pixel_values=(images - encoder.mean) / encoder.std, **encoder.layout.arguments).last_hidden_state
    if len(set(encoder.strides)) > 1:
        assert not encoder.apply_layernorm
        with pytest.raises(InputError, match="no final layer norm that fits"):
            Encoder(plain, apply_layernorm=True)
        return
    assert encoder.apply_layernorm == (model_type != "beit")  # BEiT's mean pooling has the norm in its pooler
    patches = features.maps[-1].flatten(2).transpose(1, 2)
    if "clip" in model_type and "siglip" not in model_type:  # CLIP normalises its pooled token only
        last = plain.post_layernorm(last)
    if encoder.has_cls:
        torch.testing.assert_close(features.cls[-1], last[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(patches, last[:, -64:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", TINY)
def test_every_block_gets_an_adapter(folders, model_type):
    encoder = load_encoder(folders(model_type))
    images = random_images(64, 64)
    with torch.no_grad():
        before = encoder(images)
        adapters = encoder.add_adapters(rank=2)
        assert len(adapters) == len(encoder.layout.blocks)
        fresh = encoder(images)
        assert all(torch.equal(a, b) for a, b in zip(before.maps, fresh.maps, strict=True))
        for adapter in adapters:
            adapter.up.weight.normal_(generator=torch.Generator().manual_seed(2))
    after = encoder(images)
    # ResNet's stages of one block have none of one shape.
    changed = [bool((a - b).abs().mean() > 1e-3) for a, b in zip(before.maps, after.maps, strict=True)]
    assert changed == ([False, True, True, True] if model_type == "resnet" else [True] * 4)
    sum(each.square().mean() for each in after.maps).backward()
    assert all(adapter.down.weight.grad.abs().sum() > 0 for adapter in adapters)
    twin = copy.deepcopy(encoder)
    with torch.no_grad():
        after = encoder(images)
        twin.adapters[0].up.weight.zero_()
        assert all(torch.equal(a, b) for a, b in zip(after.maps, encoder(images).maps, strict=True))


@pytest.mark.parametrize("model_type", TINY)
def test_in_memory_and_on_disk_names_agree(folders, tmp_path, model_type):
    backbone = load_backbone(folders(model_type))
    backbone.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        on_disk = set(file.keys())
    assert set(canonicalise(backbone.state_dict())) == set(canonicalise(on_disk))
    assert all(canonical_name(canonical_name(name)) == canonical_name(name) for name in on_disk)
    assert fingerprint(backbone.state_dict()) == fingerprint(open_checkpoint(tmp_path))
    again = load_backbone(tmp_path)
    assert fingerprint(again.state_dict()) == fingerprint(backbone.state_dict())
    # The family's own folder holds more (poolers, text encoders, decoders), under other names.
    assert set(canonicalise(on_disk)) <= set(canonicalise(open_checkpoint(folders(model_type))))


@pytest.mark.parametrize("model_type", ["dinov2", "swin"])
def test_adapters_in_the_last_blocks_only(folders, model_type):
    encoder = load_encoder(folders(model_type), taps=[1, 2, 3, 4])
    images = random_images(64, 64)
    with torch.no_grad():
        before = encoder(images)
        adapters = encoder.add_adapters(rank=2, last=2)
        assert len(adapters) == 2 and adapters.settings == {"rank": 2, "activation": "none", "last": 2}
        for adapter in adapters:
            adapter.up.weight.normal_(generator=torch.Generator().manual_seed(2))
        after = encoder(images)
    # Swin has two blocks in its third stage: its last two are the second of that and the fourth stage's.
    changed = [not torch.equal(a, b) for a, b in zip(before.maps, after.maps, strict=True)]
    assert changed == [False, False, True, True]
    with pytest.raises(InputError, match="the last 9 blocks: the encoder has"):
        encoder.add_adapters(last=9)
