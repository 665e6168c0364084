"""ReACT: its maps are those of scipy, and the head that absorbed them is the head on mapped features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import lstsq, orthogonal_procrustes
from torch import Tensor, nn

from simomerge.assembly.realign import realign
from simomerge.assembly.realign.normal_equations import NormalEquations
from simomerge.assembly.realign.procrustes import RIDGES, Solver, TaskMaps, procrustes
from simomerge.assembly.realign.sums import FALLBACK_RIDGE
from simomerge.core.errors import InputError
from simomerge.datasets import DenseDataset, groups
from simomerge.models.encoders import Features
from simomerge.models.model import SimoModel

from .test_fold import EVERY_HEAD, bare, distorted, draw_features, logits, make_head, pick, relative

NOISE = 0.3


def rows(features: Features, kind: str, tap: int) -> np.ndarray:
    """Every token a row, in float64."""
    tensor = features.maps[tap].permute(0, 2, 3, 1) if kind == "maps" else features.cls[tap]
    return tensor.reshape(-1, tensor.shape[-1]).double().numpy()


def by_scipy(z: np.ndarray, target: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """A, b: min sum ||t - A z - b||^2 + ridge * mean variance * tokens * ||A - Q||^2, as stacked least squares."""
    centred, aim = z - z.mean(0), target - target.mean(0)
    rotation, _ = orthogonal_procrustes(centred, aim)  # centred @ rotation ~ aim
    pull = math.sqrt(ridge * np.square(centred).sum(0).mean()) * np.eye(z.shape[1])
    solution = lstsq(np.vstack([centred, pull]), np.vstack([aim, pull @ rotation]))[0]
    return solution.T, target.mean(0) - solution.T @ z.mean(0)


def mapped(x: Features, z: Features, ridge: float) -> Features:
    """Features of x brought to those of z."""
    places = x.maps[0].shape[-2] * x.maps[0].shape[-1]

    def bring(kind: str, tap: int, factor: float) -> Tensor:
        matrix, bias = by_scipy(rows(x, kind, tap), rows(z, kind, tap), factor * ridge)
        found = torch.from_numpy(rows(x, kind, tap) @ matrix.T + bias).float()
        if kind == "cls":
            return found
        grid = (x.maps[tap].shape[-2], x.maps[tap].shape[-1])
        return found.view(len(x), *grid, -1).permute(0, 3, 1, 2)

    maps = tuple(bring("maps", tap, 1) for tap in range(len(x.maps)))
    cls = tuple(bring("cls", tap, places) for tap in range(len(x.cls)))
    return Features(maps, cls, x.image_size, x.padded_size)


def chosen(batch: Sequence[int], count: int) -> Tensor:
    """Which images of a batch are held out, of ``count`` images."""
    return torch.isin(torch.tensor(list(batch)), torch.tensor(groups.held_out(range(count))))


def maps_of(head: nn.Module, x: Features, z: Features, batches: Sequence[Sequence[int]] | None = None) -> TaskMaps:
    maps = TaskMaps(bare({"parts": head}), "parts")
    for batch in batches or [range(len(x))]:
        maps.add(pick(x, batch), pick(z, batch), chosen(batch, len(x)))
    return maps


def sums(z: np.ndarray, target: np.ndarray) -> NormalEquations:
    found = NormalEquations.empty(z.shape[1], z.shape[1])
    ours, theirs = torch.from_numpy(z)[None], torch.from_numpy(target)[None]
    found.add(ours, ours[:, 0, :0], theirs - ours, theirs)
    return found


def draw(count: int, width: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets that are a linear map of them, with noise."""
    generator = np.random.default_rng(seed)
    z = generator.normal(1, 2, (count, width))
    target = z @ (np.eye(width) + 0.4 * generator.normal(size=(width, width))) - 0.7
    return z, target + NOISE * generator.normal(size=target.shape)


def rotation(width: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator))[0]


def rotated(x: Features) -> Features:
    """An orthogonal map of all tokens of a tap, and a shift."""
    turns = [rotation(tap.shape[1], seed) for seed, tap in enumerate((*x.maps, *x.cls))]
    maps = tuple(torch.einsum("oc,bchw->bohw", turn, m) + 0.3 for turn, m in zip(turns, x.maps, strict=False))
    cls = tuple(c @ turn.T - 0.2 for turn, c in zip(turns[len(maps) :], x.cls, strict=True))
    return Features(maps, cls, x.image_size, x.padded_size)


