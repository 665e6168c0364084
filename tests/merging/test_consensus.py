"""MagMax, TALL-masks, consensus and EMR against slow implementations, one Python float at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simomerge.core.errors import InputError
from simomerge.merging import get_method, merge_state_dicts
from simomerge.merging.consensus import elect, tall_mask

from .models import COARSE, Tensors, assert_close, assert_same, experts, merge_slowly, ten_times_apart, tensors

pytestmark = pytest.mark.filterwarnings("ignore:The task vector of")
few = settings(max_examples=25, deadline=None)
VARIANTS = [("magmax", {}), ("tall-mask", {}), ("consensus", {}), ("emr", {})]
VARIANTS += [("tall-mask", {"task": "depth"}), ("emr", {"task": "depth"}), ("consensus", {"k": 1})]


def magmax_slowly(name: str, taus: dict[str, list[float]]) -> list[float]:
    return [max(column, key=lambda value: (abs(value), value)) for column in zip(*taus.values(), strict=True)]


def masks_slowly(taus: dict[str, list[float]], thresholds: dict[str, float]) -> tuple[list[float], dict]:
    totals = [sum(column) for column in zip(*taus.values(), strict=True)]
    masks = {
        expert: [abs(v) > thresholds[expert] * abs(total - v) for v, total in zip(tau, totals, strict=True)]
        for expert, tau in taus.items()
    }
    return totals, masks


def elect_slowly(taus: dict[str, list[float]]) -> list[float]:
    unified = []
    for column in zip(*taus.values(), strict=True):
        total = sum(column)
        sign = (total > 0) - (total < 0)
        unified.append(sign * max([abs(value) for value in column if value * sign > 0], default=0.0))
    return unified


def mask_and_rescale_slowly(base: Tensors, models: dict[str, Tensors], task: str, scale: float) -> Tensors:
    """EMR's encoder of one expert: its factor comes from all tensors together."""
    sums = {"expert": 0.0, "masked": 0.0}

    def masked(name: str, taus: dict[str, list[float]]) -> list[float]:
        kept = [u if u * v > 0 else 0.0 for u, v in zip(elect_slowly(taus), taus[task], strict=True)]
        sums["expert"] += sum(abs(value) for value in taus[task])
        sums["masked"] += sum(abs(value) for value in kept)
        return kept

    merge_slowly(base, models, masked)
    factor = scale * sums["expert"] / sums["masked"]
    return merge_slowly(base, models, lambda name, taus: [factor * value for value in masked(name, taus)])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_magmax_against_the_slow_one(count: int) -> None:
    base, models = ten_times_apart(count, count)
    assert_same(merge_state_dicts(base, models, "magmax"), merge_slowly(base, models, magmax_slowly))


@few
@given(tensors(COARSE), experts(COARSE), st.permutations(["p", "q", "r"]))
def test_magmax_does_not_depend_on_names(base: Tensors, models: dict[str, Tensors], names: list[str]) -> None:
    expected = merge_slowly(base, models, magmax_slowly)
    renamed = dict(zip(names, models.values(), strict=False))
    assert_close(merge_state_dicts(base, renamed, "magmax"), expected, 0)


@pytest.mark.parametrize("threshold", [0.2, 0.4, 1.5, {"seg": 0.2, "depth": 0.4, "normals": 0.6}])
@pytest.mark.parametrize("task", ["", "depth", "seg"])
def test_masks_against_the_slow_ones(threshold: float | dict[str, float], task: str) -> None:
    base, models = ten_times_apart(5)
    thresholds = threshold if isinstance(threshold, dict) else dict.fromkeys(models, threshold)

    def voted(taus: dict[str, list[float]], wanted: list[str], k: int) -> list[float]:
        totals, masks = masks_slowly(taus, thresholds)
        votes = [sum(column) for column in zip(*(masks[e] for e in wanted), strict=True)]
        return [total if vote >= k else 0.0 for total, vote in zip(totals, votes, strict=True)]

    wanted = [task] if task else list(models)
    expected = merge_slowly(base, models, lambda name, taus: [0.5 * v for v in voted(taus, wanted, 1)])
    merged = merge_state_dicts(base, models, "tall-mask", threshold=threshold, task=task, scale=0.5)
    assert_same(merged, expected)
    for k in (1, 2, 3):
        expected = merge_slowly(base, models, lambda name, taus, k=k: [0.3 * v for v in voted(taus, list(models), k)])
        assert_same(merge_state_dicts(base, models, "consensus", threshold=threshold, k=k, scale=0.3), expected)


