"""DARE, DELLA and Breadcrumbs against slow implementations, one Python float at a time."""

import hashlib
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simomerge.core.errors import InputError
from simomerge.merging import get_method, merge_state_dicts
from simomerge.merging.engine.ranks import rank_mask
from simomerge.merging.sparse import keep_middle, keep_probabilities

from .models import APART, COARSE, Tensors, assert_close, assert_same, experts, merge_slowly, ten_times_apart, tensors

pytestmark = pytest.mark.filterwarnings("ignore:The task vector of")
few = settings(max_examples=25, deadline=None)

METHODS = ["dare-linear", "dare-ties", "della", "breadcrumbs"]


def draws(seed: int, expert: str, name: str, size: int) -> list[float]:
    digest = hashlib.sha256(json.dumps([seed, expert, name]).encode()).digest()
    source = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return [float(value) for value in source.random(size, dtype=np.float32)]


def drop_slowly(tau: list[float], rates: list[float], drawn: list[float]) -> list[float]:
    return [v / rate if d < np.float32(rate) else 0.0 for v, rate, d in zip(tau, rates, drawn, strict=True)]


def elect_slowly(kept: list[list[float]]) -> list[float]:
    merged = []
    for column in zip(*kept, strict=True):
        plus = float(np.sum(column, dtype=np.float32)) >= 0
        agreeing = [value for value in column if (value > 0 if plus else value < 0)]
        merged.append(sum(agreeing) / max(len(agreeing), 1))
    return merged


def rates_slowly(tau: list[float], length: int, density: float, epsilon: float) -> list[float]:
    rates = []
    for start in range(0, len(tau), length):
        row = tau[start : start + length]
        order = sorted(range(len(row)), key=lambda i: (abs(row[i]), i))
        for i in range(len(row)):
            share = order.index(i) / (length - 1) if length > 1 else 0.5
            rates.append(density - epsilon / 2 + epsilon * share)
    return rates


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", [0, 7])
def test_dare_against_the_slow_one(density: float, seed: int) -> None:
    base, models = ten_times_apart(seed)

    def dropped(name: str, taus: dict[str, list[float]]) -> dict[str, list[float]]:
        return {e: drop_slowly(t, [density] * len(t), draws(seed, e, name, len(t))) for e, t in taus.items()}

    def added(name: str, taus: dict[str, list[float]]) -> list[float]:
        return [0.3 * sum(column) for column in zip(*dropped(name, taus).values(), strict=True)]

    def elected(name: str, taus: dict[str, list[float]]) -> list[float]:
        return [0.7 * value for value in elect_slowly(list(dropped(name, taus).values()))]

    merged = merge_state_dicts(base, models, "dare-linear", density=density, scale=0.3, seed=seed)
    assert_same(merged, merge_slowly(base, models, added))
    merged = merge_state_dicts(base, models, "dare-ties", density=density, scale=0.7, seed=seed)
    assert_same(merged, merge_slowly(base, models, elected))


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.2), (0.5, 0.9), (0.3, 0.0), (0.95, 0.1)])
def test_della_against_the_slow_one(density: float, epsilon: float) -> None:
    base, models = ten_times_apart(3)

    def merge(name: str, taus: dict[str, list[float]]) -> list[float]:
        length = (APART[name] or (1,))[-1]
        kept = [
            drop_slowly(tau, rates_slowly(tau, length, density, epsilon), draws(5, expert, name, len(tau)))
            for expert, tau in taus.items()
        ]
        return [0.8 * value for value in elect_slowly(kept)]

    merged = merge_state_dicts(base, models, "della", density=density, epsilon=epsilon, scale=0.8, seed=5)
    assert_same(merged, merge_slowly(base, models, merge))


def middle_slowly(tau: list[float], density: float, gamma: float) -> list[float]:
    count = max(int(density * len(tau)), 1)
    largest = min(int(gamma * len(tau)), len(tau) - count)
    order = sorted(range(len(tau)), key=lambda i: (abs(tau[i]), i))
    kept = set(order[len(tau) - largest - count : len(tau) - largest])
    return [value if i in kept else 0.0 for i, value in enumerate(tau)]


