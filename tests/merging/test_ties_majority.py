"""TIES where kept values cancel exactly: the majority sign of all entries decides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simomerge.merging import TaskVectorStream, Ties, merge_state_dicts
from simomerge.merging.engine import stream

from .models import COARSE, SHAPES, Tensors, assert_close, experts, tensors
from .test_ties import elect_and_merge, flat_task_vector, sign, trim_original

pytestmark = pytest.mark.filterwarnings("ignore:The task vector of")
some = settings(max_examples=25, deadline=None)
threads = pytest.mark.parametrize("threads", [1, 2, 5])


def opposite(majority: list[float], size: int = 5, value: float = 3.0) -> tuple[Tensors, dict[str, Tensors]]:
    """Two experts that cancel in all of "w", and agree elsewhere with the signs of ``majority``."""
    base = {"w": np.ones(size, np.float32), "v": np.ones(len(majority), np.float32)}
    w, v = np.full(size, value, np.float32), np.array(majority, np.float32)
    return base, {"a": {"w": base["w"] + w, "v": base["v"] + v}, "b": {"w": base["w"] - w, "v": base["v"] + v}}


def merged_task_vector(base: Tensors, models: dict[str, Tensors], **options: object) -> Tensors:
    merged = merge_state_dicts(base, models, "ties", **options)  # type: ignore[arg-type]
    return {name: merged[name] - base[name] for name in base}


@threads
@pytest.mark.parametrize(
    ("majority", "elected"),
    [
        ([1, 1, -1], 1),
        ([-1, -1, 1], -1),
        ([1, -1], -1),  # A tie elects minus, because the reference code's sign(0) is not above 0.
        ([0, 0], -1),
        ([], -1),
        ([0.25, 0.25, -100], 1),  # counted, not summed
        ([-0.25, -0.25, 100], -1),
    ],
)
def test_the_majority_decides_in_both_directions(majority: list[float], elected: int, threads: int) -> None:
    base, models = opposite(majority)
    tau = merged_task_vector(base, models, density=1.0, threads=threads)
    np.testing.assert_array_equal(tau["w"], np.full(5, 3.0 * elected))
    np.testing.assert_array_equal(tau["v"], majority)


@threads
def test_entries_that_cancel_have_no_vote_and_trimmed_ones_neither(threads: int) -> None:
    base = {name: np.zeros(size, np.float32) for name, size in (("w", 2), ("small", 6), ("v", 3))}
    # The six small positive entries are trimmed away: of those that stay, minus has the majority.
    v, small = np.array([2, -2, -2], np.float32), np.full(6, 0.5, np.float32)
    models = {
        "a": {"w": np.array([4, -4], np.float32), "small": small, "v": v},
        "b": {"w": np.array([-4, 4], np.float32), "small": small, "v": v},
    }
    tau = merged_task_vector(base, models, density=0.4, threads=threads)
    assert {name: array.tolist() for name, array in tau.items()} == {"w": [-4, -4], "small": [0] * 6, "v": [2, -2, -2]}
    tau = merged_task_vector(base, models, density=1.0, threads=threads)
    assert {name: array.tolist() for name, array in tau.items()} == {"w": [4, 4], "small": [0.5] * 6, "v": [2, -2, -2]}


@threads
@pytest.mark.parametrize(("majority", "expected"), [([1.0, 1.0], 1.5), ([-1.0, -1.0], -3.0)])
def test_three_experts_that_cancel(majority: list[float], expected: float, threads: int) -> None:
    base = {"w": np.zeros(1, np.float32), "v": np.zeros(2, np.float32)}
    v = np.array(majority, np.float32)
    models = {e: {"w": np.full(1, w, np.float32), "v": v} for e, w in (("a", 1.0), ("b", -3.0), ("c", 2.0))}
    # The mean of those that have the sign: (1 + 2) / 2, or the one of -3.
    assert merged_task_vector(base, models, density=1.0, threads=threads)["w"] == expected


def slow_ties(base: Tensors, models: dict[str, Tensors], density: float) -> Tensors:
    trimmed = [trim_original(flat_task_vector(base, model), density) for model in models.values()]
    tau = np.array(elect_and_merge(trimmed, None), np.float32)
    merged = {}
    for name, values in base.items():
        merged[name], tau = values + tau[: values.size].reshape(values.shape), tau[values.size :]
    return merged


@some
@given(experts(COARSE, minimum=2), st.sampled_from([0.3, 0.6, 1.0]), st.sampled_from([1, 2, 5]), st.booleans())
def test_against_the_slow_one(models: dict[str, Tensors], density: float, threads: int, split: bool) -> None:
    base = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    # An expert and its mirror image: everything that both keep cancels, the third one decides.
    first, *others = models
    models[others[0]] = {name: -array for name, array in models[first].items()}
    expected = slow_ties(base, models, density)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "BLOCK", 2 if split else 1 << 16)
        assert_close(merge_state_dicts(base, models, "ties", density=density, threads=threads), expected, 1e-6)


@threads
@pytest.mark.parametrize("block", [7, 1 << 16])
def test_a_larger_encoder_against_the_slow_one(threads: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK", block)
    rng = np.random.default_rng(threads)
    base = {f"t{i}": np.zeros((3, 20 + i), np.float32) for i in range(30)}
    values = [-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]
    models = {e: {n: rng.choice(values, a.shape).astype(np.float32) for n, a in base.items()} for e in "abcd"}
    for density in (0.2, 0.5, 1.0):
        merged = merge_state_dicts(base, models, "ties", density=density, threads=threads)
        assert_close(merged, slow_ties(base, models, density), 1e-6)


def test_trimming_by_tensor_elects_plus_whatever_the_majority() -> None:
    for majority in ([1, 1, -1], [-1, -1, 1], []):
        base, models = opposite([float(value) for value in majority])
        assert (merged_task_vector(base, models, density=1.0, trim="tensor")["w"] == 3).all()


def test_nearly_cancelling_values_elect_their_own_sign() -> None:
    """The sum is compared with zero exactly, however small it is relative to its terms."""
    base = {"w": np.zeros(2, np.float32), "v": np.zeros(2, np.float32)}
    above = np.nextafter(np.float32(3), np.float32(4))
    models = {
        "a": {"w": np.array([above, 3], np.float32), "v": np.ones(2, np.float32)},
        "b": {"w": np.array([-3, -above], np.float32), "v": np.ones(2, np.float32)},
    }
    np.testing.assert_array_equal(merge_state_dicts(base, models, "ties", density=1.0)["w"], [above, -above])


# Thresholds ---------------------------------------------------------------------------------------------


def thresholds(values: list[float], density: float) -> float:
    base = {"w": np.zeros(len(values), np.float32)}
    found = Ties(density=density).prepare(TaskVectorStream(base, {"a": {"w": np.array(values, np.float32)}}))
    assert found is not None
    return found.thresholds["a"]


@pytest.mark.parametrize(
    ("density", "threshold", "kept"),
    [
        (1.0, 0.0, 10),  # rank 0: nothing is below
        (0.95, 0.0, 10),  # int(9.5) + 1 = 10 entries reach the smallest, which is a zero
        (0.9, 0.0, 10),
        (0.5, 1.0, 8),  # int(5) + 1 = 6 are asked for; all that tie with the sixth stay
        (0.3, 1.0, 8),
        (0.2, 1.0, 8),
        (0.1, 2.0, 2),  # int(1) + 1
        (0.01, 3.0, 1),
    ],
)
def test_what_ties_with_the_threshold_stays(density: float, threshold: float, kept: int) -> None:
    values = [0.0, 1.0, -1.0, 1.0, -1.0, 2.0, 1.0, -3.0, 0.0, 1.0]
    assert thresholds(values, density) == threshold
    magnitudes = sorted(map(abs, values))
    assert threshold == (magnitudes[10 - int(10 * density) - 1] if density < 1 else 0)
    assert sum(abs(value) >= threshold for value in values) == kept
    base = {"w": np.zeros(10, np.float32)}
    merged = merge_state_dicts(base, {"a": {"w": np.array(values, np.float32)}}, "ties", density=density)["w"]
    np.testing.assert_array_equal(merged, [value if abs(value) >= threshold else 0 for value in values])


@some
@given(tensors(COARSE), tensors(COARSE))
def test_density_one_keeps_everything(base: Tensors, expert: Tensors) -> None:
    assert_close(merge_state_dicts(base, {"a": expert}, "ties", density=1.0), expert, 0)


@some
@given(tensors(COARSE), experts(COARSE))
def test_at_density_one_other_tensors_matter_only_where_sums_cancel(base: Tensors, models: dict[str, Tensors]) -> None:
    together = merge_state_dicts(base, models, "ties", density=1.0)
    for name in base:
        alone = {expert: {name: model[name]} for expert, model in models.items()}
        merged = merge_state_dicts({name: base[name]}, alone, "ties", density=1.0)
        decided = np.sum([model[name] - base[name] for model in models.values()], axis=0) != 0
        np.testing.assert_array_equal(merged[name][decided], together[name][decided])


def test_each_expert_has_its_own_threshold() -> None:
    base = {"w": np.zeros(100, np.float32)}
    ramp = np.arange(1, 101, dtype=np.float32)
    models = {"small": {"w": ramp / 1024}, "large": {"w": -8 * ramp}}
    found = Ties(density=0.2).prepare(TaskVectorStream(base, models))
    assert found is not None and found.thresholds == {"small": 80 / 1024, "large": 640.0}
    merged = merge_state_dicts(base, models, "ties", density=0.2)["w"]
    assert [sign(float(value)) for value in merged] == [0] * 79 + [-1] * 21


def test_an_encoder_without_floats_and_empty_tensors() -> None:
    counters = {"steps": np.array([1, 2])}
    assert merge_state_dicts(counters, {"a": {"steps": np.array([3, 4])}}, "ties")["steps"].tolist() == [1, 2]
    base = {"w": np.zeros((0, 3), np.float32)}
    assert merge_state_dicts(base, {"a": {"w": np.zeros((0, 3))}}, "ties")["w"].shape == (0, 3)
