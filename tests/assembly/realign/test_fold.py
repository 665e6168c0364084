"""The fold: exact on linear mismatches, equal to mapping the features, and the identity where nothing is to repair."""

from __future__ import annotations

import copy
import math
import os
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from simomerge.assembly.realign import get_realignment, realign
from simomerge.assembly.realign.agreement import Agreement, judging, least_distance
from simomerge.assembly.realign.fold import VARIANTS
from simomerge.assembly.realign.layout import FoldLayout
from simomerge.assembly.realign.sums import FALLBACK_RIDGE, RIDGES, Fit, HeadSums, fold_heads, head_targets
from simomerge.core.errors import InputError
from simomerge.datasets import groups
from simomerge.datasets.pictures import as_images
from simomerge.datasets.tasks import Task
from simomerge.models.encoders import Features
from simomerge.models.heads import HEADS, LinearHead, build_head
from simomerge.models.heads.projections import Moments, Projection, input_projections
from simomerge.models.heads.resize import resize
from simomerge.models.model import SimoModel

from .contract import same
from .contract import weights as state

CHANNELS = (5, 5, 5, 5)
GRID = (3, 4)
HEAD_CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("linear", {"cls": False, "subpixels": 2}),
    ("dpt", {"fusion_channels": 4}),
    ("dpt", {"fusion_channels": 4, "cls": False}),
]
EVERY_HEAD = pytest.mark.parametrize(("kind", "head_settings"), HEAD_CASES)
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
FEW = "ignore:.*the fold stays close to the unfolded head:UserWarning"


# Features without an encoder ----------------------------------------------------------------------------


