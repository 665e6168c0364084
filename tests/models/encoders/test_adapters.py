"""Low-rank adapters: block(x) + B A x, and independent in a copy."""

import copy

import pytest
import torch

from simomerge.core.errors import InputError
from simomerge.models.encoders import load_backbone, load_encoder
from simomerge.models.encoders.adapters import Adapters
from simomerge.models.encoders.layout import BlockShape

TAPS = (1, 2, 3, 4)


def random_images():
    return torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(2))


def adapted(tiny_base, activation="none", rank=3):
    """An encoder whose adapters all do something."""
    encoder = load_encoder(tiny_base, taps=TAPS, apply_layernorm=False)
    generator = torch.Generator().manual_seed(3)
    for adapter in encoder.add_adapters(rank, activation):
        with torch.no_grad():
            adapter.up.weight.normal_(std=0.5, generator=generator)
    return encoder


@torch.no_grad()
def tokens_of(encoder, images):
    """(B, 1 + patches, C) of every tap, CLS first."""
    features = encoder(images)
    pairs = zip(features.cls, features.maps, strict=True)
    return [torch.cat([cls[:, None], patches.flatten(2).transpose(1, 2)], 1) for cls, patches in pairs]


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_every_block_gives_its_output_plus_b_a_x(tiny_base, activation):
    encoder = adapted(tiny_base, activation)
    images = random_images()
    got = tokens_of(encoder, images)
    plain = load_backbone(tiny_base)  # its blocks have no hooks
    with torch.no_grad():
        x = plain.embeddings((images - encoder.mean) / encoder.std)
        for block, adapter, tapped in zip(plain.encoder.layer, encoder.adapters, got, strict=True):
            low = torch.einsum("rc,bnc->bnr", adapter.down.weight, x)
            if activation == "relu":
                low = torch.where(low > 0, low, 0.0)
            low_rank = torch.einsum("cr,bnr->bnc", adapter.up.weight, low)
            assert low_rank.abs().mean() > 1e-3  # the test would see an adapter left out
            x = block(x) + low_rank
            torch.testing.assert_close(tapped, x, rtol=1e-4, atol=1e-4)


def test_relu_and_none_differ(tiny_base):
    plain, relu = (tokens_of(adapted(tiny_base, activation), random_images()) for activation in ("none", "relu"))
    assert (plain[-1] - relu[-1]).abs().max() > 1e-3


def test_the_adapters_of_a_deep_copy_are_its_own(tiny_base):
    original = adapted(tiny_base)
    images = random_images()
    before = tokens_of(original, images)
    twin = copy.deepcopy(original)
    with torch.no_grad():
        for adapter in twin.adapters:
            adapter.up.weight.zero_()
    bare = load_encoder(tiny_base, taps=TAPS, apply_layernorm=False)
    assert all(torch.equal(a, b) for a, b in zip(tokens_of(twin, images), tokens_of(bare, images), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tokens_of(original, images), before, strict=True))


def test_a_deep_copy_taps_and_adapts_for_itself(tiny_base):
    original = load_encoder(tiny_base)
    twin = copy.deepcopy(original)
    twin.taps = (2,)
    twin.add_adapters(rank=2)
    assert len(original(random_images()).maps) == 4 and original.adapters is None
    assert len(twin(random_images()).maps) == 1
    assert all(ours is not theirs for ours, theirs in zip(original.layout.blocks, twin.layout.blocks, strict=True))
    assert twin.layout.blocks[0] is twin.backbone.encoder.layer[0]


def test_gradients_reach_every_adapter_and_not_a_frozen_backbone(tiny_base):
    encoder = adapted(tiny_base)
    encoder.backbone.requires_grad_(False)
    sum(m.square().sum() for m in encoder(random_images()).maps).backward()
    assert all(p.grad.abs().sum() > 0 for p in encoder.adapters.parameters())
    assert all(p.grad is None for p in encoder.backbone.parameters())


def test_a_vit_base_gets_the_papers_third_of_a_million_parameters():
    count = sum(p.numel() for p in Adapters([BlockShape(768, 768)] * 12, rank=16).parameters())
    assert count == 12 * 2 * 768 * 16 == 294_912  # "0.3 M"


def test_settings_rebuild_them():
    adapters = Adapters([BlockShape(8, 8)] * 2, rank=2, activation="relu")
    again = Adapters([BlockShape(8, 8)] * 2, **adapters.settings)
    again.load_state_dict(adapters.state_dict())
    assert again.settings == {"rank": 2, "activation": "relu"}
    assert all(adapter.relu for adapter in again)


@pytest.mark.parametrize("rank", [0, -4])
def test_a_rank_below_one_is_refused(rank):
    with pytest.raises(InputError, match=f"rank {rank}: .*at least 1"):
        Adapters([BlockShape(8, 8)], rank=rank)


def test_an_unknown_activation_is_refused():
    with pytest.raises(InputError, match=r"'gelu'.*'none' or 'relu'"):
        Adapters([BlockShape(8, 8)], activation="gelu")
