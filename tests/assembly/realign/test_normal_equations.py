"""Ridge regression from sums, against the design matrix written out: every token a row, its CLS token repeated."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simomerge.assembly.realign.normal_equations import NormalEquations


@dataclass
class Data:
    """Patches (B, n, D_z), CLS tokens (B, D_c), residuals and targets (B, n, O)."""

    patches: Tensor
    cls: Tensor
    residual: Tensor
    target: Tensor

    @property
    def design(self) -> np.ndarray:
        places = self.patches.shape[1]
        repeated = self.cls[:, None].expand(-1, places, -1)
        return torch.cat([self.patches, repeated], 2).flatten(0, 1).double().numpy()

    @property
    def rows(self) -> np.ndarray:
        return self.residual.flatten(0, 1).double().numpy()

    def sums(self, splits: Sequence[int] = ()) -> NormalEquations:
        """Counted in batches that end at ``splits``."""
        sums = NormalEquations.empty(self.patches.shape[2] + self.cls.shape[1], self.residual.shape[2])
        edges = [0, *splits, len(self.patches)]
        for start, end in itertools.pairwise(edges):
            if start < end:
                part = slice(start, end)
                sums.add(self.patches[part], self.cls[part], self.residual[part], self.target[part])
        return sums


def make(
    images: int = 7, places: int = 6, width: int = 4, tokens: int = 3, outputs: int = 2, seed: int = 0, mean: float = 1
) -> Data:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) + mean

    return Data(
        draw(images, places, width), draw(images, tokens), draw(images, places, outputs), draw(images, places, outputs)
    )


def ridge_by_hand(x: np.ndarray, r: np.ndarray, ridge: float, penalties: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (O, D) and biases: rows for the penalty below the centred design, solved by least squares."""
    centred = x - x.mean(0)
    unit = np.square(centred).sum(0).mean()
    stacked = np.concatenate([centred, np.diag(np.sqrt(ridge * unit * penalties))])
    targets = np.concatenate([r - r.mean(0), np.zeros((x.shape[1], r.shape[1]))])
    weights = np.linalg.lstsq(stacked, targets, rcond=None)[0].T
    return weights, r.mean(0) - weights @ x.mean(0)


def close(left: Tensor, right: np.ndarray, rtol: float = 1e-8) -> None:
    assert left.dtype == torch.float64
    np.testing.assert_allclose(left.numpy(), right, rtol=rtol, atol=rtol * np.abs(right).max(initial=1e-30))


# Solutions ----------------------------------------------------------------------------------------------


def test_without_a_ridge_it_is_least_squares_with_an_intercept() -> None:
    data = make()
    design = np.concatenate([data.design, np.ones((42, 1))], 1)
    expected = np.linalg.lstsq(design, data.rows, rcond=None)[0]
    weights, bias = data.sums().solve(0.0, torch.ones(7, dtype=torch.float64))
    close(weights, expected[:-1].T)
    close(bias, expected[-1])


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0, 50.0])
@pytest.mark.parametrize("tokens", [3, 0])
def test_ridge_is_least_squares_with_a_row_per_penalty(ridge: float, tokens: int) -> None:
    data = make(tokens=tokens)
    penalties = torch.linspace(0.5, 6, 4 + tokens, dtype=torch.float64)
    weights, bias = data.sums().solve(ridge, penalties)
    expected = ridge_by_hand(data.design, data.rows, ridge, penalties.numpy())
    close(weights, expected[0])
    close(bias, expected[1])


def test_a_solution_minimises_what_it_says() -> None:
    """The gradient of the objective, its bias unpenalised, is zero there."""
    data, ridge = make(), 0.3
    penalties = torch.tensor([1.0, 1, 1, 1, 6, 6, 6], dtype=torch.float64)
    weights, bias = (t.clone().requires_grad_() for t in data.sums().solve(ridge, penalties))
    x, r = torch.from_numpy(data.design), torch.from_numpy(data.rows)
    unit = (x - x.mean(0)).square().sum(0).mean()
    left = (r - x @ weights.T - bias).square().sum()
    (left + ridge * unit * (penalties * weights.square()).sum()).backward()
    assert weights.grad is not None and bias.grad is not None
    scale = float((x.T @ r).abs().max())
    assert weights.grad.abs().max() < 1e-9 * scale and bias.grad.abs().max() < 1e-9 * scale