class NoEncoder(nn.Module):
    """Stands where an encoder would: the fold only uses its channels and strides."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.strides = tuple(range(1, len(self.channels) + 1))  # no two taps need be of one grid


def bare(heads: Mapping[str, nn.Module], channels: Sequence[int] = CHANNELS) -> SimoModel:
    tasks = {name: Task(name, "segmentation", classes=("a", "b", "c")) for name in heads}
    encoder: Any = NoEncoder(channels)
    return SimoModel(encoder, tasks, heads).eval()


def make_head(kind: str, head_settings: dict[str, Any], seed: int = 1, channels: Sequence[int] = CHANNELS) -> nn.Module:
    """A head that has been trained, or looks so."""
    generator = torch.Generator().manual_seed(seed)
    head = build_head(kind, channels, 3, head_settings).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        if isinstance(head, LinearHead):
            assert head.norm.running_mean is not None and head.norm.running_var is not None
            head.norm.running_mean.normal_(generator=generator)
            head.norm.running_var.uniform_(0.5, 2, generator=generator)
            head.norm.weight.uniform_(0.5, 2, generator=generator)
    return head


def draw_features(
    images: int = 60, seed: int = 0, grids: Sequence[tuple[int, int]] = (GRID,) * 4, channels: Sequence[int] = CHANNELS
) -> Features:
    generator = torch.Generator().manual_seed(seed)
    maps = tuple(
        torch.randn(images, c, *grid, generator=generator) + 0.5 for c, grid in zip(channels, grids, strict=True)
    )
    cls = tuple(torch.randn(images, c, generator=generator) - 0.5 for c in channels)
    return Features(maps, cls, (24, 32), (24, 32))


def near_identity(rows: int, generator: torch.Generator, size: float = 0.15) -> Tensor:
    return torch.eye(rows) + size * torch.randn(rows, rows, generator=generator)


def distorted(x: Features, cross: bool, seed: int = 7, noise: float = 0.0) -> Features:
    """z = A x + b, for the patches and for the CLS tokens, tap by tap or across all of them."""
    generator, dice = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1000)

    def apply(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        groups = [torch.cat(tensors, 1)] if cross else list(tensors)
        out = []
        for group in groups:
            width = group.shape[1]
            shift = torch.randn(width, generator=generator).view(-1, *[1] * (group.ndim - 2))
            mapped = torch.einsum("oc,bc...->bo...", near_identity(width, generator), group) + shift
            out.append(mapped + noise * torch.randn(mapped.shape, generator=dice))
        return out[0].split([t.shape[1] for t in tensors], 1) if cross else tuple(out)

    return Features(apply(x.maps), apply(x.cls), x.image_size, x.padded_size)


def pick(features: Features, indices: Sequence[int]) -> Features:
    chosen = list(indices)
    return Features(
        tuple(m[chosen] for m in features.maps),
        tuple(c[chosen] for c in features.cls),
        features.image_size,
        features.padded_size,
    )


def chosen(batch: Sequence[int], count: int) -> Tensor:
    """Which images of a batch are held out, of ``count`` images."""
    return torch.isin(torch.tensor(list(batch)), torch.tensor(groups.held_out(range(count))))


def sums_of(model: SimoModel, variant: str = "per-tap") -> HeadSums:
    return HeadSums(FoldLayout(model, variant))


def folded(
    fold: HeadSums,
    merged: Features,
    experts: Mapping[str, Features],
    ridge: Any = "auto",
    batches: Sequence[Sequence[int]] | None = None,
) -> tuple[dict[str, nn.Module], dict[str, Fit]]:
    for batch in batches if batches is not None else [range(len(merged))]:
        if len(batch):
            targets = fold.layout.targets({task: pick(features, batch) for task, features in experts.items()})
            fold.add(pick(merged, batch), targets, chosen(batch, len(merged)))
    with torch.no_grad():
        return fold.solve(ridge)


def logits(head: nn.Module, features: Features) -> Tensor:
    with torch.no_grad():
        found: Tensor = head(features)
    return found


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# What it is: written out in numpy -----------------------------------------------------------------------


class System:
    """One regression over some taps, every token a row and its CLS token repeated, in float64."""

    def __init__(self, features: Features, taps: Sequence[int], cls: bool, grid: int = 0) -> None:
        size = tuple(features.maps[grid].shape[-2:])
        self.places, self.images = size[0] * size[1], len(features)
        columns = [torch.zeros(self.images, self.places, 0)]
        columns += [resize(features.maps[tap], (size[0], size[1])).flatten(2).transpose(1, 2) for tap in taps]
        penalties = [np.ones(0), *(np.ones(features.maps[tap].shape[1]) for tap in taps)]
        if cls:
            columns += [features.cls[tap][:, None].expand(-1, self.places, -1) for tap in taps]
            penalties += [np.full(features.cls[tap].shape[1], float(self.places)) for tap in taps]
        self.rows = torch.cat(columns, 2).double().numpy()
        self.penalties = np.concatenate(penalties)

    def flat(self, images: Sequence[int] | None = None) -> np.ndarray:
        return (self.rows if images is None else self.rows[list(images)]).reshape(-1, self.rows.shape[2])

    def solve(
        self, wanted: np.ndarray, pull: np.ndarray, ridge: float, images: Sequence[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """W, b: min sum ||wanted - W x - b||^2 + ridge ||W - pull||^2, per column penalised; rows are tokens."""
        x = self.flat(images)
        centred, aim = x - x.mean(0), wanted - wanted.mean(0)
        penalty = np.diag(ridge * np.square(centred).sum(0).mean() * self.penalties)
        weights = np.linalg.solve(centred.T @ centred + penalty, centred.T @ aim + penalty @ pull.T).T
        return weights, wanted.mean(0) - weights @ x.mean(0)


def mapped(x: Features, z: Features, variant: str, cls: bool, ridge: float) -> list[Tensor]:
    """Features of x brought to those of z by ridge regression towards the identity: per tap (B, C or 2 C, h, w)."""
    found: dict[int, Tensor] = {}
    for taps in [[0, 1, 2, 3]] if variant == "cross-tap" else [[0], [1], [2], [3]]:
        ours, theirs = System(x, taps, cls), System(z, taps, cls)
        weights, bias = ours.solve(theirs.flat(), np.eye(ours.rows.shape[2]), ridge)
        values = torch.from_numpy(ours.rows @ weights.T + bias).float().transpose(1, 2)
        pieces = values.unflatten(2, GRID).split([x.maps[tap].shape[1] for tap in taps] * (2 if cls else 1), 1)
        for position, tap in enumerate(taps):
            found[tap] = torch.cat(pieces[position :: len(taps)], 1)
    return [found[tap] for tap in range(4)]


def without_cls(head: Any) -> nn.Module:
    """The same head for taps that carry their CLS token as further channels: what mapped CLS tokens need."""
    if not head.cls:
        return head
    if isinstance(head, LinearHead):
        other: Any = build_head("linear", CHANNELS * 2, 3, {**head.settings, "cls": False}).eval()
        other.load_state_dict(head.state_dict())  # it reads all patches, then all CLS tokens
        return other
    other = build_head("dpt", [2 * c for c in CHANNELS], 3, {**head.settings, "cls": False}).eval()
    state = {name: value for name, value in head.state_dict().items() if not name.startswith("readouts")}
    for tap in range(4):
        state[f"projects.{tap}.weight"] = torch.cat(
            [head.projects[tap].weight, head.readouts[tap].weight[..., None, None]], 1
        )
    other.load_state_dict(state)
    return other


def on_mapped(head: Any, maps: list[Tensor], x: Features) -> Tensor:
    if head.cls and isinstance(head, LinearHead):
        maps = [m[:, :c] for m, c in zip(maps, CHANNELS, strict=True)] + [
            m[:, c:] for m, c in zip(maps, CHANNELS, strict=True)
        ]
    return logits(without_cls(head), Features(tuple(maps), (), x.image_size, x.padded_size))


@EVERY_VARIANT
@EVERY_HEAD
@pytest.mark.parametrize(("ridge", "images"), [(1e-2, 24), (3.0, 24), (1e-3, 4), (1e-2, 1)])
def test_the_folded_head_is_the_unfolded_head_on_mapped_features(
    kind: str, head_settings: dict[str, Any], variant: Any, ridge: float, images: int
) -> None:
    """Also of fewer images than a CLS token has channels."""
    head, x = make_head(kind, head_settings), draw_features(images)
    z = distorted(x, cross=True, noise=0.3)
    heads, _ = folded(sums_of(bare({"seg": head}), variant), x, {"seg": z}, ridge)
    expected = on_mapped(head, mapped(x, z, variant, head_settings.get("cls", True), ridge), x)
    torch.testing.assert_close(logits(heads["seg"], x), expected, rtol=1e-4, atol=3e-5)
    assert relative(logits(heads["seg"], x), expected) < 1e-5
    assert relative(expected, logits(head, x)) > 1e-2  # and it is not nothing


@EVERY_VARIANT
@EVERY_HEAD
def test_a_linear_mismatch_is_undone(kind: str, head_settings: dict[str, Any], variant: Any) -> None:
    head, x = make_head(kind, head_settings), draw_features()
    z = distorted(x, cross=variant == "cross-tap")
    heads, fits = folded(sums_of(bare({"seg": head}), variant), x, {"seg": z}, 1e-9)
    assert relative(logits(heads["seg"], x), logits(head, z)) < 1e-4 < 1e-2 < relative(logits(head, x), logits(head, z))
    new = draw_features(5, seed=3)  # also of images it has not seen
    assert relative(logits(heads["seg"], new), logits(head, distorted(new, variant == "cross-tap"))) < 1e-4
    assert fits["seg"].r2 > 1 - 1e-6 > fits["seg"].r2_before


def test_across_the_taps_cannot_be_undone_tap_by_tap() -> None:
    head, x = make_head("dpt", {"fusion_channels": 4}), draw_features()
    z = distorted(x, cross=True)
    heads, fits = folded(sums_of(bare({"seg": head})), x, {"seg": z}, 1e-9)
    assert relative(logits(heads["seg"], x), logits(head, z)) > 1e-2 and fits["seg"].r2 < 0.98


@EVERY_VARIANT
@EVERY_HEAD
def test_equal_features_make_it_the_identity(kind: str, head_settings: dict[str, Any], variant: Any) -> None:
    head, x = make_head(kind, head_settings), draw_features(9)
    for ridge in ("auto", 1e-5, 10.0):
        heads, fits = folded(sums_of(bare({"seg": head}), variant), x, {"seg": x}, ridge)
        torch.testing.assert_close(logits(heads["seg"], x), logits(head, x), rtol=1e-5, atol=1e-5)
        other = draw_features(2, seed=4)
        torch.testing.assert_close(logits(heads["seg"], other), logits(head, other), rtol=1e-5, atol=1e-5)
        assert fits["seg"].r2 == pytest.approx(1) and fits["seg"].r2_before == pytest.approx(1)


@EVERY_VARIANT
@EVERY_HEAD
def test_an_infinite_ridge_leaves_the_head(kind: str, head_settings: dict[str, Any], variant: Any) -> None:
    head, x = make_head(kind, head_settings), draw_features(9)
    heads, fits = folded(sums_of(bare({"seg": head}), variant), x, {"seg": distorted(x, True)}, math.inf)
    torch.testing.assert_close(logits(heads["seg"], x), logits(head, x), rtol=1e-5, atol=1e-5)
    assert fits["seg"].ridge == math.inf and fits["seg"].r2 == fits["seg"].r2_before


@EVERY_HEAD
def test_the_more_ridge_the_nearer_the_weights_stay(kind: str, head_settings: dict[str, Any]) -> None:
    head, x = make_head(kind, head_settings), draw_features(20)
    z = distorted(x, True, noise=0.3)
    moved = []
    for ridge in (1e-3, 1e-1, 10.0, 1e3, 1e7):
        heads, _ = folded(sums_of(bare({"seg": head})), x, {"seg": z}, ridge)
        pairs = zip(input_projections(heads["seg"]), input_projections(head), strict=True)
        moved.append(sum(float((n.maps[tap] - o.maps[tap]).square().sum()) for n, o in pairs for tap in o.maps))
    assert moved == sorted(moved, reverse=True) and moved[-1] < 1e-8 < moved[0]
    # Only the bias, which nothing penalises, still mends the mean.
    for new, old in zip(input_projections(heads["seg"]), input_projections(head), strict=True):
        wanted = (old(z) - old(x)).double().mean((0, 2, 3))
        torch.testing.assert_close((new.bias - old.bias).double(), wanted, rtol=1e-3, atol=1e-5)


def test_a_head_that_is_folded_can_be_folded_again() -> None:
    x = draw_features()
    z, head = distorted(x, cross=True), make_head("dpt", {"fusion_channels": 4})
    once, _ = folded(sums_of(bare({"seg": head}), "cross-tap"), x, {"seg": z}, 1e-9)
    for variant in VARIANTS:
        again, _ = folded(sums_of(bare(once), variant), x, {"seg": x}, 1e-3)
        assert relative(logits(again["seg"], x), logits(head, z)) < 1e-4


def test_training_goes_on_from_where_the_fold_is() -> None:
    """The batch norm of a folded linear head holds the moments of the merged features, not of the expert's."""
    head, x = make_head("linear", {}), draw_features()
    new = folded(sums_of(bare({"seg": head})), x, {"seg": distorted(x, False)}, 1e-9)[0]["seg"]
    assert not new.training
    expected = logits(new, x)
    assert relative(logits(new.train(), x), expected) < 1e-3
    assert relative(logits(head.train(), x), expected) > 1e-2