def test_emr_against_the_slow_one() -> None:
    base, models = ten_times_apart(6)
    unified = merge_slowly(base, models, lambda name, taus: [0.5 * value for value in elect_slowly(taus)])
    assert_same(merge_state_dicts(base, models, "emr", scale=0.5), unified)
    for task in models:
        expected = mask_and_rescale_slowly(base, models, task, 0.9)
        assert_same(merge_state_dicts(base, models, "emr", task=task, scale=0.9), expected)


@few
@given(experts(COARSE, minimum=2))
def test_emr_where_sums_cancel(models: dict[str, Tensors]) -> None:
    base = {name: np.zeros_like(values) for name, values in models["depth"].items()}
    merged = merge_state_dicts(base, models, "emr")
    assert_close(merged, merge_slowly(base, models, lambda name, taus: elect_slowly(taus)), 0)


def test_emr_keeps_the_norm_of_the_expert_over_the_whole_encoder() -> None:
    base, models = ten_times_apart(7)
    base = {name: np.zeros_like(values) for name, values in base.items()}
    for task, expert in models.items():
        merged = merge_state_dicts(base, models, "emr", task=task)
        norm = sum(np.abs(values).sum(dtype=np.float64) for values in merged.values())
        assert norm == pytest.approx(sum(np.abs(values).sum(dtype=np.float64) for values in expert.values()), rel=1e-6)
        assert all((merged[n] * expert[n] >= 0).all() for n in merged)


def test_emr_of_an_expert_without_a_say() -> None:
    base = {"w": np.zeros(2, np.float32)}
    models = {"a": {"w": np.float32([1, 1])}, "b": {"w": np.float32([-3, -3])}, "c": {"w": np.float32([0, 0])}}
    for task in ("a", "c"):
        assert_close(merge_state_dicts(base, models, "emr", task=task), base, 0)
    assert_close(merge_state_dicts(base, models, "emr", task="b"), models["b"], 0)


def test_tiny_task_vectors_agree_too() -> None:
    # Their product would underflow to zero.
    base = {"w": np.zeros(2, np.float32)}
    models = {"a": {"w": np.float32([1e-30, 2e-30])}, "b": {"w": np.float32([3e-30, 1e-30])}}
    merged = merge_state_dicts(base, models, "emr", task="a")
    np.testing.assert_allclose(merged["w"], np.float32([3e-30, 2e-30]) * 0.6, rtol=1e-6)


def test_how_many_must_agree() -> None:
    base, models = ten_times_apart(9)
    union = merge_state_dicts(base, models, "tall-mask", scale=0.4)
    assert_close(merge_state_dicts(base, models, "consensus", k=1), union, 0)
    assert_same(
        merge_state_dicts(base, models, "consensus", k=4), merge_state_dicts(base, models, "consensus", k=len(models))
    )
    nearly_all = merge_state_dicts(base, models, "consensus", k=3, threshold=1e-9)
    assert_same(nearly_all, merge_state_dicts(base, models, "task-arithmetic", scale=0.4))


def test_one_expert_needs_all_of_its_entries() -> None:
    base, models = ten_times_apart(9)
    one = {"a": next(iter(models.values()))}
    expected = merge_state_dicts(base, one, "task-arithmetic", scale=0.4)
    assert_same(merge_state_dicts(base, one, "consensus"), expected)


def test_the_mask_is_strict() -> None:
    tau, tau_mtl = np.float32([0, 0, 1, 1, -1]), np.float32([0, 1, 3, 2.9, 0.5])
    np.testing.assert_array_equal(tall_mask(tau, tau_mtl, 0.5), [False, False, False, True, True])


def test_nothing_is_elected_where_the_sum_is_zero() -> None:
    np.testing.assert_array_equal(elect(iter(np.float32([[3, 2], [-3, -1]]))), [0, 2])


@pytest.mark.parametrize("name", ["tall-mask", "emr"])
def test_an_unknown_task(name: str) -> None:
    base, models = ten_times_apart(0)
    with pytest.raises(InputError, match=f"{name}: task is 'dept', but the experts are seg, depth, normals"):
        merge_state_dicts(base, models, name, task="dept")
    with pytest.raises(InputError, match="task must be"):
        get_method(name, task=1)


def test_bad_parameters() -> None:
    for threshold in (0.0, {"a": -1.0}, [0.4, 0.0]):
        with pytest.raises(InputError, match="threshold must be a number above 0"):
            get_method("consensus", threshold=threshold)
    for k in (0, 1.5):
        with pytest.raises(InputError, match="k must be a number at least 1"):
            get_method("consensus", k=k)
    base, models = ten_times_apart(0)
    with pytest.raises(InputError, match="threshold has 2 values for 3 experts"):
        merge_state_dicts(base, models, "tall-mask", threshold=[0.2, 0.3])
