"""The contract of every head, as tests to inherit.

A test class sets ``kind`` and ``cases``, the settings to test; in a custom head ``kind`` is its ``module:Class``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simomerge.core.errors import InputError
from simomerge.models.encoders import Features
from simomerge.models.heads import build_head, head_kind
from simomerge.models.heads.linear import LinearHead
from simomerge.models.heads.projections import Moments, Projection, input_projections

CHANNELS = [6, 6, 6, 6]


def random_features(
    batch: int = 2,
    grids: Sequence[tuple[int, int]] = ((3, 5),) * 4,
    channels: Sequence[int] = CHANNELS,
    image: tuple[int, int] = (22, 37),
    padded: tuple[int, int] = (24, 40),
    seed: int = 0,
) -> Features:
    generator = torch.Generator().manual_seed(seed)
    maps = tuple(
        torch.randn(batch, c, *grid, generator=generator) * 1.5 + 0.4 for c, grid in zip(channels, grids, strict=True)
    )
    tokens = tuple(torch.randn(batch, c, generator=generator) - 0.3 for c in channels)
    return Features(maps, tokens, image, padded)


def random_moments(channels: Sequence[int] = CHANNELS, seed: int = 5) -> Moments:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> dict[int, tuple[Tensor, Tensor]]:
        return {
            tap: (
                torch.randn(width, generator=generator, dtype=torch.float64),
                torch.rand(width, generator=generator, dtype=torch.float64) + 0.2,
            )
            for tap, width in enumerate(channels)
        }

    return Moments(draw(), draw())


def trained_head(
    kind: str, settings: dict[str, Any], channels: Sequence[int] = CHANNELS, out_channels: int = 3, seed: int = 1
) -> nn.Module:
    """A head whose parameters all differ from those of a fresh one."""
    generator = torch.Generator().manual_seed(seed)
    head = build_head(kind, channels, out_channels, settings).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        if isinstance(head, LinearHead):
            head.norm.running_mean.normal_(generator=generator)
            head.norm.running_var.uniform_(0.5, 2, generator=generator)
            head.norm.weight.uniform_(0.5, 2, generator=generator)
    return head


def logits(head: nn.Module, features: Features) -> Tensor:
    with torch.no_grad():
        found: Tensor = head(features)
    return found


def assert_same(left: Projection, right: Projection) -> None:
    assert left.grid == right.grid and left.maps.keys() == right.maps.keys() and left.cls.keys() == right.cls.keys()
    for ours, theirs in ((left.maps, right.maps), (left.cls, right.cls)):
        for tap in ours:
            torch.testing.assert_close(ours[tap], theirs[tap])
    torch.testing.assert_close(left.bias, right.bias)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """Equal up to rounding, which is relative to the largest value that is added up."""
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * max(1, float(wanted.abs().max())))


class HeadContract:
    """What every head must do."""

    kind: str
    cases: Sequence[dict[str, Any]]
    out_channels = 3
    channels: Sequence[int] = CHANNELS
    unused: tuple[str, ...] = ()
    """Parts of the names of parameters that no prediction depends on."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "settings" in metafunc.fixturenames:
            metafunc.parametrize("settings", self.cases, ids=str)

    def reads_cls(self, settings: dict[str, Any]) -> bool:
        return bool(settings.get("cls", True))

    def taps_read(self, settings: dict[str, Any]) -> Sequence[int]:
        return range(len(self.channels))

    def train(self, settings: dict[str, Any], channels: Sequence[int] | None = None) -> nn.Module:
        """A head as after training."""
        return trained_head(self.kind, settings, channels or self.channels, self.out_channels)

    def features(self, **options: Any) -> Features:
        return random_features(**{"channels": self.channels, **options})

    @pytest.fixture
    def head(self, settings: dict[str, Any]) -> nn.Module:
        """A fresh head."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            return build_head(self.kind, self.channels, self.out_channels, settings)

    @pytest.fixture
    def trained(self, settings: dict[str, Any]) -> nn.Module:
        return self.train(settings)

    # Predictions ----------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("batch", "grid", "padded"), [(2, (3, 5), (24, 40)), (1, (1, 1), (8, 8)), (3, (4, 1), (56, 14))]
    )
    def test_logits_have_the_padded_size(
        self, head: nn.Module, batch: int, grid: tuple[int, int], padded: tuple[int, int]
    ) -> None:
        features = self.features(batch=batch, grids=(grid,) * len(self.channels), image=padded, padded=padded)
        found = logits(head.eval(), features)
        assert found.shape == (batch, self.out_channels, *padded) and found.dtype == torch.float32

    def test_samples_of_a_batch_do_not_mix_when_it_predicts(self, trained: nn.Module) -> None:
        features = self.features()
        first = Features(tuple(m[:1] for m in features.maps), tuple(c[:1] for c in features.cls), (22, 37), (24, 40))
        assert_close(logits(trained, features)[:1], logits(trained, first))

    def test_mixed_precision_changes_a_prediction_only_by_rounding(self, trained: nn.Module) -> None:
        expected = logits(trained, self.features())
        with torch.autocast("cpu", torch.bfloat16):
            found = logits(trained, self.features())
        assert found.shape == expected.shape and found.isfinite().all()
        assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()

    def test_gradients_reach_every_parameter(self, trained: nn.Module) -> None:
        weights = torch.randn(2, self.out_channels, 24, 40, generator=torch.Generator().manual_seed(5))
        (trained.train()(self.features()) * weights).sum().backward()
        without = [name for name, p in trained.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert [name for name in without if not any(part in name for part in self.unused)] == []

    def test_every_tap_and_cls_token_counts_where_it_is_asked_for(
        self, trained: nn.Module, settings: dict[str, Any]
    ) -> None:
        features = self.features()
        for tensor in (*features.maps, *features.cls):
            tensor.requires_grad_()
        weights = torch.randn(2, self.out_channels, 24, 40, generator=torch.Generator().manual_seed(5))
        (trained(features) * weights).sum().backward()
        counts = [tap for tap, m in enumerate(features.maps) if m.grad is not None and m.grad.abs().sum() > 0]
        assert counts == sorted(self.taps_read(settings))
        reads = [c.grad is not None and bool(c.grad.abs().sum() > 0) for c in features.cls]
        assert reads == [self.reads_cls(settings)] * len(features.cls)

    # Settings, saving, errors ---------------------------------------------------------------------------

    def test_a_saved_head_comes_back_bit_for_bit(self, trained: nn.Module, tmp_path: Any) -> None:
        trained.train()(self.features(seed=6))  # moves the running statistics, if there are any
        save_file(trained.state_dict(), tmp_path / "head.safetensors")
        again = build_head(self.kind, self.channels, self.out_channels, trained.settings)
        again.load_state_dict(load_file(tmp_path / "head.safetensors"))
        assert torch.equal(logits(trained.eval(), self.features()), logits(again.eval(), self.features()))

    def test_its_settings_rebuild_it(self, head: nn.Module, settings: dict[str, Any]) -> None:
        again = build_head(self.kind, self.channels, self.out_channels, head.settings)
        assert again.settings == head.settings and settings.items() <= head.settings.items()
        assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in head.named_parameters()}
        assert head_kind(again) == self.kind

    def test_an_unknown_setting_is_refused_by_name(self, settings: dict[str, Any]) -> None:
        with pytest.raises(InputError, match=f"{self.kind}.*'colour'"):
            build_head(self.kind, self.channels, self.out_channels, {**settings, "colour": 1})


class FoldableHeadContract(HeadContract):
    """What the heads that declare their projections must do in addition."""

    def test_a_head_given_its_own_projections_predicts_as_before(self, trained: nn.Module) -> None:
        features = self.features()
        before = {name: value.clone() for name, value in trained.state_dict().items()}
        for seed in (5, 6):
            again = trained.with_projections(input_projections(trained), random_moments(self.channels, seed))
            assert_close(logits(again.eval(), features), logits(trained, features))
            assert again is not trained and type(again) is type(trained) and again.settings == trained.settings
        assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())

    def test_the_projections_of_a_head_are_those_it_was_given(self, trained: nn.Module) -> None:
        features, declared = self.features(), input_projections(trained)
        given = [
            Projection(
                {tap: torch.randn_like(weight) for tap, weight in one.maps.items()},
                {tap: torch.randn_like(weight) for tap, weight in one.cls.items()},
                torch.randn_like(one.bias),
                one.grid,
            )
            for one in declared
        ]
        changed = trained.with_projections(given, random_moments(self.channels)).eval()
        for found, wanted in zip(input_projections(changed), given, strict=True):
            assert_same(found, wanted)
        assert (logits(changed, features) - logits(trained, features)).abs().max() > 0.1
        back = changed.with_projections(declared, random_moments(self.channels, seed=9)).eval()
        assert_close(logits(back, features), logits(trained, features))

    def test_a_fold_that_undoes_a_linear_map_gives_the_same_predictions(self, trained: nn.Module) -> None:
        generator, features, taps = torch.Generator().manual_seed(1), self.features(), len(self.channels)
        wanted = logits(trained, features)
        assert wanted.std() > 0
        mix = [torch.eye(c) + 0.1 * torch.randn(c, c, generator=generator) for c in (*self.channels, *self.channels)]
        moved = Features(
            tuple(torch.einsum("oc,bchw->bohw", m, f) for m, f in zip(mix[:taps], features.maps, strict=True)),
            tuple(f @ m.T for m, f in zip(mix[taps:], features.cls, strict=True)),
            features.image_size,
            features.padded_size,
        )
        back = [m.inverse() for m in mix]
        undone = [
            Projection(
                {tap: w @ back[tap] for tap, w in p.maps.items()},
                {tap: w @ back[taps + tap] for tap, w in p.cls.items()},
                p.bias,
                p.grid,
            )
            for p in input_projections(trained)
        ]
        folded = trained.with_projections(undone, random_moments(self.channels)).eval()
        assert not torch.allclose(logits(trained, moved), wanted, rtol=1e-3, atol=1e-3)
        assert_close(logits(folded, moved), wanted)
        torch.testing.assert_close(logits(trained, features), wanted)  # the head itself did not change
        assert head_kind(folded) == self.kind and folded.settings == trained.settings

    def test_what_a_head_declares_has_no_gradient(self, trained: nn.Module) -> None:
        for one in input_projections(trained):
            assert not any(t.requires_grad for t in (one.bias, *one.maps.values(), *one.cls.values()))

    def test_a_head_with_given_projections_can_be_trained(self, trained: nn.Module) -> None:
        again = trained.with_projections(input_projections(trained), random_moments(self.channels)).train()
        again(self.features()).square().mean().backward()
        learning = [p for name, p in again.named_parameters() if not any(part in name for part in self.unused)]
        assert all(p.requires_grad and p.grad is not None and p.grad.abs().sum() > 0 for p in learning)
        pairs = itertools.product(again.parameters(), trained.parameters())
        assert not any(p.data_ptr() == q.data_ptr() for p, q in pairs if p.numel())


class TrainableHeadContract(FoldableHeadContract):
    """What the heads that `simomerge train` builds must do in addition."""

    def test_it_starts_at_a_constant_when_the_last_layer_has_no_weights(self, head: nn.Module) -> None:
        values = torch.tensor([1.5, -2.0, 0.25])
        head.start_at(values)
        with torch.no_grad():
            head.output.weight.zero_()
        found = logits(head.eval(), self.features())
        torch.testing.assert_close(found, values.view(1, 3, 1, 1).expand(2, 3, 24, 40), rtol=1e-6, atol=0)

    def test_gradients_reach_every_parameter_of_a_fresh_head(self, head: nn.Module) -> None:
        self.test_gradients_reach_every_parameter(head)

    def test_taps_may_differ_in_width(self, settings: dict[str, Any]) -> None:
        channels = [6, 4, 6, 5]
        head, features = self.train(settings, channels), self.features(channels=channels)
        wide = [projection.widened(channels) for projection in input_projections(head)]
        again = head.with_projections(wide, random_moments(channels)).eval()
        assert_close(logits(again, features), logits(head, features))
        for found, wanted in zip(input_projections(again), wide, strict=True):
            assert_same(found, wanted)