# Several heads ------------------------------------------------------------------------------------------


@EVERY_VARIANT
def test_several_heads_are_folded_as_each_alone(variant: Any) -> None:
    heads = {f"t{i}": make_head(kind, extra, seed=i) for i, (kind, extra) in enumerate(HEAD_CASES)}
    x = draw_features(20)
    experts = {task: distorted(x, True, seed=9 + i, noise=0.2) for i, task in enumerate(heads)}
    together, fits = folded(sums_of(bare(heads), variant), x, experts)
    assert list(together) == list(heads) == list(fits)
    for task, head in heads.items():
        alone, fit = folded(sums_of(bare({task: head}), variant), x, {task: experts[task]})
        torch.testing.assert_close(logits(together[task], x), logits(alone[task], x), rtol=1e-5, atol=1e-5)
        assert fits[task].ridge == fit[task].ridge and fits[task].r2 == pytest.approx(fit[task].r2)


# The ridge ----------------------------------------------------------------------------------------------


def r2_by_hand(head: nn.Module, x: Features, z: Features, variant: str, ridge: float) -> float:
    """Solved without the held-out images, judged on them; the mean over projections (and taps)."""
    held_out = groups.held_out(range(len(x)))
    train = [i for i in range(len(x)) if i not in held_out]
    values = []
    for projection in input_projections(head):
        pieces = projection.split() if variant == "per-tap" else [projection.widened(CHANNELS)]
        for piece in pieces:
            system = System(x, piece.taps, bool(piece.cls), piece.grid)
            old = torch.cat([*piece.maps.values(), *piece.cls.values()], 1).double().numpy()
            u = piece(z).flatten(2).transpose(1, 2).double().numpy()
            target = u[train].reshape(-1, u.shape[2])
            weights, bias = (old, piece.bias.numpy()) if math.isinf(ridge) else system.solve(target, old, ridge, train)
            aim = u[held_out].reshape(-1, u.shape[2])
            left = np.square(aim - system.flat(held_out) @ weights.T - bias).sum()
            values.append(1 - left / np.square(aim - aim.mean(0)).sum())
    return float(np.mean(values))