# The map ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [1e-4, 1e-1, 3.0])
def test_the_map_is_that_of_stacked_least_squares(ridge: float) -> None:
    z, target = draw(40)
    matrix, bias = Solver(sums(z, target)).solve(ridge)
    wanted, offset = by_scipy(z, target, ridge)
    np.testing.assert_allclose(matrix, wanted, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(bias, offset, rtol=1e-8, atol=1e-9)


def test_a_large_ridge_gives_the_procrustes_map() -> None:
    z, target = draw(40)
    turn, _ = orthogonal_procrustes(z - z.mean(0), target - target.mean(0))
    np.testing.assert_allclose(procrustes(sums(z, target)), turn.T, atol=1e-7)
    matrix, bias = Solver(sums(z, target)).solve(1e9)
    np.testing.assert_allclose(matrix, turn.T, atol=1e-7)
    np.testing.assert_allclose(bias, target.mean(0) - turn.T @ z.mean(0), atol=1e-6)


def test_no_ridge_gives_ordinary_least_squares() -> None:
    z, target = draw(40)
    matrix, bias = Solver(sums(z, target)).solve(0)
    wanted = lstsq(np.hstack([z, np.ones((40, 1))]), target)[0]
    np.testing.assert_allclose(matrix, wanted[:-1].T, atol=1e-7)
    np.testing.assert_allclose(bias, wanted[-1], atol=1e-7)


def test_of_several_procrustes_maps_it_is_the_one_nearest_to_the_identity() -> None:
    """Three tokens of six channels span two centred directions, and so do their targets."""
    z, target = draw(3)
    turn = procrustes(sums(z, target)).numpy()
    np.testing.assert_allclose(turn @ turn.T, np.eye(6), atol=1e-12)
    centred, aim = z - z.mean(0), target - target.mean(0)
    best = np.linalg.svd(centred.T @ aim, compute_uv=False).sum()
    np.testing.assert_allclose(np.trace(turn @ centred.T @ aim), best, rtol=1e-7)
    free = np.linalg.svd(np.vstack([centred, aim]))[2][4:]  # directions in which nothing varies
    np.testing.assert_allclose(free @ turn.T, free, atol=1e-6)


def test_tokens_that_never_vary_give_the_identity_and_a_bias() -> None:
    z, target = np.ones((9, 4)), np.full((9, 4), 3.0)
    matrix, bias = Solver(sums(z, target)).solve(1e-2)
    np.testing.assert_allclose(matrix, np.eye(4))
    np.testing.assert_allclose(bias, 2 * np.ones(4))


# The head -----------------------------------------------------------------------------------------------


@EVERY_HEAD
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_the_new_head_is_the_old_one_on_mapped_features(kind: str, head_settings: dict[str, Any], ridge: float) -> None:
    x = draw_features(24)
    z = distorted(x, cross=False, noise=NOISE)
    head = make_head(kind, head_settings)
    found = maps_of(head, x, z).head(ridge)
    assert relative(logits(found, x), logits(head, mapped(x, z, ridge))) < 1e-4
    assert relative(logits(found, x), logits(head, x)) > 0.05
    assert found.settings == head.settings


@EVERY_HEAD
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1e3])
def test_a_rotation_is_undone_whatever_the_ridge(kind: str, head_settings: dict[str, Any], ridge: float) -> None:
    x = draw_features(60)
    z = rotated(x)
    head = make_head(kind, head_settings)
    assert relative(logits(maps_of(head, x, z).head(ridge), x), logits(head, z)) < 1e-4


def test_equal_features_leave_the_head() -> None:
    x, head = draw_features(24), make_head("dpt", {"fusion_channels": 4})
    found = maps_of(head, x, x).head(1e-2)
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, head.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_batches_do_not_matter() -> None:
    x, head = draw_features(12), make_head("linear", {})
    z = distorted(x, cross=False, noise=NOISE)
    whole, parts = maps_of(head, x, z), maps_of(head, x, z, [[3, 7], [0, 1, 2], [8, 9, 10, 11, 4, 5, 6]])
    assert whole.choose().ridge == parts.choose().ridge and whole.images == parts.images == 12
    torch.testing.assert_close(logits(whole.head(1e-2), x), logits(parts.head(1e-2), x), rtol=1e-4, atol=1e-4)


# The ridge ----------------------------------------------------------------------------------------------


