"""Projections, the first layers of a head as data, and heads that are made to compute other projections."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simomerge.core.errors import InputError
from simomerge.datasets.tasks import Task
from simomerge.models.encoders import Features
from simomerge.models.heads import build_head
from simomerge.models.heads.dpt import DPTHead
from simomerge.models.heads.projections import InputLayer, Moments, Projection, input_projections, joined
from simomerge.models.model import SimoModel

from .contract import CHANNELS, assert_same, logits, random_features, random_moments, trained_head


def random_projection(
    taps: Sequence[int], cls: Sequence[int] = (), rows: int = 3, channels: Sequence[int] = CHANNELS, grid: int = 0
) -> Projection:
    generator = torch.Generator().manual_seed(3)
    draw = {tap: torch.randn(rows, channels[tap], generator=generator) for tap in range(len(channels))}
    more = {tap: torch.randn(rows, channels[tap], generator=generator) for tap in range(len(channels))}
    return Projection(
        {tap: draw[tap] for tap in taps},
        {tap: more[tap] for tap in cls},
        torch.randn(rows, generator=generator),
        grid,
    )


# A projection -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [0, 1])
def test_a_projection_is_a_loop_over_places_and_channels(grid: int) -> None:
    channels, grids = [3, 4], [(2, 3), (4, 3)]
    features = random_features(2, grids, channels)
    projection = random_projection([0, 1], [1], 2, channels, grid)
    height, width = grids[grid]
    maps = [
        F.interpolate(m, (height, width), mode="bilinear", align_corners=False).double().numpy() for m in features.maps
    ]
    expected = np.zeros((2, 2, height, width))
    for image, row, i, j in itertools.product(range(2), range(2), range(height), range(width)):
        value = float(projection.bias[row])
        for tap, weight in projection.maps.items():
            for channel in range(channels[tap]):
                value += float(weight[row, channel]) * maps[tap][image, channel, i, j]
        for channel in range(channels[1]):
            value += float(projection.cls[1][row, channel]) * float(features.cls[1][image, channel])
        expected[image, row, i, j] = value
    found = projection(features)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("taps", "cls"), [([2], []), ([], [1]), ([], []), ([0, 3], [3, 0])])
def test_a_projection_of_few_inputs_still_has_all_places(taps: list[int], cls: list[int]) -> None:
    projection = random_projection(taps, cls)
    found = projection(random_features())
    assert found.shape == (2, 3, 3, 5)
    if not taps:
        torch.testing.assert_close(found, found[..., :1, :1].expand_as(found))
    assert projection.taps == tuple(sorted({*taps, *cls}))


def test_a_projection_computes_in_float32_under_autocast() -> None:
    projection, features = random_projection([0, 1], [0, 1]), random_features()
    with torch.autocast("cpu", torch.bfloat16):
        found = projection(features)
    assert found.dtype == torch.float32 and torch.equal(found, projection(features))


def test_the_parts_of_a_split_add_up_and_join_again() -> None:
    projection, features = random_projection([0, 2, 3], [0, 2, 3], grid=2), random_features()
    parts = projection.split()
    assert [part.taps for part in parts] == [(0,), (2,), (3,)] and {part.grid for part in parts} == {2}
    assert torch.equal(parts[0].bias, projection.bias) and not any(part.bias.any() for part in parts[1:])
    torch.testing.assert_close(sum(part(features) for part in parts), projection(features), rtol=1e-5, atol=1e-5)
    assert_same(joined(parts), projection)
    assert_same(joined([parts[2], parts[0], parts[1]]), projection)


def test_a_split_keeps_what_only_the_cls_token_gives() -> None:
    projection, features = random_projection([0], [0, 2]), random_features()
    parts = projection.split()
    assert [(sorted(part.maps), sorted(part.cls)) for part in parts] == [([0], [0]), ([], [2])]
    torch.testing.assert_close(sum(part(features) for part in parts), projection(features), rtol=1e-5, atol=1e-5)
    assert_same(joined(parts), projection)


def test_joined_adds_what_reads_the_same_tap() -> None:
    one, other = random_projection([0, 1], [1]), random_projection([1, 2], [1, 2])
    both, features = joined([one, other]), random_features()
    assert both.taps == (0, 1, 2)
    torch.testing.assert_close(both(features), one(features) + other(features), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both.maps[1], one.maps[1] + other.maps[1])


@pytest.mark.parametrize("cls", [True, False])
def test_widened_is_the_same_function_of_all_taps(cls: bool) -> None:
    channels = [6, 4, 6, 5]
    projection = random_projection([2], [2] if cls else [], channels=channels, grid=2)
    features = random_features(channels=channels)
    wide = projection.widened(channels)
    assert wide.taps == (0, 1, 2, 3) and wide.grid == 2 and sorted(wide.cls) == ([0, 1, 2, 3] if cls else [])
    assert {tap: w.shape for tap, w in wide.maps.items()} == {tap: (3, width) for tap, width in enumerate(channels)}
    torch.testing.assert_close(wide(features), projection(features), rtol=1e-6, atol=1e-6)
    assert_same(wide.widened(channels), wide)
    assert projection.taps == (2,)  # the given one is not written to


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("readout", [True, False])
def test_a_layer_and_its_projection_are_one(readout: bool, paired: bool) -> None:
    features = random_features()
    layer = nn.Conv2d(24 if paired else 12, 3, 1)
    tokens = nn.Linear(12, 3, bias=False) if readout and not paired else None
    first = InputLayer(layer, [1, 3], tokens, paired=paired)
    pairs = [(features.maps[tap], features.cls[tap][..., None, None].expand(-1, -1, 3, 5)) for tap in (1, 3)]
    inputs = [tensor for pair in pairs for tensor in (pair if paired else pair[:1])]
    with torch.no_grad():
        expected = layer(torch.cat(inputs, 1))
        if tokens is not None:
            expected = expected + tokens(torch.cat([features.cls[1], features.cls[3]], 1))[..., None, None]
        torch.testing.assert_close(first.projection()(features), expected, rtol=1e-5, atol=1e-5)
    other = random_projection([1, 3], [1, 3] if readout or paired else [])
    first.assign(other)
    assert_same(first.projection(), other)


def test_a_linear_layer_without_a_bias_has_one_of_zeros_and_cannot_be_given_one() -> None:
    layer = InputLayer(nn.Linear(6, 3, bias=False), [0])
    assert not layer.projection().bias.any()
    with pytest.raises(InputError, match="give the head's input layer a bias"):
        layer.assign(random_projection([0]))


def test_a_layer_cannot_hold_a_projection_of_other_taps() -> None:
    with pytest.raises(InputError, match=r"weights \(3, 6\) cannot hold a projection of taps \[0, 1\].*widens = True"):
        InputLayer(nn.Linear(6, 3), [0]).assign(random_projection([0, 1]))


# Linear -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [True, False])
def test_the_one_projection_of_a_linear_head_is_its_logits(cls: bool) -> None:
    head, features = trained_head("linear", {"cls": cls}), random_features()
    (projection,) = input_projections(head)
    expected = F.interpolate(projection(features), (24, 40), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits(head, features), expected, rtol=1e-4, atol=1e-5)


def moments_of(features: Features) -> Moments:
    """The moments of one batch in a batch norm, which counts every CLS token once per place."""

    def each(tensors: Sequence[Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
        rows = [t.double().flatten(2).transpose(1, 2).flatten(0, 1) if t.ndim == 4 else t.double() for t in tensors]
        return {tap: (row.mean(0), row.var(0, unbiased=False)) for tap, row in enumerate(rows)}

    return Moments(each(features.maps), each(features.cls))


@pytest.mark.parametrize("settings", [{}, {"cls": False}, {"subpixels": 2}])
def test_with_the_moments_of_the_batch_training_computes_what_evaluation_does(settings: dict[str, Any]) -> None:
    head, features = trained_head("linear", settings), random_features(batch=6)
    again = head.with_projections(input_projections(head), moments_of(features))
    expected = logits(head, features)
    torch.testing.assert_close(logits(again.eval(), features), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(again.train(), features), expected, rtol=1e-4, atol=1e-4)
    other = head.with_projections(input_projections(head), random_moments()).train()
    assert (logits(other, features) - expected).abs().max() > 0.1  # and other moments would not


def test_a_channel_that_never_varies_does_no_harm() -> None:
    head, features = trained_head("linear", {}), random_features()
    still = Moments(
        {tap: (torch.full((6,), 7.0), torch.zeros(6)) for tap in range(4)},
        {tap: (torch.zeros(6), torch.zeros(6)) for tap in range(4)},
    )
    again = head.with_projections(input_projections(head), still).eval()
    torch.testing.assert_close(logits(again, features), logits(head, features), rtol=1e-4, atol=1e-4)


# DPT ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [True, False])
def test_a_dpt_head_declares_the_input_of_every_stage(cls: bool) -> None:
    for cross_tap in (False, True):
        head = trained_head("dpt", {"fusion_channels": 4, "cls": cls, "cross_tap": cross_tap})
        assert isinstance(head, DPTHead)
        features = random_features(grids=((3, 5), (3, 5), (2, 4), (3, 5)))
        projections = input_projections(head)
        assert [p.grid for p in projections] == [0, 1, 2, 3]
        assert [p.taps for p in projections] == [(0, 1, 2, 3) if cross_tap else (tap,) for tap in range(4)]
        for tap, projection in enumerate(projections):
            with torch.no_grad():
                expected = head._project(features, tap)
            torch.testing.assert_close(projection(features), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [True, False])
def test_a_dpt_head_becomes_cross_tap_where_it_must_and_only_there(cls: bool) -> None:
    head, features = trained_head("dpt", {"fusion_channels": 4, "cls": cls}), random_features()
    own = input_projections(head)
    assert "cross_tap" not in head.with_projections(own, random_moments()).settings
    mixed = [own[0].widened(CHANNELS), *own[1:]]
    crossed = head.with_projections(mixed, random_moments()).eval()
    assert crossed.cross_tap and crossed.settings == {**head.settings, "cross_tap": True}
    assert not head.cross_tap and "cross_tap" not in head.settings
    torch.testing.assert_close(logits(crossed, features), logits(head, features), rtol=1e-5, atol=1e-5)
    rebuilt = build_head("dpt", CHANNELS, 3, crossed.settings).eval()
    rebuilt.load_state_dict(crossed.state_dict())
    assert torch.equal(logits(rebuilt, features), logits(crossed, features))
    moved = [Projection({**p.maps, 3: p.maps[3] + 1}, p.cls, p.bias, p.grid) for p in input_projections(crossed)]
    assert not torch.allclose(
        logits(crossed.with_projections(moved, random_moments()).eval(), features), logits(crossed, features)
    )


def test_a_head_that_became_cross_tap_survives_the_disk(make_model: Callable[..., SimoModel], tmp_path: Path) -> None:
    model = make_model([Task("depth"), Task("normals")], "dpt")
    projections = input_projections(model.heads["depth"])
    generator = torch.Generator().manual_seed(2)
    crossed = [
        Projection(
            {tap: w + 0.1 * torch.randn(w.shape, generator=generator) for tap, w in wide.maps.items()},
            {tap: w + 0.1 * torch.randn(w.shape, generator=generator) for tap, w in wide.cls.items()},
            wide.bias,
            wide.grid,
        )
        for wide in (projection.widened(model.encoder.channels) for projection in projections)
    ]
    model.heads["depth"] = model.heads["depth"].with_projections(crossed, Moments()).eval()
    model.save_pretrained(tmp_path / "scene")
    again = SimoModel.from_pretrained(tmp_path / "scene")
    assert again.heads["depth"].settings["cross_tap"] is True and "cross_tap" not in again.heads["normals"].settings
    image = np.random.default_rng(0).random((24, 32, 3)).astype(np.float32)
    expected = model.predict(image)
    for name, values in again.predict(image).items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


# Custom heads -------------------------------------------------------------------------------------------


class Own(nn.Module):
    """A linear map of the second tap's patches and the first tap's CLS token, then a nonlinear part."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 5, 1)
        self.token = nn.Linear(channels, 5, bias=False)
        self.last = nn.Conv2d(5, 1, 1)

    def forward(self, features: Features) -> Tensor:
        hidden = self.first(features.maps[1]) + self.token(features.cls[0])[..., None, None]
        return F.interpolate(self.last(hidden.tanh()), features.padded_size)