@EVERY_VARIANT
@pytest.mark.parametrize(("kind", "head_settings"), [HEAD_CASES[0], HEAD_CASES[2]])
@pytest.mark.parametrize("noise", [0.1, 3.0])
def test_the_ridge_chosen_is_the_best_on_held_out_images(
    kind: str, head_settings: dict[str, Any], variant: Any, noise: float
) -> None:
    head, x = make_head(kind, head_settings), draw_features(12)
    z = distorted(x, True, noise=noise)
    heads, fits = folded(sums_of(bare({"seg": head}), variant), x, {"seg": z})
    curve = {ridge: r2_by_hand(head, x, z, variant, ridge) for ridge in RIDGES}
    best = max(curve, key=lambda ridge: curve[ridge])
    assert fits["seg"].ridge == best
    assert fits["seg"].r2 == pytest.approx(curve[best], rel=1e-4, abs=1e-5)
    assert fits["seg"].r2_before == pytest.approx(curve[math.inf], rel=1e-4, abs=1e-5)
    # And with it, all images take part.
    given_it, _ = folded(sums_of(bare({"seg": head}), variant), x, {"seg": z}, best)
    torch.testing.assert_close(logits(heads["seg"], x), logits(given_it["seg"], x), rtol=1e-6, atol=1e-6)


def test_where_nothing_helps_the_head_is_left_as_it_was() -> None:
    head, x = make_head("linear", {}), draw_features(8)
    generator = torch.Generator().manual_seed(3)
    z = Features(  # unlike x but for noise, of an image each: what is learned of one is wrong of the next
        tuple(m + torch.randn(len(m), m.shape[1], 1, 1, generator=generator) * 0.3 for m in x.maps),
        x.cls,
        x.image_size,
        x.padded_size,
    )
    _, fits = folded(sums_of(bare({"seg": head}), "cross-tap"), x, {"seg": z})
    assert fits["seg"].r2 >= fits["seg"].r2_before
    assert fits["seg"].ridge == max(RIDGES, key=lambda ridge: r2_by_hand(head, x, z, "cross-tap", ridge))


def test_every_head_gets_its_own_ridge() -> None:
    heads = {task: make_head("linear", {}, seed) for seed, task in enumerate(("easy", "hard"))}
    x = draw_features(12)
    experts = {"easy": distorted(x, False), "hard": distorted(x, False, noise=5.0)}
    _, fits = folded(sums_of(bare(heads)), x, experts)
    assert fits["easy"].ridge == min(RIDGES) < fits["hard"].ridge
    assert fits["easy"].r2 > 0.9 > fits["hard"].r2


def test_held_out_images_take_part_in_the_solution() -> None:
    head, x = make_head("linear", {}), draw_features(8)
    z = distorted(x, False, noise=0.5)
    for indices in (range(8), [0, 1, 2, 4, 5, 6]):
        heads, _ = folded(sums_of(bare({"seg": head}), "per-tap"), x, {"seg": z}, 1e-2, [indices])
        seen, aim = pick(x, indices), pick(z, indices)
        expected = on_mapped(head, mapped(seen, aim, "per-tap", True, 1e-2), seen)
        torch.testing.assert_close(logits(heads["seg"], seen), expected, rtol=1e-5, atol=1e-5)


def test_the_names_of_the_images_decide_which_are_held_out() -> None:
    head, x = make_head("linear", {}), draw_features(12)
    experts = {"seg": distorted(x, False, noise=0.5)}
    fold = sums_of(bare({"seg": head}))
    folded(fold, x, experts, batches=[[0, 1, 2], [3, 7, 11], [4, 5, 6, 8, 9, 10]])
    assert all([sums.images for sums in pair] == [9, 3] for pair in fold.equations.values())
    assert all([sums.tokens for sums in pair] == [108, 36] for pair in fold.equations.values())
    assert fold.images == 12


@settings(max_examples=12, deadline=None)
@given(
    variant=st.sampled_from(VARIANTS),
    size=st.integers(1, 12),
    order=st.integers(0, 1000),
    case=st.sampled_from(HEAD_CASES),
)
def test_neither_the_order_of_the_images_nor_the_batches_matter(
    variant: Any, size: int, order: int, case: tuple[str, dict[str, Any]]
) -> None:
    head, x = make_head(*case), draw_features(12)
    experts = {"seg": distorted(x, True, noise=0.3)}
    indices = list(range(12))
    random.Random(order).shuffle(indices)
    batches = [indices[start : start + size] for start in range(0, 12, size)]
    one, fit = folded(sums_of(bare({"seg": head}), variant), x, experts)
    other, other_fit = folded(sums_of(bare({"seg": head}), variant), x, experts, batches=batches)
    assert fit["seg"].ridge == other_fit["seg"].ridge
    assert fit["seg"].r2 == pytest.approx(other_fit["seg"].r2, abs=1e-6)
    torch.testing.assert_close(logits(other["seg"], x), logits(one["seg"], x), rtol=1e-4, atol=1e-4)


# Maps of several strides --------------------------------------------------------------------------------


STRIDES = ((6, 8), (3, 4), (2, 3), (3, 4))


@EVERY_VARIANT
@EVERY_HEAD
def test_taps_of_several_strides(kind: str, head_settings: dict[str, Any], variant: Any) -> None:
    head, x = make_head(kind, head_settings), draw_features(30, grids=STRIDES)
    z = distorted(x, False)
    heads, fits = folded(sums_of(bare({"seg": head}), variant), x, {"seg": z}, 1e-9)
    assert relative(logits(heads["seg"], x), logits(head, z)) < 1e-4 < relative(logits(head, x), logits(head, z))
    assert fits["seg"].r2 > 1 - 1e-5