def r2_by_hand(x: Features, z: Features, ridge: float | None) -> float:
    """The mean over all maps, solved without the held-out images and judged on them; None is no map."""
    held = groups.held_out(range(len(x)))
    rest = [index for index in range(len(x)) if index not in held]
    found = []
    for kind in ("maps", "cls"):
        for tap in range(4):
            factor = x.maps[0][0, 0].numel() if kind == "cls" else 1
            ours, theirs = rows(pick(x, held), kind, tap), rows(pick(z, held), kind, tap)
            if ridge is not None:
                known = (rows(pick(each, rest), kind, tap) for each in (x, z))
                matrix, bias = by_scipy(*known, factor * ridge)
                ours = ours @ matrix.T + bias
            error = np.square(theirs - ours).sum(1).mean()
            found.append(1 - error / rows(z, kind, tap).var(0).sum())
    return float(np.mean(found))


@pytest.mark.parametrize("noise", [0.05, 2.0])
def test_the_ridge_chosen_is_the_best_on_held_out_images(noise: float) -> None:
    x = draw_features(24)
    z = distorted(x, cross=False, noise=noise)
    maps = maps_of(make_head("linear", {}), x, z)
    by_hand = {ridge: r2_by_hand(x, z, ridge) for ridge in RIDGES}
    fit = maps.choose()
    assert fit.ridge == max(by_hand, key=lambda ridge: by_hand[ridge])
    assert fit.r2 == pytest.approx(by_hand[fit.ridge], abs=1e-5)
    assert fit.r2_before == pytest.approx(r2_by_hand(x, z, None), abs=1e-5)
    assert maps.choose(0.5).ridge == 0.5 and maps.choose(0.5).r2 == pytest.approx(r2_by_hand(x, z, 0.5), abs=1e-5)


def test_more_noise_asks_for_more_ridge() -> None:
    x, head = draw_features(24), make_head("linear", {})
    quiet, loud = (maps_of(head, x, distorted(x, cross=False, noise=noise)).choose().ridge for noise in (0.01, 3.0))
    assert quiet < loud


# On models ----------------------------------------------------------------------------------------------


def gaps(model: SimoModel, experts: Mapping[str, SimoModel], data: DenseDataset) -> dict[str, float]:
    images = torch.stack([data.image(index) for index in range(len(data))])
    with torch.no_grad():
        ours = model(images)
        return {task: relative(ours[task], expert(images)[task]) for task, expert in experts.items()}


def test_it_brings_a_model_nearer_to_its_experts(
    merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
) -> None:
    result = realign(merged, experts, rooms, method="react")
    record = result.provenance["realign"]
    before, after = gaps(merged, experts, rooms), gaps(result, experts, rooms)
    for task in experts:
        assert after[task] < 0.7 * before[task]
        assert record["r2_before"][task] < record["r2"][task] <= 1 and record["ridge"][task] in RIDGES


def test_one_image_has_no_fit_but_a_map(merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset) -> None:
    with pytest.warns(UserWarning, match="too few images to hold one out"):
        result = realign(merged, experts, rooms.take(1), method="react")
    record = result.provenance["realign"]
    assert record["ridge"] == dict.fromkeys(experts, FALLBACK_RIDGE)
    assert record["r2"] == record["r2_before"] == dict.fromkeys(experts, None)
    assert all(math.isfinite(gap) for gap in gaps(result, experts, rooms).values())


def test_a_head_without_projections_is_refused() -> None:
    class Opaque(nn.Module):
        def forward(self, features: Features) -> Tensor:
            return features.maps[0]

    with pytest.raises(InputError, match=r"head 'parts' \(Opaque\) does not declare its input projections"):
        TaskMaps(bare({"parts": Opaque(), "other": make_head("linear", {})}), "parts")


@pytest.mark.parametrize("where", ["merged", "expert"])
def test_features_that_are_not_finite_are_refused(where: str) -> None:
    x, z = draw_features(8), draw_features(8, seed=1)
    (x if where == "merged" else z).maps[2][3, 1, 0, 0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        maps_of(make_head("linear", {}), x, z).gather()


def test_a_ridge_below_zero_is_refused(
    merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset, make_model: Callable[..., SimoModel]
) -> None:
    with pytest.raises(InputError, match="ridge must be a number at least 0 or 'auto', got -1"):
        realign(merged, experts, rooms, method="react", ridge=-1)
