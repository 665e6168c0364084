"""The contract of every encoder, as tests to inherit.

A test class sets ``cases`` and gives a fixture ``make``, a function that loads the same encoder again at every call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import simomerge as sm
from simomerge.core.errors import InputError
from simomerge.models.encoders import Encoder, Features

Make = Callable[[], Encoder]


def random_images(*size: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def padded_by_hand(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images with their last row and column repeated up to a size."""
    rows = torch.arange(size[0]).clamp(max=images.shape[-2] - 1)
    columns = torch.arange(size[1]).clamp(max=images.shape[-1] - 1)
    return images[..., rows[:, None], columns]


def assert_equal(left: Features, right: Features) -> None:
    assert (left.image_size, left.padded_size) == (right.image_size, right.padded_size)
    for ours, theirs in ((left.maps, right.maps), (left.cls, right.cls)):
        assert len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class EncoderContract:
    """What every encoder must do."""

    cases: Sequence[str]
    can_choose_taps = True

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases)

    @pytest.fixture
    def encoder(self, make: Make) -> Encoder:
        return make().eval()

    # Images of any size ---------------------------------------------------------------------------------

    @pytest.mark.parametrize("size", [(64, 96), (60, 90), (9, 7), (1, 1)])
    def test_images_of_any_size_are_padded_to_whole_places(self, encoder: Encoder, size: tuple[int, int]) -> None:
        with torch.no_grad():
            features = encoder(random_images(*size))
        padded = features.padded_size
        assert features.image_size == size and len(features) == 2
        assert all(side % encoder.multiple == 0 for side in padded)
        least = [max(-(-side // encoder.multiple) * encoder.multiple, encoder.layout.smallest) for side in size]
        assert list(padded) == least
        shapes = [
            (2, c, padded[0] // s, padded[1] // s) for c, s in zip(encoder.channels, encoder.strides, strict=True)
        ]
        assert [each.shape for each in features.maps] == shapes
        assert [each.shape for each in features.cls] == [(2, c) for c in encoder.channels if encoder.has_cls]
        assert all(each.isfinite().all() for each in (*features.maps, *features.cls))

    def test_padding_repeats_the_last_row_and_column_at_the_bottom_right(self, encoder: Encoder) -> None:
        images = random_images(13, 22)
        with torch.no_grad():
            features = encoder(images)
            by_hand = encoder(padded_by_hand(images, features.padded_size))
        assert all(torch.equal(a, b) for a, b in zip(features.maps, by_hand.maps, strict=True))

    def test_samples_of_a_batch_do_not_mix(self, encoder: Encoder) -> None:
        images = random_images(40, 56)
        with torch.no_grad():
            both, one = encoder(images), encoder(images[:1])
        for ours, theirs in zip((*both.maps, *both.cls), (*one.maps, *one.cls), strict=True):
            torch.testing.assert_close(ours[:1], theirs, rtol=1e-4, atol=1e-5)

    # What came before does not matter -------------------------------------------------------------------

    def test_what_came_before_does_not_matter(self, encoder: Encoder) -> None:
        images = random_images(96, 64)
        with torch.no_grad():
            first = encoder(images)
            encoder(random_images(20, 20))
            assert_equal(encoder(images), first)
        assert encoder._outputs is None  # no features are kept

    def test_a_deep_copy_is_independent(self, encoder: Encoder) -> None:
        images = random_images(40, 56)
        with torch.no_grad():
            first = encoder(images)
            twin = copy.deepcopy(encoder)
            assert_equal(twin(images), first)
            for parameter in twin.parameters():
                parameter.zero_()
            assert_equal(encoder(images), first)
        assert not any(ours is theirs for ours, theirs in zip(encoder.layout.tapped, twin.layout.tapped, strict=True))

    def test_a_saved_encoder_comes_back_bit_for_bit(self, encoder: Encoder, tmp_path: Path) -> None:
        images = random_images(40, 56)
        sm.SimoModel(encoder, {}, {}).save_pretrained(tmp_path / "model")
        again = sm.load(tmp_path / "model").encoder
        assert again.describe() == encoder.describe() and type(again.backbone) is type(encoder.backbone)
        with torch.no_grad():
            assert_equal(again(images), encoder(images))

    # Taps -----------------------------------------------------------------------------------------------

    def test_taps_come_in_the_order_asked(self, encoder: Encoder) -> None:
        images, taps = random_images(40, 56), encoder.taps
        assert list(taps) == sorted(set(taps))
        with torch.no_grad():
            features = encoder(images)
            if not self.can_choose_taps:
                return
            encoder.set_taps(taps[::-1])
            backward = encoder(images)
            encoder.set_taps(taps[1:2])
            one = encoder(images)
        for name in ("maps", "cls"):
            forward = getattr(features, name)
            assert all(torch.equal(a, b) for a, b in zip(forward, getattr(backward, name)[::-1], strict=True))
            assert all(torch.equal(a, b) for a, b in zip(forward[1:2], getattr(one, name), strict=True))
        assert len(one.maps) == 1 and encoder.channels == (one.maps[0].shape[1],)
        assert not torch.equal(features.maps[0], features.maps[-1])

    @pytest.mark.parametrize("taps", [[99], [0], [-1], [1, 99, 2], [], [2, 2]])
    def test_taps_that_do_not_exist_are_refused_with_the_range(self, encoder: Encoder, taps: list[int]) -> None:
        unit = "stage" if encoder.layout.is_pyramid else "block"
        missing = next((tap for tap in taps if not 1 <= tap <= 4), None)
        message = rf"taps .*{unit}s 1 to {len(encoder.layout.channels)}; name each {unit} to read once"
        with pytest.raises(InputError, match=message if missing is None else rf"{message} .*no {unit} {missing}"):
            encoder.set_taps(taps)

    # Training -------------------------------------------------------------------------------------------

    def test_a_frozen_encoder_gets_no_gradient_and_the_images_do(self, encoder: Encoder) -> None:
        encoder.requires_grad_(False)
        assert not any(each.requires_grad for each in encoder(random_images(64, 64)).maps)
        images = random_images(64, 64).requires_grad_()
        sum(each.square().mean() for each in encoder(images).maps).backward()
        assert images.grad is not None and images.grad.abs().sum() > 0
        assert all(p.grad is None for p in encoder.parameters())

    def test_training_leaves_all_buffers_as_they_are(self, encoder: Encoder) -> None:
        before = {name: value.clone() for name, value in encoder.named_buffers()}
        encoder.train()
        encoder(random_images(64, 64))
        assert encoder.training
        assert all(torch.equal(value, before[name]) for name, value in encoder.named_buffers())

    def test_mixed_precision_keeps_shapes_and_gives_finite_numbers(self, encoder: Encoder) -> None:
        with torch.no_grad():
            expected = encoder(random_images(40, 56))
            with torch.autocast("cpu", torch.bfloat16):
                features = encoder(random_images(40, 56))
        for ours, theirs in zip((*features.maps, *features.cls), (*expected.maps, *expected.cls), strict=True):
            assert ours.shape == theirs.shape and ours.isfinite().all()

    def test_checkpointed_gradients_are_the_gradients_or_it_says_so(self, make: Make) -> None:
        def gradients(checkpointed: bool) -> dict[str, Any]:
            encoder = make().train()
            encoder.checkpoint_gradients(checkpointed)
            assert any(getattr(m, "gradient_checkpointing", False) for m in encoder.modules()) == checkpointed
            torch.manual_seed(0)
            sum(each.square().mean() for each in encoder(random_images(64, 64)).maps).backward()
            encoder.checkpoint_gradients(False)
            assert not any(getattr(m, "gradient_checkpointing", False) for m in encoder.modules())
            return {name: p.grad for name, p in encoder.backbone.named_parameters() if p.grad is not None}

        backbone = make().backbone
        if not getattr(backbone, "supports_gradient_checkpointing", False):
            with pytest.raises(InputError, match=f"{type(backbone).__name__} cannot checkpoint gradients"):
                make().checkpoint_gradients()
            return
        plain, again = gradients(False), gradients(True)
        assert plain and set(plain) == set(again)
        for name, gradient in plain.items():
            torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6)
