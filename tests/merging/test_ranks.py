"""Exact order statistics without sorting, against np.sort of everything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from simomerge.merging import TaskVectorStream
from simomerge.merging.engine import ranks, stream
from simomerge.merging.engine.ranks import kth_smallest, sample_of, sampled_distances

from .models import COARSE, FINE, Tensors

some = settings(max_examples=60, deadline=None)
Taus = Mapping[str, np.ndarray]


def magnitudes(task_vectors: Taus) -> dict[str, np.ndarray]:
    return {expert: np.abs(tau) for expert, tau in task_vectors.items()}


def as_they_are(task_vectors: Taus) -> Taus:
    return task_vectors


def opened(models: Mapping[str, Tensors], threads: int = 1) -> TaskVectorStream:
    """Experts whose task vectors are the given arrays."""
    first = next(iter(models.values()))
    return TaskVectorStream({name: np.zeros(array.shape) for name, array in first.items()}, models, threads)


def flat(model: Tensors) -> np.ndarray:
    return np.concatenate([array.reshape(-1) for array in model.values()])


def sorted_values(model: Tensors, wanted: Sequence[int], absolute: bool = True) -> list[float]:
    values = flat(model)
    ordered = np.sort(np.abs(values) if absolute else values)
    return [float(ordered[rank - 1]) for rank in wanted]


def split(values: np.ndarray, parts: int, seed: int = 0) -> Tensors:
    """The values as tensors of unequal sizes, one of them a matrix."""
    cuts = np.sort(np.random.default_rng(seed).integers(0, len(values), parts - 1))
    tensors = {f"t{i}": part for i, part in enumerate(np.split(values.astype(np.float32), cuts))}
    return {name: array.reshape(2, -1) if len(array) % 2 == 0 else array for name, array in tensors.items()}


@pytest.fixture
def misses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Brackets without a margin from ten samples. The list grows by one with every full pass."""
    passes: list[int] = []
    full_pass = ranks._pass

    def counted(*arguments: object) -> None:
        passes.append(1)
        full_pass(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ranks, "_MARGIN", 0.0)
    monkeypatch.setattr(ranks, "_SAMPLE", 10)
    monkeypatch.setattr(ranks, "_pass", counted)
    yield passes