class Own(nn.Module):
    """A head of a user: reads two taps at the grid of the coarser, which is the second, and one CLS token."""

    def __init__(self, in_channels: Sequence[int] = CHANNELS, out_channels: int = 3, **extra: Any) -> None:
        super().__init__()
        self.settings: dict[str, Any] = extra
        self.one, self.two = (nn.Conv2d(in_channels[tap], 4, 1, bias=tap == 1) for tap in (0, 1))
        self.token = nn.Linear(in_channels[1], 4, bias=False)
        self.last = nn.Conv2d(4, out_channels, 1)

    def forward(self, features: Features) -> Tensor:
        size = (features.maps[1].shape[-2], features.maps[1].shape[-1])
        hidden = self.one(resize(features.maps[0], size)) + self.two(features.maps[1])
        hidden = hidden + self.token(features.cls[1])[..., None, None]
        return F.interpolate(self.last(hidden.tanh()), features.padded_size)


class Declared(Own):
    def projections(self) -> list[Projection]:
        assert self.two.bias is not None
        maps = {0: self.one.weight.flatten(1), 1: self.two.weight.flatten(1)}
        return [Projection(maps, {1: self.token.weight}, self.two.bias, grid=1)]

    def with_projections(self, projections: list[Projection], moments: Moments) -> Declared:
        (projection,) = projections
        head = copy.deepcopy(self)
        assert head.two.bias is not None
        with torch.no_grad():
            head.one.weight.copy_(projection.maps[0][..., None, None])
            head.two.weight.copy_(projection.maps[1][..., None, None])
            head.token.weight.copy_(projection.cls[1])
            head.two.bias.copy_(projection.bias)
        return head


def test_a_users_head_at_the_grid_of_its_own_tap() -> None:
    torch.manual_seed(0)
    head, x = Declared().eval(), draw_features(30, grids=STRIDES)
    z = distorted(x, False)
    fold = sums_of(bare({"seg": head}))
    heads, fits = folded(fold, x, {"seg": z}, 1e-9)
    assert all(sum(sums.tokens for sums in pair) == 30 * 12 for pair in fold.equations.values())
    assert relative(logits(heads["seg"], x), logits(head, z)) < 1e-4 and fits["seg"].r2 > 1 - 1e-5


class ReadsATokenAlone(Own):
    """Of the second tap its CLS token only."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, features: Features) -> Tensor:
        hidden = self.one(features.maps[0]) + (self.token(features.cls[1]) + self.bias)[..., None, None]
        return F.interpolate(self.last(hidden.tanh()), features.padded_size)

    def projections(self) -> list[Projection]:
        return [Projection({0: self.one.weight.flatten(1)}, {1: self.token.weight}, self.bias)]

    def with_projections(self, projections: list[Projection], moments: Moments) -> ReadsATokenAlone:
        (projection,) = projections
        head = copy.deepcopy(self)
        with torch.no_grad():
            head.one.weight.copy_(projection.maps[0][..., None, None])
            head.token.weight.copy_(projection.cls[1])
            head.bias.copy_(projection.bias)
        return head


def test_a_users_head_that_reads_only_the_cls_token_of_a_tap() -> None:
    """Per tap nothing grows: it is given what it declared, so that it can hold it."""
    torch.manual_seed(0)
    head, x = ReadsATokenAlone().eval(), draw_features(60)
    x.maps[1].add_(x.cls[1][..., None, None])  # the patches know of the token
    z = distorted(x, False)
    z.cls[1].add_(0.5 * x.maps[1].mean((2, 3)))
    heads, fits = folded(sums_of(bare({"seg": head})), x, {"seg": z}, 1e-2)
    (before,), (after,) = input_projections(head), input_projections(heads["seg"])
    expected = []
    for piece in before.split():
        system = System(x, [0] if piece.maps else [], False)
        if piece.cls:
            system.rows = x.cls[1][:, None].expand(-1, system.places, -1).double().numpy()
            system.penalties = np.full(5, float(system.places))
        old = torch.cat([*piece.maps.values(), *piece.cls.values()], 1).double().numpy()
        target = piece(z).flatten(2).transpose(1, 2).flatten(0, 1).double().numpy()
        expected.append(system.solve(target, old, 1e-2))
    np.testing.assert_allclose(after.maps[0].numpy(), expected[0][0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after.cls[1].numpy(), expected[1][0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after.bias.numpy(), expected[0][1] + expected[1][1], rtol=1e-4, atol=1e-5)
    assert fits["seg"].r2 > fits["seg"].r2_before


# Refusals of the class ----------------------------------------------------------------------------------


def test_a_fold_of_no_images_is_refused() -> None:
    with pytest.raises(InputError, match="no image"):
        sums_of(bare({"seg": make_head("linear", {})})).solve()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["merged", "expert"])
def test_features_that_are_not_finite_are_refused(value: float, where: str) -> None:
    x = draw_features(6)
    z = distorted(x, False)
    (x if where == "merged" else z).maps[2][4, 0, 0, 0] = value
    with pytest.raises(InputError, match="not finite"):
        folded(sums_of(bare({"seg": make_head("linear", {})})), x, {"seg": z})


@pytest.mark.parametrize("ridge", [-1.0, -1e-9, math.nan])
def test_a_ridge_below_zero_is_refused(ridge: float) -> None:
    with pytest.raises(InputError, match=r"ridge.*at least 0"):
        get_realignment("fold", ridge=ridge)


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(InputError, match=r"per-tap, cross-tap.*'all-taps'"):
        get_realignment("fold", variant="all-taps")


def test_a_head_that_declares_nothing_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"head 'seg' \(Own\) does not declare its input projections.*projections\(\)"):
        sums_of(bare({"seg": Own()}))


@pytest.mark.parametrize("images", [1, 8])
def test_a_ridge_of_zero_needs_no_more_images_than_another(images: int) -> None:
    """Fewer images than the CLS tokens have channels: their part of the Gram matrix is singular."""
    channels = (12, 12, 12, 12)
    x = draw_features(images, channels=channels)
    head = make_head("linear", {}, channels=channels)
    try:
        heads, _ = folded(sums_of(bare({"seg": head}, channels)), x, {"seg": distorted(x, False)}, 0.0)
    except InputError as error:
        assert "ridge" in str(error)  # an error that names the ridge is also correct
    else:
        assert torch.isfinite(logits(heads["seg"], x)).all()


# Whole models -------------------------------------------------------------------------------------------


IMAGES = list(np.random.default_rng(0).random((40, 24, 32, 3)).astype(np.float32))


def moved(model: SimoModel, seed: int, size: float = 0.05) -> SimoModel:
    """Fine-tuned by dice; a copy."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.encoder.backbone.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def average(experts: Mapping[str, SimoModel]) -> SimoModel:
    encoder = copy.deepcopy(next(iter(experts.values())).encoder)
    weights = [expert.encoder.backbone.state_dict() for expert in experts.values()]
    encoder.backbone.load_state_dict({name: sum(w[name] for w in weights) / len(weights) for name in weights[0]})
    tasks = {task: expert.tasks[task] for task, expert in experts.items()}
    heads = {task: copy.deepcopy(expert.heads[task]) for task, expert in experts.items()}
    return SimoModel(encoder, tasks, heads, {"merge": {"method": "average"}}).eval()


