"""TIES against a slow implementation of each convention, one Python float at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simomerge.merging import TaskVectorStream, Ties, merge_state_dicts

from .models import COARSE, FINE, SHAPES, Tensors, assert_close, experts, tensors

pytestmark = pytest.mark.filterwarnings("ignore:The task vector of")
some = settings(max_examples=40, deadline=None)
densities = st.one_of(st.sampled_from([0.05, 0.2, 0.5, 0.9, 1.0]), st.floats(0.01, 1.0))


def sign(value: float) -> int:
    return (value > 0) - (value < 0)


def flat_task_vector(base: Tensors, expert: Tensors) -> list[float]:
    return [float(e - b) for name in base for b, e in zip(base[name].flat, expert[name].flat, strict=True)]


def trim_original(tau: list[float], density: float) -> list[float]:
    rank = len(tau) - int(len(tau) * density)
    threshold = sorted(abs(value) for value in tau)[rank - 1] if rank > 0 else 0.0
    return [value if abs(value) >= threshold else 0.0 for value in tau]


def trim_exactly(tau: list[float], density: float) -> list[float]:
    by_magnitude = sorted(range(len(tau)), key=lambda i: (-abs(tau[i]), i))
    kept = set(by_magnitude[: max(int(len(tau) * density), 1)])
    return [value if i in kept else 0.0 for i, value in enumerate(tau)]


def elect_and_merge(trimmed: list[list[float]], zero_counts_as: int | None) -> list[float]:
    signs = [sign(sum(column)) for column in zip(*trimmed, strict=True)]
    replacement = sign(sum(signs)) if zero_counts_as is None else zero_counts_as
    signs = [s or replacement for s in signs]
    merged = []
    for elected, column in zip(signs, zip(*trimmed, strict=True), strict=True):
        # The original keeps `> 0` where the sign is positive and `< 0` everywhere else.
        agreeing = [value for value in column if (value > 0 if elected > 0 else value < 0)]
        merged.append(sum(agreeing) / max(len(agreeing), 1))
    return merged


def slow_ties(base: Tensors, models: dict[str, Tensors], density: float, scale: float, trim: str) -> Tensors:
    groups = [list(SHAPES)] if trim == "global" else [[name] for name in SHAPES]
    merged: Tensors = {}
    for group in groups:
        part = {name: base[name] for name in group}
        taus = [flat_task_vector(part, model) for model in models.values()]
        if trim == "global":
            tau = elect_and_merge([trim_original(t, density) for t in taus], None)
        else:
            tau = elect_and_merge([trim_exactly(t, density) for t in taus], 1)
        for name in group:
            head, tau = tau[: base[name].size], tau[base[name].size :]
            merged[name] = base[name] + scale * np.array(head, np.float32).reshape(base[name].shape)
    return merged


@some
@given(tensors(COARSE), experts(COARSE), densities, st.floats(0, 2), st.sampled_from(["global", "tensor"]))
def test_against_the_slow_one_with_many_equal_magnitudes(
    base: Tensors, models: dict[str, Tensors], density: float, scale: float, trim: str
) -> None:
    merged = merge_state_dicts(base, models, "ties", density=density, scale=scale, trim=trim)
    assert_close(merged, slow_ties(base, models, density, scale, trim))


@some
@given(experts(FINE, minimum=2), densities, st.sampled_from(["global", "tensor"]))
def test_against_the_slow_one_with_any_values(models: dict[str, Tensors], density: float, trim: str) -> None:
    # A base of zeros keeps task vectors exact, so that no rounding of a sum decides a sign.
    base = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    models = {expert: {n: np.round(a * 8) / 8 for n, a in model.items()} for expert, model in models.items()}
    merged = merge_state_dicts(base, models, "ties", density=density, trim=trim)
    assert_close(merged, slow_ties(base, models, density, 1.0, trim))


@given(st.integers(1, 40), densities, st.randoms())
@some
def test_how_many_entries_stay(size: int, density: float, random: object) -> None:
    magnitudes = np.arange(1, size + 1, dtype=np.float32)
    random.shuffle(magnitudes)  # type: ignore[attr-defined]
    base = {"w": np.zeros(size, np.float32)}
    models = {"a": {"w": magnitudes}}
    kept = {
        trim: int(np.count_nonzero(merge_state_dicts(base, models, "ties", density=density, trim=trim)["w"]))
        for trim in ("global", "tensor")
    }
    assert kept == {"global": min(int(size * density) + 1, size), "tensor": max(int(size * density), 1)}


def test_ties_at_the_threshold_all_stay() -> None:
    base = {"w": np.zeros(6, np.float32), "v": np.zeros(2, np.float32)}
    models = {"a": {"w": np.array([1, -1, 1, 0.5, 2, 0.1], np.float32), "v": np.array([-1, 0], np.float32)}}
    statistics = Ties(density=0.25).prepare(TaskVectorStream(base, models))
    assert statistics is not None and statistics.thresholds == {"a": 1.0}
    merged = merge_state_dicts(base, models, "ties", density=0.25)
    np.testing.assert_array_equal(merged["w"], [1, -1, 1, 0, 2, 0])
    np.testing.assert_array_equal(merged["v"], [-1, 0])


@pytest.mark.parametrize(("others", "expected"), [([1.0, 1.0], 3.0), ([-1.0, -1.0], -3.0), ([1.0, -1.0], -3.0)])
def test_a_zero_sum_takes_the_sign_of_the_majority_in_all_tensors(others: list[float], expected: float) -> None:
    base = {"w": np.zeros(1, np.float32), "v": np.zeros(2, np.float32)}
    v = np.array(others, np.float32)
    models = {"a": {"w": np.full(1, 3, np.float32), "v": v}, "b": {"w": np.full(1, -3, np.float32), "v": v}}
    assert merge_state_dicts(base, models, "ties", density=1.0)["w"] == expected
    assert merge_state_dicts(base, models, "ties", density=1.0, trim="tensor")["w"] == 3.0