class Declared(Own):
    def projections(self) -> list[Projection]:
        return [Projection({1: self.first.weight.flatten(1)}, {0: self.token.weight}, self.first.bias, grid=1)]

    def with_projections(self, projections: list[Projection], moments: Moments) -> Declared:
        (projection,) = projections
        head = Declared()
        head.load_state_dict(self.state_dict())
        with torch.no_grad():
            head.first.weight.copy_(projection.maps[1][..., None, None])
            head.token.weight.copy_(projection.cls[0])
            head.first.bias.copy_(projection.bias)
        return head


def test_a_custom_head_that_declares_its_projections_works() -> None:
    head, features = Declared(), random_features(grids=((3, 5), (4, 2), (3, 5), (3, 5)))
    (projection,) = input_projections(head, "mine")
    assert not projection.bias.requires_grad and projection.taps == (0, 1)
    with torch.no_grad():
        expected = F.interpolate(head.last(projection(features).tanh()), (24, 40))
    torch.testing.assert_close(logits(head, features), expected, rtol=1e-5, atol=1e-5)
    doubled = Projection({1: 2 * projection.maps[1]}, {0: 2 * projection.cls[0]}, 2 * projection.bias, 1)
    again = head.with_projections([doubled], Moments())
    torch.testing.assert_close(input_projections(again)[0](features), 2 * projection(features), rtol=1e-5, atol=1e-5)


class HalfDeclared(Own):
    def projections(self) -> list[Projection]:
        return []


@pytest.mark.parametrize("head", [Own(), HalfDeclared()], ids=["neither", "half"])
def test_the_error_for_a_head_without_a_declaration_names_the_remedy(head: nn.Module) -> None:
    kind = type(head).__name__
    message = (
        rf"head 'gloss' \({kind}\).*projections\(\) and with_projections\(\).*"
        r"simomerge\.models\.heads\.projections"
    )
    with pytest.raises(InputError, match=message) as caught:
        input_projections(head, "gloss")
    assert "distill" in str(caught.value)
    with pytest.raises(InputError, match=f"head '{kind}'"):
        input_projections(head)