@pytest.fixture(scope="module")
def experts(make_model: Callable[..., SimoModel]) -> dict[str, SimoModel]:
    kinds = {"depth": "dpt", "normals": "linear"}
    return {
        task: moved(make_model([Task(task)], kind, seed), seed) for seed, (task, kind) in enumerate(kinds.items(), 1)
    }


@pytest.fixture(scope="module")
def scene(experts: dict[str, SimoModel]) -> SimoModel:
    return average(experts)


def batch_of(images: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2)


def gaps(model: SimoModel, experts: Mapping[str, SimoModel], images: Sequence[np.ndarray]) -> dict[str, float]:
    with torch.no_grad():
        ours = model(batch_of(images))
        return {task: relative(ours[task], e(batch_of(images))[task]) for task, e in experts.items()}


@EVERY_VARIANT
def test_a_merged_model_comes_nearer_to_its_experts(
    scene: SimoModel, experts: dict[str, SimoModel], variant: Any
) -> None:
    result = realign(scene, experts, IMAGES, variant=variant, count=32)
    fresh = np.random.default_rng(1).random((6, 24, 32, 3)).astype(np.float32)
    before, after = gaps(scene, experts, fresh), gaps(result, experts, fresh)
    record = result.provenance["realign"]
    for task in experts:
        assert after[task] < 0.9 * before[task]
        assert record["r2_before"][task] < record["r2"][task] <= 1
    assert result.heads["depth"].settings.get("cross_tap", False) == (variant == "cross-tap")


@EVERY_VARIANT
def test_an_expert_folded_to_itself_predicts_as_before(experts: dict[str, SimoModel], variant: Any) -> None:
    for task, expert in experts.items():
        result = realign(expert, {task: expert}, IMAGES[:32], variant=variant)
        with torch.no_grad():
            wanted = expert(batch_of(IMAGES[:4]))[task]
            torch.testing.assert_close(result(batch_of(IMAGES[:4]))[task], wanted, rtol=1e-5, atol=1e-5)


def test_the_provenance_records_ridge_and_r2(scene: SimoModel, experts: dict[str, SimoModel]) -> None:
    record = realign(scene, experts, IMAGES[:24]).provenance["realign"]
    for key in ("ridge", "r2", "r2_before"):
        assert list(record[key]) == ["depth", "normals"]
    assert all(ridge in RIDGES for ridge in record["ridge"].values())
    fixed = realign(scene, experts, IMAGES[:24], ridge="none").provenance["realign"]
    assert fixed["ridge"] == {"depth": "none", "normals": "none"} and fixed["r2"] == fixed["r2_before"]
    assert fixed["r2_before"] == record["r2_before"]


def test_what_the_experts_see_once_serves_several_merges(scene: SimoModel, experts: dict[str, SimoModel]) -> None:
    other = average({"depth": experts["depth"], "normals": moved(experts["normals"], 5)})
    other = SimoModel(other.encoder, scene.tasks, scene.heads)
    from simomerge.datasets.pictures import as_images

    seen = list(head_targets(scene, experts, as_images(IMAGES[:24]), batch_size=7))
    assert [len(batch.images) for batch in seen] == [7, 7, 7, 3]
    for model in (scene, other):
        folded_model = fold_heads(model, seen)
        found, fits, fold = folded_model.model, folded_model.fits, folded_model.sums
        expected = realign(model, experts, IMAGES[:24])
        assert fold.images == 24
        assert {t: f.ridge for t, f in fits.items()} == expected.provenance["realign"]["ridge"]
        with torch.no_grad():
            for task, wanted in expected(batch_of(IMAGES[:4])).items():
                torch.testing.assert_close(found(batch_of(IMAGES[:4]))[task], wanted, rtol=1e-3, atol=1e-4)