def test_a_heavy_penalty_silences_its_column_alone() -> None:
    data = make()
    penalties = torch.ones(7, dtype=torch.float64)
    penalties[2] = 1e9
    weights, _ = data.sums().solve(1e-3, penalties)
    assert weights[:, 2].abs().max() < 1e-6 < weights[:, [0, 1, 3, 4, 5, 6]].abs().min()


def test_a_huge_ridge_leaves_the_bias() -> None:
    data = make()
    weights, bias = data.sums().solve(1e12, torch.ones(7, dtype=torch.float64))
    assert weights.abs().max() < 1e-9
    close(bias, data.rows.mean(0), 1e-6)


def test_a_constant_added_to_the_residuals_goes_into_the_bias_whatever_the_ridge() -> None:
    data, moved = make(), make()
    moved.residual = moved.residual + torch.tensor([100.0, -7.0])
    for ridge in (0.0, 1e-2, 10.0):
        before, after = (one.sums().solve(ridge, torch.ones(7, dtype=torch.float64)) for one in (data, moved))
        close(after[0], before[0].numpy(), 1e-4)  # the residuals come in float32
        close(after[1] - before[1], np.array([100.0, -7.0]), 1e-5)


def test_the_ridge_is_in_units_of_the_inputs() -> None:
    data, scaled = make(), make()
    scaled.patches, scaled.cls = scaled.patches * 256, scaled.cls * 256
    for ridge in (1e-3, 1.0):
        one, other = (d.sums().solve(ridge, torch.ones(7, dtype=torch.float64)) for d in (data, scaled))
        close(other[0] * 256, one[0].numpy())
        close(other[1], one[1].numpy())


def test_the_same_images_twice_give_the_same_solution() -> None:
    data = make()
    once = data.sums()
    for ridge in (1e-3, 1.0):
        one, two = (sums.solve(ridge, torch.ones(7, dtype=torch.float64)) for sums in (once, once + once))
        close(two[0], one[0].numpy())
        close(two[1], one[1].numpy())


def test_means_far_larger_than_the_spread_do_not_hide_it() -> None:
    data = make(mean=1000.0)
    weights, bias = data.sums().solve(1e-4, torch.ones(7, dtype=torch.float64))
    expected = ridge_by_hand(data.design, data.rows, 1e-4, np.ones(7))
    close(weights, expected[0], 1e-7)
    close(bias, expected[1], 1e-6)


def test_more_inputs_than_tokens_still_have_a_ridge_solution() -> None:
    data = make(images=2, places=3, width=20, tokens=20)
    weights, bias = data.sums().solve(1e-4, torch.ones(40, dtype=torch.float64))
    expected = ridge_by_hand(data.design, data.rows, 1e-4, np.ones(40))
    close(weights, expected[0], 1e-7)
    close(bias, expected[1], 1e-7)


@pytest.mark.parametrize("value", [0.0, 3.7, 1e4])
def test_constant_inputs_give_only_a_bias(value: float) -> None:
    data = make()
    data.patches, data.cls = torch.full_like(data.patches, value), torch.full_like(data.cls, value)
    for ridge in (0.0, 1e-5, 1.0):
        weights, bias = data.sums().solve(ridge, torch.ones(7, dtype=torch.float64))
        assert not weights.any()
        close(bias, data.rows.mean(0))


def test_small_inputs_are_not_taken_for_constant_ones() -> None:
    data, tiny = make(mean=0.0), make(mean=0.0)
    tiny.patches, tiny.cls = tiny.patches * 2**-30, tiny.cls * 2**-30
    one, other = (d.sums().solve(1e-3, torch.ones(7, dtype=torch.float64)) for d in (data, tiny))
    close(other[0] * 2**-30, one[0].numpy())


# Sums ---------------------------------------------------------------------------------------------------


def test_sums_are_those_of_the_rows() -> None:
    data, sums = make(), make().sums()
    x, r = data.design, data.rows
    u = data.target.flatten(0, 1).double().numpy()
    assert (sums.tokens, sums.images) == (42, 7)
    expected = {
        "x": x.sum(0),
        "xx": x.T @ x,
        "r": r.sum(0),
        "rr": np.square(r).sum(0),
        "xr": x.T @ r,
        "u": u.sum(0),
        "uu": np.square(u).sum(0),
        "mean": x.mean(0),
        "variance": x.var(0),
    }
    for name, value in expected.items():
        close(getattr(sums, name), value)