@pytest.mark.parametrize(("density", "gamma"), [(0.9, 0.01), (0.5, 0.1), (0.8, 0.6), (0.05, 0.0), (1.0, 0.3)])
def test_breadcrumbs_against_the_slow_one(density: float, gamma: float) -> None:
    base, models = ten_times_apart(1)

    def merge(name: str, taus: dict[str, list[float]]) -> list[float]:
        kept = [middle_slowly(tau, density, gamma) for tau in taus.values()]
        return [0.4 * sum(column) for column in zip(*kept, strict=True)]

    merged = merge_state_dicts(base, models, "breadcrumbs", density=density, gamma=gamma)
    assert_same(merged, merge_slowly(base, models, merge))


@few
@given(tensors(COARSE), experts(COARSE), st.floats(0.01, 1), st.floats(0, 1))
def test_breadcrumbs_with_many_equal_magnitudes(
    base: Tensors, models: dict[str, Tensors], density: float, gamma: float
) -> None:
    def merge(name: str, taus: dict[str, list[float]]) -> list[float]:
        kept = [middle_slowly(tau, density, gamma) for tau in taus.values()]
        return [sum(column) for column in zip(*kept, strict=True)]

    merged = merge_state_dicts(base, models, "breadcrumbs", density=density, gamma=gamma, scale=1.0)
    assert_close(merged, merge_slowly(base, models, merge), 0)


@few
@given(st.lists(COARSE, min_size=1, max_size=30), st.data())
def test_ranks_are_those_of_a_stable_sort(values: list[float], data: st.DataObject) -> None:
    high = data.draw(st.integers(1, len(values)))
    low = data.draw(st.integers(0, high - 1))
    expected = np.zeros(len(values), bool)
    expected[np.argsort(values, kind="stable")[low:high]] = True
    np.testing.assert_array_equal(rank_mask(np.array(values, np.float32), low, high), expected)


@few
@given(st.integers(1, 5), st.integers(1, 20), st.data())
def test_della_ranks_are_those_of_a_stable_sort(rows: int, length: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(COARSE, min_size=rows * length, max_size=rows * length))
    tau = np.array(values, np.float32).reshape(rows, length)
    expected = rates_slowly(values, length, 0.6, 0.4)
    np.testing.assert_allclose(keep_probabilities(tau, 0.6, 0.4).reshape(-1), expected, rtol=1e-6)
    for view in (tau.T, tau[:, ::2]):  # not contiguous
        np.testing.assert_array_equal(keep_probabilities(view, 0.6, 0.4), keep_probabilities(view.copy(), 0.6, 0.4))


def test_how_many_entries_of_breadcrumbs_stay() -> None:
    tau = np.arange(1, 101, dtype=np.float32)
    np.testing.assert_array_equal(np.flatnonzero(keep_middle(tau, 0.5, 0.2)), np.arange(30, 80))
    np.testing.assert_array_equal(np.flatnonzero(keep_middle(tau, 0.5, 0.0)), np.arange(50, 100))
    # No room for 20 outliers: mergekit, too, drops as many as there is room for.
    np.testing.assert_array_equal(np.flatnonzero(keep_middle(tau, 0.9, 0.2)), np.arange(90))
    # int(gamma * n) is 0 below 100 entries; that must not drop everything.
    np.testing.assert_array_equal(np.flatnonzero(keep_middle(tau[:10], 0.9, 0.01)), np.arange(1, 10))
    assert np.count_nonzero(keep_middle(tau, 0.001, 0.5)) == 1
    assert keep_middle(tau[:0], 0.5, 0.5).size == 0


def test_density_one_drops_nothing() -> None:
    base, models = ten_times_apart(2)
    scales = {"seg": 0.2, "depth": 0.5, "normals": 1.0}
    for scale in (0.3, scales, list(scales.values())):
        added = merge_state_dicts(base, models, "task-arithmetic", scale=scale)
        assert_close(merge_state_dicts(base, models, "dare-linear", density=1.0, scale=scale), added, 0)
        assert_close(merge_state_dicts(base, models, "breadcrumbs", density=1.0, gamma=0.5, scale=scale), added, 0)
    elected = merge_state_dicts(base, models, "ties", density=1.0, trim="tensor")
    assert_same(merge_state_dicts(base, models, "dare-ties", density=1.0), elected)
    assert_same(merge_state_dicts(base, models, "della", density=1.0, epsilon=0.0), elected)