def test_a_model_with_adapters_is_folded_with_them(scene: SimoModel, experts: dict[str, SimoModel]) -> None:
    scene, experts = copy.deepcopy((scene, experts))
    torch.manual_seed(0)
    for adapter in scene.encoder.add_adapters(2):
        nn.init.normal_(adapter.up.weight, std=0.2)
    result = realign(scene, experts, IMAGES[:32])
    assert result.encoder.adapters is not None
    assert same(state(result.encoder.adapters), state(scene.encoder.adapters))
    before, after = gaps(scene, experts, IMAGES[32:]), gaps(result, experts, IMAGES[32:])
    assert all(after[task] < before[task] for task in experts)


def test_realign_folds_by_default(scene: SimoModel, experts: dict[str, SimoModel]) -> None:
    by_name = realign(scene, experts, IMAGES[:24])
    assert same(state(by_name.heads), state(realign(scene, experts, IMAGES[:24]).heads))
    with pytest.raises(InputError, match="give images="):
        realign(scene, experts)
    with pytest.raises(InputError, match="needs the experts"):
        realign(scene, images=IMAGES)


@pytest.mark.filterwarnings(FEW)
def test_images_of_several_sizes_are_folded_together(scene: SimoModel, experts: dict[str, SimoModel]) -> None:
    mixed = [*IMAGES[:6], *[image[:20, :17] for image in IMAGES[6:12]]]
    record = realign(scene, experts, mixed).provenance["realign"]
    assert record["unlabelled_images"] == 12 and record["r2"]["normals"] > record["r2_before"]["normals"]


# What is refused of whole models ------------------------------------------------------------------------


def test_an_expert_whose_head_is_not_the_models_is_named_with_the_tensor(
    scene: SimoModel, experts: dict[str, SimoModel], make_model: Callable[..., SimoModel]
) -> None:
    other = make_model([Task("normals")], "linear", seed=9)
    with pytest.raises(InputError, match=r"head 'normals' of the model is not its expert's \(output.weight has other"):
        realign(scene, {**experts, "normals": other}, IMAGES)
    other = make_model([Task("normals")], "dpt", seed=2)
    with pytest.raises(InputError, match=r"head 'normals' .*not there in the expert"):
        realign(scene, {**experts, "normals": other}, IMAGES)
    result = realign(scene, experts, IMAGES[:24])  # it was re-aligned before
    with pytest.raises(InputError, match="before any re-alignment"):
        realign(result, experts, IMAGES[:24])


def test_experts_that_see_images_otherwise_are_refused(scene: SimoModel, experts: dict[str, SimoModel]) -> None:
    scene, experts = copy.deepcopy((scene, experts))
    experts["normals"].encoder.mean.add_(0.1)
    with pytest.raises(InputError, match=r"normals.*differ in image normalisation"):
        realign(scene, experts, IMAGES)


def test_no_images_are_refused(scene: SimoModel, experts: dict[str, SimoModel], tmp_path: Path) -> None:
    for images in ([], tmp_path):
        with pytest.raises(InputError, match=r"at least one image|no picture"):
            realign(scene, experts, images)


def test_a_head_without_projections_is_told_how_to_declare_them(
    scene: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, experts = copy.deepcopy((scene, experts))
    kinds: Any = HEADS
    monkeypatch.setitem(kinds, "own", Own)
    for model in (scene, experts["normals"]):
        torch.manual_seed(0)
        model.heads["normals"] = Own(scene.encoder.channels).eval()
    with pytest.raises(InputError, match=r"head 'normals' \(Own\).*projections\(\) and with_projections\(\)"):
        realign(scene, experts, IMAGES)


# Warnings -----------------------------------------------------------------------------------------------


def test_too_few_images_for_the_width_are_a_warning(scene: SimoModel, experts: dict[str, SimoModel]) -> None:
    with pytest.warns(UserWarning, match="4 images give 48 tokens for a map of 64 inputs") as caught:
        realign(scene, experts, IMAGES[:4])
    others = [str(each.message) for each in caught if "so that one is kept" not in str(each.message)]
    assert len(others) == 2 and any(text.startswith("4 images are few for a choice or a fit") for text in others)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        realign(scene, experts, IMAGES[:24])


def test_one_image_is_a_warning_and_does_no_harm(scene: SimoModel, experts: dict[str, SimoModel]) -> None:
    with pytest.warns(UserWarning, match="too few images .1. to hold one out"):
        result = realign(scene, experts, IMAGES[:1])
    record = result.provenance["realign"]
    assert record["ridge"] == {"depth": FALLBACK_RIDGE, "normals": FALLBACK_RIDGE}
    assert record["r2"] == record["r2_before"] == {"depth": None, "normals": None}
    after = gaps(result, experts, IMAGES[1:9])
    assert all(math.isfinite(value) and value < 3 for value in after.values())


def test_features_that_never_vary_fold_the_bias_alone(scene: SimoModel, experts: dict[str, SimoModel]) -> None:
    """Not even with the place: an encoder without position embeddings, before pictures of one colour."""
    scene, experts = copy.deepcopy((scene, experts))
    for model in (scene, *experts.values()):
        nn.init.zeros_(model.encoder.backbone.embeddings.position_embeddings)
    grey = [np.full((24, 32, 3), 0.4, np.float32)] * 12
    with pytest.warns(UserWarning, match="the same features"):
        result = realign(scene, experts, grey)
    for task in experts:
        new, old = (input_projections(model.heads[task]) for model in (result, scene))
        for mine, before in zip(new, old, strict=True):
            assert all(torch.allclose(mine.maps[tap], before.maps[tap], atol=1e-6) for tap in before.maps)
    after = gaps(result, experts, grey[:1])
    assert all(value < 1e-3 for value in after.values())


def test_images_that_are_all_alike_are_a_warning(scene: SimoModel, experts: dict[str, SimoModel]) -> None:
    """However many, they prove as much as one of them."""
    with pytest.warns(UserWarning, match="all 40 images give the same features"):
        realign(scene, experts, [IMAGES[0]] * 40)


# Two processes ------------------------------------------------------------------------------------------


SHARED_IMAGES = 10
SETUPS = {"accelerate": SHARED_IMAGES, "torch alone": SHARED_IMAGES, "one image": 1}
"""Ways in which two processes meet, and how many images there are. The last leaves one process without an image."""


def fold_shares(rank: int, folder: str) -> None:
    """One of two processes: counts every other image, gathers, and writes the sums it then has."""
    from datetime import timedelta

    import torch.distributed as distributed
    from accelerate import PartialState

    torch.set_num_threads(1)
    for how, images in SETUPS.items():
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/{how}", rank=rank, world_size=2, timeout=timedelta(seconds=10)
        )
        launched = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
        for name, value in launched.items():
            os.environ.pop(name, None)
            if how != "torch alone":
                os.environ[name] = str(value)
        PartialState._reset_state()
        if how != "torch alone":
            PartialState(cpu=True)
        fold = shared_fold()
        add_images(fold, range(rank, images, 2))
        fold.gather()
        sums = {str(system): [dict(vars(sums)) for sums in pair] for system, pair in fold.equations.items()}
        torch.save(sums, f"{folder}/{how}-{rank}.pt")
        distributed.destroy_process_group()