def test_everything_is_in_float64_also_from_half_precision() -> None:
    data = make()
    for dtype in (torch.float32, torch.bfloat16):
        sums = NormalEquations.empty(7, 2)
        parts = [t.to(dtype) for t in (data.patches, data.cls, data.residual, data.target)]
        sums.add(*parts)
        assert all(value.dtype == torch.float64 for value in vars(sums).values() if isinstance(value, Tensor))
        rounded = Data(*(part.float() for part in parts))
        close(sums.xx, rounded.design.T @ rounded.design, 1e-12)


@settings(max_examples=25, deadline=None)
@given(
    images=st.integers(1, 6),
    places=st.integers(1, 5),
    tokens=st.integers(0, 2),
    seed=st.integers(0, 99),
    cuts=st.lists(st.integers(0, 6), max_size=4),
    order=st.randoms(use_true_random=False),
)
def test_any_batches_in_any_order_give_the_same_sums(
    images: int, places: int, tokens: int, seed: int, cuts: list[int], order: object
) -> None:
    data = make(images, places, 3, tokens, 2, seed)
    whole, parts = data.sums(), data.sums(sorted(min(cut, images) for cut in cuts))
    shuffled = list(range(images))
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    mixed = Data(*(t[shuffled] for t in (data.patches, data.cls, data.residual, data.target))).sums()
    singles = NormalEquations.empty(3 + tokens, 2)
    for image in range(images):
        one = Data(*(t[image : image + 1] for t in (data.patches, data.cls, data.residual, data.target)))
        singles = singles + one.sums()
    for other in (parts, mixed, singles):
        assert (other.tokens, other.images) == (whole.tokens, whole.images) == (images * places, images)
        for name, value in vars(whole).items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(getattr(other, name), value, rtol=1e-12, atol=1e-11)


def test_images_of_other_sizes_count_by_their_tokens() -> None:
    small, large = make(images=3, places=2), make(images=2, places=9, seed=1)
    both = small.sums()
    both.add(large.patches, large.cls, large.residual, large.target)
    assert (both.tokens, both.images) == (3 * 2 + 2 * 9, 5)
    x = np.concatenate([small.design, large.design])
    r = np.concatenate([small.rows, large.rows])
    weights, bias = both.solve(1e-2, torch.ones(7, dtype=torch.float64))
    expected = ridge_by_hand(x, r, 1e-2, np.ones(7))
    close(weights, expected[0])
    close(bias, expected[1])


def test_adding_leaves_both_as_they_were() -> None:
    one, other = make().sums(), make(seed=1).sums()
    kept = one.xx.clone()
    total = one + other
    total.xx.zero_()
    assert torch.equal(one.xx, kept) and one.tokens == 42 and total.tokens == 84


# Fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [0.0, 1e-2, 10.0])
def test_error_is_the_sum_of_squares_that_is_left(ridge: float) -> None:
    train, other = make(), make(images=4, places=5, seed=1)
    weights, bias = train.sums().solve(ridge, torch.ones(7, dtype=torch.float64))
    for data in (train, other):
        left = data.rows - data.design @ weights.numpy().T - bias.numpy()
        close(data.sums().error(weights, bias), np.square(left).sum(0))
    nothing = torch.zeros(2, 7, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    close(other.sums().error(*nothing), np.square(other.rows).sum(0))


def test_one_token_has_no_spread() -> None:
    rows = torch.full((1, 1, 2), 5.0)
    one = Data(torch.full((1, 1, 2), 3.0), torch.ones(1, 1), rows, rows)
    assert one.sums().tokens == 1 and (one.sums().spread() == 0).all()


def test_spread_is_the_sum_of_squares_about_the_mean_of_the_targets() -> None:
    data = make(mean=5.0)
    u = data.target.flatten(0, 1).double().numpy()
    close(data.sums().spread(), np.square(u - u.mean(0)).sum(0))


def test_neither_is_ever_negative() -> None:
    data = make(images=2, places=2, width=10)
    exact = make(images=2, places=2, width=10)
    exact.residual = exact.patches[..., :2] * 1000
    weights, bias = exact.sums().solve(1e-12, torch.ones(13, dtype=torch.float64))
    assert (exact.sums().error(weights, bias) >= 0).all()
    data.target = torch.full_like(data.target, 1e3)
    assert (data.sums().spread() >= 0).all()
    assert (NormalEquations.empty(3, 2).spread() == 0).all()
