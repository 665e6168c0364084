"""SCE and PCB against slow implementations, one Python float at a time."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simomerge.core.errors import InputError
from simomerge.merging import get_method, merge_state_dicts
from simomerge.merging.competition import energy_shares, most_varied

from .models import COARSE, Tensors, assert_close, assert_same, experts, merge_slowly, ten_times_apart, tensors

pytestmark = pytest.mark.filterwarnings("ignore:The task vector of")
few = settings(max_examples=25, deadline=None)


def select_slowly(taus: dict[str, list[float]], density: float) -> set[int]:
    columns = list(zip(*taus.values(), strict=True))
    means = [sum(column) / len(column) for column in columns]
    spread = [sum((v - mean) ** 2 for v in column) for column, mean in zip(columns, means, strict=True)]
    varying = [i for i, value in enumerate(spread) if value > 0]
    if density == 1:
        return set(range(len(spread)))
    count = max(int(density * len(varying)), 1) if varying else 0
    return set(sorted(varying, key=lambda i: (-spread[i], i))[:count])


def sce_slowly(taus: dict[str, list[float]], density: float) -> list[float]:
    selected = select_slowly(taus, density)
    taus = {e: [v if i in selected else 0.0 for i, v in enumerate(tau)] for e, tau in taus.items()}
    energy = {expert: sum(value**2 for value in tau) for expert, tau in taus.items()}
    share = {e: value / sum(energy.values()) if sum(energy.values()) else 1 / len(taus) for e, value in energy.items()}
    merged = []
    for column in zip(*taus.values(), strict=True):
        plus = sum(column) >= 0
        agreeing = [(share[e], v) for e, v in zip(taus, column, strict=True) if (v > 0 if plus else v < 0)]
        total = sum(weight for weight, _ in agreeing)
        merged.append(sum(weight * value for weight, value in agreeing) / total if total else 0.0)
    return merged


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.01])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_sce_against_the_slow_one(density: float, count: int) -> None:
    base, models = ten_times_apart(count, count)
    expected = merge_slowly(base, models, lambda name, taus: [0.8 * v for v in sce_slowly(taus, density)])
    assert_same(merge_state_dicts(base, models, "sce", density=density, scale=0.8), expected)


@few
@given(tensors(COARSE), experts(COARSE), st.sampled_from([0.1, 0.3, 0.5, 0.99, 1.0]))
def test_sce_with_many_equal_values(base: Tensors, models: dict[str, Tensors], density: float) -> None:
    expected = merge_slowly(base, models, lambda name, taus: sce_slowly(taus, density))
    assert_close(merge_state_dicts(base, models, "sce", density=density), expected, 2e-6)


def test_sce_does_not_depend_on_the_size_of_task_vectors() -> None:
    # mergekit gives up its coefficients where the mean squares are below 1e-6.
    base, models = ten_times_apart(3)
    base = {name: np.zeros_like(values) for name, values in base.items()}
    small = {e: {n: values * np.float32(2.0**-30) for n, values in model.items()} for e, model in models.items()}
    merged = merge_state_dicts(base, models, "sce", density=0.5)
    for name, values in merge_state_dicts(base, small, "sce", density=0.5).items():
        np.testing.assert_array_equal(values * np.float32(2.0**30), merged[name])


def test_what_varies() -> None:
    same = np.float32([0.1, 0.2, 0.3, 1e-30])
    assert not most_varied([same, same.copy(), same.copy()], 0.5).any()
    assert not most_varied([same], 0.5).any()
    np.testing.assert_array_equal(most_varied([same, same * np.float32([1, 1, 1, 2])], 0.1), [0, 0, 0, 1])
    assert energy_shares([np.zeros(2, np.float32)] * 2) == [0.5, 0.5]
    assert energy_shares([np.float32([1e-30]), np.float32([3e-30])]) == pytest.approx([0.1, 0.9])


def test_sce_of_one_expert_or_of_equal_ones() -> None:
    base, models = ten_times_apart(4, 1)
    assert_close(merge_state_dicts(base, models, "sce"), models["seg"], 1e-6)
    assert_close(merge_state_dicts(base, models, "sce", density=0.5), base, 0)
    twice = {"a": models["seg"], "b": dict(models["seg"])}
    assert_close(merge_state_dicts(base, twice, "sce"), models["seg"], 1e-6)


def normalise_slowly(values: list[float], low: float, high: float) -> list[float]:
    return [(min(max(v, low), high) - low) / (high - low) if high > low else 0.0 for v in values]


def pcb_slowly(base: Tensors, models: dict[str, Tensors], density: float, scales: dict[str, float]) -> Tensors:
    flat = {e: [float(v) for name in base for v in np.ravel(models[e][name] - base[name])] for e in sorted(models)}
    size, totals = sum(values.size for values in base.values()), [sum(c) for c in zip(*flat.values(), strict=True)]
    numerator, denominator = [0.0] * size, [0.0] * size
    for expert, tau in flat.items():
        ordered = sorted(abs(v) for v in tau)
        low, high = ordered[int(size * 1e-4)], ordered[int(size * (1 - 1e-4) - 1)]
        intra = [math.exp(len(flat) * n**2) for n in normalise_slowly([abs(v) for v in tau], low, high)]
        scores = [i * math.tanh(v * total) for i, v, total in zip(intra, tau, totals, strict=True)]
        cut = sorted(scores)[int(size * (1 - density))]
        for i, weight in enumerate(normalise_slowly(scores, cut, max(scores))):
            sign = (tau[i] > 0) - (tau[i] < 0)
            numerator[i] += weight * scales[expert] * sign * min(max(abs(tau[i]), low), high)
            denominator[i] += weight
    merged = iter(n / max(d, 1e-12) for n, d in zip(numerator, denominator, strict=True))
    return {
        name: values + np.array([next(merged) for _ in range(values.size)]).reshape(values.shape)
        for name, values in base.items()
    }


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_pcb_against_the_slow_one(density: float, count: int) -> None:
    base, models = ten_times_apart(count, count)
    scales = {expert: 0.5 + i / 4 for i, expert in enumerate(models)}
    merged = merge_state_dicts(base, models, "pcb", density=density, scale=scales)
    assert_same(merged, pcb_slowly(base, models, density, scales), 2e-6)


def test_pcb_clips_both_ends_of_many_entries() -> None:
    rng = np.random.default_rng(0)
    base = {name: np.zeros(7_000, np.float32) for name in "vwx"}
    models = {e: {n: rng.standard_normal(7_000, np.float32) / 10**i for i, n in enumerate(base)} for e in "ab"}
    merged = merge_state_dicts(base, models, "pcb", density=0.3)
    assert_same(merged, pcb_slowly(base, models, 0.3, {"a": 1.0, "b": 1.0}), 2e-6)
    limit = np.sort(np.concatenate([np.abs(models["a"][n]) for n in base]))[-4:]
    assert np.abs(merged["v"]).max() <= limit.max()
    # The encoder is ranked as a whole: of the smallest tensor next to nothing is left.
    assert np.count_nonzero(merged["v"]) > 3_000 and np.count_nonzero(merged["x"]) < 10


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e-30])
def test_pcb_with_nothing_to_rank_gives_the_base_and_no_warning(value: float) -> None:
    base = {"w": np.ones((2, 3), np.float32), "b": np.zeros(2, np.float32)}
    models = {e: {n: values + np.float32(value) for n, values in base.items()} for e in "ab"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert_close(merge_state_dicts(base, models, "pcb"), base, 0)
    assert merge_state_dicts({"n": np.arange(3)}, {"a": {"n": np.arange(3)}}, "pcb")["n"].tolist() == [0, 1, 2]


def test_bad_parameters() -> None:
    for name in ("sce", "pcb"):
        for density in (0.0, 1.1):
            with pytest.raises(InputError, match=f"{name}: density must be a number above 0 and at most 1"):
                get_method(name, density=density)
    with pytest.raises(InputError, match="scale must be a number at least 0, got -1"):
        get_method("pcb", scale=[1.0, -1.0])