def shared_fold() -> HeadSums:
    return sums_of(bare({"a": make_head("linear", {}), "b": make_head("dpt", {"fusion_channels": 4})}), "cross-tap")


def add_images(fold: HeadSums, indices: Sequence[int]) -> None:
    x = draw_features(SHARED_IMAGES)
    experts = {"a": distorted(x, True, 1, 0.1), "b": distorted(x, True, 2, 0.1)}
    for index in indices:
        targets = fold.layout.targets({task: pick(features, [index]) for task, features in experts.items()})
        fold.add(pick(x, [index]), targets, chosen([index], SHARED_IMAGES))


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sums that each of two processes has in the end."""
    import torch.multiprocessing as multiprocessing

    folder = tmp_path_factory.mktemp("processes")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=fold_shares, args=(rank, str(folder))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        if worker.is_alive():
            worker.kill()
    return folder


@pytest.mark.parametrize("how", SETUPS)
def test_two_processes_have_the_sums_of_one(shares: Path, how: str) -> None:
    fold = shared_fold()
    add_images(fold, range(SETUPS[how]))
    for file in (shares / f"{how}-{rank}.pt" for rank in range(2)):
        assert file.exists(), "a process hung or failed"
        found = torch.load(file)
        assert list(found) == [str(system) for system in fold.equations]
        for pair, expected in zip(found.values(), fold.equations.values(), strict=True):
            for sums, wanted in zip(pair, expected, strict=True):
                for name, value in vars(wanted).items():
                    torch.testing.assert_close(sums[name], value, rtol=1e-10, atol=1e-10, msg=f"{how}: {name}")


# A fold that does harm ----------------------------------------------------------------------------------


def test_a_head_that_equals_its_expert_is_kept_without_a_word(
    scene: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([{"depth": 1.0, "normals": 0.0}, {"depth": 0.5, "normals": 1e-7}])
    monkeypatch.setattr(Agreement, "distances", lambda self, model: next(found))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*further from its expert")
        record = realign(scene, experts, IMAGES).provenance["realign"]
    assert record["ridge"]["normals"] == "none" and record["distance_ratio"] == {"depth": 0.5, "normals": 1.0}


def test_a_head_that_the_fold_moves_away_from_its_expert_is_kept(
    scene: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The distances decide, task by task, whatever R^2 says."""
    found = iter([{"depth": 1.0, "normals": 1.0}, {"depth": 0.5, "normals": 1.25}])
    monkeypatch.setattr(Agreement, "distances", lambda self, model: next(found))
    with pytest.warns(UserWarning, match="normals: on held-out images the folded head is 25 % further from its expert"):
        result = realign(scene, experts, IMAGES)
    record = result.provenance["realign"]
    assert record["ridge"]["normals"] == "none" != record["ridge"]["depth"]
    assert record["r2"]["normals"] == record["r2_before"]["normals"]
    assert record["distance_ratio"] == {"depth": 0.5, "normals": 1.0}
    batch = batch_of(IMAGES[:4])
    with torch.no_grad():
        torch.testing.assert_close(result(batch)["normals"], scene(batch)["normals"], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(result(batch)["depth"], scene(batch)["depth"], rtol=1e-2)


@pytest.mark.usefixtures("float32")
def test_distances_are_those_of_heads_that_have_not_seen_the_held_out_images(
    scene: SimoModel, experts: dict[str, SimoModel]
) -> None:
    images = as_images(IMAGES)
    agreement = Agreement(experts, judging(images))
    folded = fold_heads(scene, head_targets(scene, experts, images, agreement=agreement), agreement=agreement)
    kept, out = groups.training_images(images, groups.SHARE), groups.held_out(images)
    blind = fold_heads(scene, list(head_targets(scene, experts, images._subset(kept))), ridge=1.0)
    given = dict.fromkeys(experts, 1.0)
    heads = folded.sums.heads(given, hold_out=True)
    batch = batch_of([IMAGES[index] for index in out])
    with torch.no_grad():
        features = scene.encode(batch)
        for task, expert in experts.items():
            torch.testing.assert_close(heads[task](features), blind.model.heads[task](features), rtol=1e-3, atol=1e-4)
            wanted = expert(batch)[task]
            before = float(scene.tasks[task].distance(scene(batch)[task], wanted))
            assert folded.before[task] == pytest.approx(before, rel=1e-3)
            assert agreement.least()[task] == pytest.approx(least_distance(scene.tasks[task], wanted), rel=0.2)