SIZE = 20_000
KINDS = {
    "normal": lambda rng: rng.standard_normal(SIZE),
    "quantised": lambda rng: np.round(rng.standard_normal(SIZE), 1),
    "60 % zeros": lambda rng: rng.standard_normal(SIZE) * (rng.random(SIZE) < 0.4),
    "all equal": lambda rng: np.full(SIZE, -0.75),
    "all zero": lambda rng: np.zeros(SIZE),
    "two values": lambda rng: rng.choice([0.25, -1.0], SIZE),
    "heavy tails": lambda rng: rng.standard_cauchy(SIZE) ** 3,
    "sorted": lambda rng: np.sort(rng.standard_normal(SIZE)),
    "tiny": lambda rng: 1e-38 * rng.standard_normal(SIZE),
    "subnormal": lambda rng: 1e-44 * rng.integers(-9, 9, SIZE),
    "one differs": lambda rng: np.eye(1, SIZE, 77)[0],
}
RANKS = [1, 2, SIZE // 2, int(0.8 * SIZE), int(0.8 * SIZE) + 1, SIZE - 1, SIZE]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [1 << 16, 999])
def test_against_a_full_sort(kind: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK", block)
    models = {e: split(KINDS[kind](np.random.default_rng(seed)), 7) for seed, e in enumerate("ba")}
    for absolute, values in ((True, magnitudes), (False, as_they_are)):
        found = kth_smallest(opened(models), values, {"a": RANKS, "b": [SIZE // 3]})
        expected = {"a": sorted_values(models["a"], RANKS, absolute)}
        assert found == {**expected, "b": sorted_values(models["b"], [SIZE // 3], absolute)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [10, 50, SIZE])
def test_a_bracket_that_misses_is_widened(
    kind: str, samples: int, misses: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_SAMPLE", samples)
    model = split(KINDS[kind](np.random.default_rng(3)), 5)
    wanted = [*RANKS, *range(1, SIZE, SIZE // 9)]
    found = kth_smallest(opened({"a": model}), magnitudes, {"a": wanted})
    assert found == {"a": sorted_values(model, wanted)}
    assert len(misses) <= 3


def test_brackets_did_miss(misses: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the test above tests something: a negative margin, and samples of the small tensor only."""
    monkeypatch.setattr(ranks, "_MARGIN", -8.0)
    rng = np.random.default_rng(0)
    model = {"small": rng.standard_normal(5).astype(np.float32), "large": 9 + rng.random(SIZE).astype(np.float32)}
    wanted = [1, 3, 6, 100, SIZE // 2, SIZE, SIZE + 5]
    assert kth_smallest(opened({"a": model}), magnitudes, {"a": wanted}) == {"a": sorted_values(model, wanted)}
    assert len(misses) >= 2


def test_a_good_bracket_needs_one_pass_and_collects_little(misses: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_MARGIN", 8.0)
    monkeypatch.setattr(ranks, "_SAMPLE", 10_000)
    collected = []
    look = ranks._Bracket.look

    def counted(self: ranks._Bracket, values: np.ndarray) -> tuple[int, int, int, np.ndarray]:
        found = look(self, values)
        collected.append(found[3].size)
        return found

    monkeypatch.setattr(ranks._Bracket, "look", counted)
    for values in (KINDS["normal"], KINDS["60 % zeros"], KINDS["two values"]):
        big = np.concatenate([values(np.random.default_rng(seed)) for seed in range(20)])
        model = {"w": big.astype(np.float32)}
        rank = int(0.5 * len(big))
        assert kth_smallest(opened({"a": model}), magnitudes, {"a": [rank]}) == {"a": sorted_values(model, [rank])}
    assert len(misses) == 3
    assert sum(collected) < 0.15 * 3 * len(big)


@pytest.mark.parametrize("size", range(1, 12))
def test_every_rank_of_small_encoders(size: int, misses: list[int]) -> None:
    rng = np.random.default_rng(size)
    for values in (rng.standard_normal(size), rng.integers(-1, 2, size)):
        model = {"w": values[: size // 2].astype(np.float32), "v": values[size // 2 :].astype(np.float32)}
        every = list(range(1, size + 1))
        for absolute, ranked in ((True, magnitudes), (False, as_they_are)):
            assert kth_smallest(opened({"a": model}), ranked, {"a": every})["a"] == sorted_values(
                model, every, absolute
            )


@some
@given(
    st.lists(hnp.arrays(np.float32, st.integers(0, 30), elements=st.one_of(COARSE, FINE)), min_size=1, max_size=4),
    st.booleans(),
    st.data(),
)
def test_any_values(parts: list[np.ndarray], narrow: bool, data: st.DataObject) -> None:
    model = {f"t{i}": part for i, part in enumerate(parts)}
    total = sum(part.size for part in parts)
    if not total:
        return
    wanted = data.draw(st.lists(st.integers(1, total), min_size=1, max_size=4))
    with pytest.MonkeyPatch.context() as patch:
        if narrow:
            patch.setattr(ranks, "_MARGIN", 0.0)
            patch.setattr(ranks, "_SAMPLE", 3)
        patch.setattr(stream, "BLOCK", data.draw(st.sampled_from([1, 7, 1 << 16])))
        found = kth_smallest(opened({"a": model}), as_they_are, {"a": wanted})
    assert found == {"a": sorted_values(model, wanted, absolute=False)}


def test_values_of_one_expert_may_depend_on_the_others() -> None:
    rng = np.random.default_rng(0)
    models = {expert: split(rng.standard_normal(5000), 4) for expert in "abc"}
    total = np.sum([flat(model) for model in models.values()], axis=0, dtype=np.float32)

    def products(task_vectors: Taus) -> dict[str, np.ndarray]:
        summed = task_vectors["a"] + task_vectors["b"] + task_vectors["c"]
        return {expert: tau * summed for expert, tau in task_vectors.items()}

    wanted = {expert: [1, 2500, 5000] for expert in "abc"}
    found = kth_smallest(opened(models, threads=2), products, wanted)
    for expert, model in models.items():
        ordered = np.sort(flat(model) * total)
        np.testing.assert_allclose(found[expert], ordered[[0, 2499, 4999]], rtol=1e-5, atol=1e-6)


def test_threads_and_the_order_and_repetition_of_ranks_change_nothing() -> None:
    models = {e: split(KINDS["normal"](np.random.default_rng(seed)), 9) for seed, e in enumerate("ab")}
    wanted = [SIZE, 1, 500, 1, SIZE]
    for threads in (1, 2, 5):
        found = kth_smallest(opened(models, threads), magnitudes, {"b": wanted, "a": wanted})
        assert list(found) == ["b", "a"]
        assert found == {e: sorted_values(models[e], wanted) for e in "ba"}


def test_the_value_is_exact_in_float32() -> None:
    model = split(KINDS["normal"](np.random.default_rng(5)), 3)
    (found,) = kth_smallest(opened({"a": model}), magnitudes, {"a": [777]})["a"]
    assert type(found) is float and float(np.float32(found)) == found
    assert np.count_nonzero(np.abs(flat(model)) < np.float32(found)) == 776


def test_no_ranks_and_impossible_ranks() -> None:
    model = {"w": np.ones(4, np.float32)}
    assert kth_smallest(opened({"a": model}), magnitudes, {}) == {}
    assert kth_smallest(opened({"a": model}), magnitudes, {"a": []}) == {"a": []}
    for rank in (0, -1, 5):
        with pytest.raises(ValueError, match=f"rank {rank} of 4 entries"):
            kth_smallest(opened({"a": model}), magnitudes, {"a": [rank]})


@pytest.mark.parametrize("total", [1, 999_999, 1_000_000, 1_999_999, 2_000_000, 4_100_000, 86_600_000, 304_000_000])
def test_a_sample_shares_no_factor_with_the_width_of_an_encoder(total: int) -> None:
    step = sample_of(total).step
    assert sample_of(total) == slice(0, None, step) and (step == 1 or (step % 2 and step % 3))
    assert max(total // ranks._SAMPLE, 1) <= step <= max(total // ranks._SAMPLE, 1) + 4
    assert all(np.gcd(step, width) == 1 for width in (384, 768, 1024, 1536, 3072, 4096))


# Distances ----------------------------------------------------------------------------------------------


def test_distances_of_small_encoders_are_exact_and_those_of_large_ones_near() -> None:
    rng = np.random.default_rng(0)
    base = {"w": rng.standard_normal((300, 100)), "b": rng.standard_normal(7), "scalar": np.array(3.0), "n": np.ones(2)}
    base = {name: array.astype(np.float32) for name, array in base.items()} | {"steps": np.array([9])}
    models = {
        expert: {n: a + np.float32(size) * rng.standard_normal(a.shape).astype(np.float32) for n, a in base.items()}
        for expert, size in (("seg", 1e-3), ("depth", 2.0))
    } | {"still": dict(base)}
    for model in models.values():
        model["steps"] = np.array([10])
    expected = {}
    for expert, model in models.items():
        squares = [
            (np.square(model[n] - base[n], dtype=np.float64).sum(), np.square(base[n], dtype=np.float64).sum())
            for n in base
            if n != "steps"
        ]
        expected[expert] = float(np.sqrt(sum(s[0] for s in squares) / sum(s[1] for s in squares)))
    found = sampled_distances(TaskVectorStream(base, models), 30_000)
    assert found == pytest.approx(expected, rel=1e-5) and found["still"] == 0
    sampled = sampled_distances(TaskVectorStream(base, models))
    assert sampled == pytest.approx(expected, rel=0.1) and sampled != found


def test_distances_see_what_changed_only_at_the_end() -> None:
    """A fused qkv with other keys and values: its first rows are the queries."""
    rng = np.random.default_rng(0)
    base = {"qkv": rng.standard_normal((3 * 128, 128)).astype(np.float32)}
    other = {"qkv": base["qkv"].copy()}
    other["qkv"][128:] = rng.standard_normal((256, 128))
    true = np.linalg.norm(other["qkv"] - base["qkv"]) / np.linalg.norm(base["qkv"])
    found = sampled_distances(TaskVectorStream(base, {"a": other}))
    assert found["a"] == pytest.approx(true, rel=0.15)


def test_tensors_count_by_their_size() -> None:
    """A small tensor that changed much is not half of a model."""
    base = {"small": np.ones(100, np.float32), "large": np.ones(100_000, np.float32)}
    other = {"small": np.full(100, 3, np.float32), "large": base["large"]}
    found = sampled_distances(TaskVectorStream(base, {"a": other}), 4096)
    assert found["a"] == pytest.approx(np.sqrt(400 / 100_100), rel=1e-3)


def test_distances_from_a_base_of_zeros_are_numbers() -> None:
    base = {"w": np.zeros(4, np.float32)}
    found = sampled_distances(TaskVectorStream(base, {"a": {"w": np.ones(4, np.float32)}, "b": dict(base)}))
    assert np.isfinite(found["a"]) and found["a"] > 1e6 and found["b"] == 0