def test_without_a_window_della_is_dare_ties() -> None:
    base, models = ten_times_apart(4)
    left = merge_state_dicts(base, models, "della", density=0.4, epsilon=0.0, seed=1)
    assert_close(left, merge_state_dicts(base, models, "dare-ties", density=0.4, seed=1), 0)


@pytest.mark.parametrize(
    ("name", "parameters"), [("dare-linear", {"density": 0.3}), ("dare-ties", {}), ("della", {"epsilon": 0.6})]
)
def test_the_expected_task_vector_is_the_experts(name: str, parameters: dict[str, float]) -> None:
    seeds = 300
    tau = {"w": np.array([[1, -2, 3, -4], [0.1, 0.4, -0.2, 0.3]], np.float32), "b": np.float32([5.0])}
    base = {n: np.zeros_like(values) for n, values in tau.items()}
    merged = [merge_state_dicts(base, {"a": tau}, name, seed=s, scale=1.0, **parameters) for s in range(seeds)]
    for tensor, values in tau.items():
        mean = np.mean([m[tensor] for m in merged], axis=0)
        rate = keep_probabilities(values, parameters.get("density", 0.5), parameters.get("epsilon", 0.0))
        kept = np.mean([m[tensor] != 0 for m in merged], axis=0)
        deviation = np.sqrt(rate * (1 - rate) / seeds)
        assert (np.abs(kept - rate) < 4.5 * deviation).all()
        assert (np.abs(mean - values) < 4.5 * np.abs(values) * deviation / rate).all()


def test_drops_depend_on_the_seed_the_expert_and_the_tensor() -> None:
    ones = {name: np.ones(200, np.float32) for name in ("v", "w")}
    base = {name: np.zeros(200, np.float32) for name in ones}

    def kept(expert: str, tensor: str, seed: int) -> np.ndarray:
        return merge_state_dicts(base, {expert: ones}, "dare-linear", seed=seed)[tensor] != 0

    reference = kept("a", "w", 0)
    np.testing.assert_array_equal(reference, kept("a", "w", 0))
    for other in (kept("b", "w", 0), kept("a", "v", 0), kept("a", "w", 1)):
        assert 0.3 < np.mean(reference == other) < 0.7


def test_opposite_values_elect_plus() -> None:
    base = {"w": np.zeros((), np.float32)}
    models = {"a": {"w": np.float32(-3)}, "b": {"w": np.float32(3)}}
    models = {expert: {"w": np.asarray(model["w"])} for expert, model in models.items()}
    assert merge_state_dicts(base, models, "dare-ties", density=1.0)["w"] == 3
    assert merge_state_dicts(base, models, "della", density=1.0, epsilon=0.0)["w"] == 3


def test_bad_parameters() -> None:
    for name in METHODS:
        for density in (0.0, 1.5, math.nan):
            with pytest.raises(InputError, match=f"{name}: density must be a number above 0 and at most 1"):
                get_method(name, density=density)
    with pytest.raises(InputError, match=r"della: density 0.1 with epsilon 0.2 .* from 0 to 0.2; .* above 0"):
        get_method("della", density=0.1)
    with pytest.raises(InputError, match=r"density 0.95 with epsilon 0.2 gives probabilities from 0.85 to 1.05"):
        get_method("della", density=0.95)
    with pytest.raises(InputError, match=r"epsilon must be a number at least 0 and at most 1, got -0.1"):
        get_method("della", epsilon=-0.1)
    with pytest.raises(InputError, match="seed must be a number"):
        get_method("dare-linear", seed=0.5)
    with pytest.raises(InputError, match="gamma must be a number at least 0"):
        get_method("breadcrumbs", gamma=-0.1)
    get_method("della", density=0.9)  # 0.9 + 0.1 is allowed
