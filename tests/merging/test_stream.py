"""Task vectors on demand: whole tensors, parts and blocks; and work on threads in order."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from simomerge.checkpoints import open_checkpoint, write_safetensors
from simomerge.core.errors import InputError
from simomerge.core.parallel import available_cores, ordered_map
from simomerge.merging import TaskVectorStream
from simomerge.merging.engine import stream

from .models import Tensors

SHAPES = {"matrix": (7, 9), "bias": (5,), "scalar": (), "empty": (0, 3), "patch": (2, 3, 2, 2)}


def model(seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    drawn = {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}
    return drawn | {"steps": np.array([seed])}


BASE, MODELS = model(0), {"seg": model(1), "depth": model(2), "normals": model(3)}


class LowRank(Mapping[str, np.ndarray]):
    """An expert that computes its task vector of one tensor, and does not change the others."""

    def __init__(self, delta: np.ndarray, base: Tensors = BASE) -> None:
        self.delta, self.base, self.asked = delta, base, 0

    def task_vector(self, name: str) -> np.ndarray | None:
        self.asked += name == "matrix"
        return self.delta.copy() if name == "matrix" else None

    def __getitem__(self, name: str) -> np.ndarray:
        return BASE[name] + self.delta if name == "matrix" else BASE[name]

    def __iter__(self) -> Iterator[str]:
        return iter(BASE)

    def __len__(self) -> int:
        return len(BASE)


# Reading ------------------------------------------------------------------------------------------------


def test_float_tensors_and_sorted_experts() -> None:
    opened = TaskVectorStream(BASE, MODELS)
    assert opened.experts == ("depth", "normals", "seg") and opened.names == tuple(SHAPES)  # floats, in order
    assert opened.shapes == SHAPES
    assert opened.sizes == {name: BASE[name].size for name in SHAPES}


def test_whole_tensors() -> None:
    opened = TaskVectorStream(BASE, MODELS)
    for name in SHAPES:
        base, task_vectors = opened.read(name)
        assert list(task_vectors) == ["depth", "normals", "seg"]
        for expert, tau in task_vectors.items():
            assert tau.dtype == np.float32 and tau.ndim >= 1  # a number could not be written to
            np.testing.assert_array_equal(tau, np.atleast_1d(MODELS[expert][name] - BASE[name]))
            assert not any(np.shares_memory(tau, kept[name]) for kept in (BASE, *MODELS.values()))
        np.testing.assert_array_equal(base, np.atleast_1d(BASE[name]))


@pytest.mark.parametrize("block", [1, 4, 7, 1 << 20])
@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize("kind", ["arrays", "files", "torch"])
def test_blocks_make_up_the_tensor(
    block: int, reused: bool, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BLOCK", block)
    given: dict[str, Any] = {"base": BASE, **MODELS}
    if kind == "files":
        given = {n: open_checkpoint(write_safetensors(tmp_path / f"{n}.safetensors", t)) for n, t in given.items()}
    elif kind == "torch":
        given = {n: {key: torch.from_numpy(array) for key, array in t.items()} for n, t in given.items()}
    opened = TaskVectorStream(given.pop("base"), given)
    for name in SHAPES:
        starts = []
        found: dict[str, list[np.ndarray]] = {expert: [] for expert in ("base", *opened.experts)}
        for part, base, task_vectors in opened.read_blocks(name):
            starts.append(part.start)
            if not reused:
                base, task_vectors = opened.read(name, part)
            found["base"].append(base.copy())
            for expert, tau in task_vectors.items():
                assert tau.shape == base.shape == (part.stop - part.start,)
                found[expert].append(tau.copy())
                tau.fill(99)  # as a method may
        assert starts == list(range(0, opened.sizes[name], block))
        for expert, pieces in found.items():
            whole = BASE[name] if expert == "base" else MODELS[expert][name] - BASE[name]
            together = np.concatenate([np.empty(0, np.float32), *pieces])
            np.testing.assert_array_equal(together, whole.reshape(-1), err_msg=f"{name} {expert}")
    assert opened.changed == set(MODELS)


def test_a_strided_part_is_a_sample() -> None:
    opened = TaskVectorStream(BASE, MODELS)
    base, task_vectors = opened.read("matrix", slice(0, None, 5))
    np.testing.assert_array_equal(base, BASE["matrix"].reshape(-1)[::5])
    tau = (MODELS["seg"]["matrix"] - BASE["matrix"]).reshape(-1)[::5]
    np.testing.assert_array_equal(task_vectors["seg"], tau)


def test_low_rank_factors_give_their_own_task_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK", 10)
    delta = np.full((7, 9), 1e-9, np.float32)  # lost if it were added to the base and subtracted again
    small = LowRank(delta)
    opened = TaskVectorStream(BASE, {"seg": MODELS["seg"], "small": small})
    np.testing.assert_array_equal(opened.read("matrix")[1]["small"], delta)
    assert opened.read("bias")[1]["small"].tolist() == [0] * 5
    small.asked = 0
    ((part, base, task_vectors),) = opened.read_blocks("matrix")
    assert part == slice(0, 63)  # in one piece, or the factors would be multiplied for every block
    np.testing.assert_array_equal(task_vectors["small"], delta.reshape(-1))
    np.testing.assert_array_equal(task_vectors["seg"], MODELS["seg"]["matrix"].reshape(-1) - base)
    assert small.asked == 1
    assert opened.changed == {"seg", "small"}


def test_low_rank_factors_count_from_their_own_base_only() -> None:
    """Another reference (merging without a base, comparing two experts) is subtracted from the weights."""
    small = LowRank(np.full((7, 9), 0.5, np.float32))
    for reference in (MODELS["seg"], dict(BASE)):
        tau = TaskVectorStream(reference, {"small": small}).task_vector("small", "matrix")
        np.testing.assert_array_equal(tau, small["matrix"] - reference["matrix"])
    assert small.asked == 0


def test_experts_that_differ_from_the_base_are_noted() -> None:
    late = {**BASE, "patch": BASE["patch"] + np.float32(1e-3)}
    opened = TaskVectorStream(BASE, {"same": dict(BASE), "late": late})
    assert opened.changed == set()
    opened.read("matrix")
    assert opened.changed == set()
    opened.read("patch")
    assert opened.changed == {"late"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", [None, slice(0, 3)])
def test_values_that_are_not_finite(value: float, part: slice | None) -> None:
    bias = np.array([0, value, 0, 0, 0], np.float32)
    with pytest.raises(InputError, match="'bias' of the expert 'seg' holds NaN or infinite values"):
        TaskVectorStream(BASE, {**MODELS, "seg": {**BASE, "bias": bias}}).read("bias", part)
    with pytest.raises(InputError, match="'bias' of the base holds NaN or infinite values: the checkpoint is damaged"):
        TaskVectorStream({**BASE, "bias": bias}, MODELS).read("bias", part)
    TaskVectorStream({**BASE, "bias": bias}, MODELS).read("bias", slice(2, 5))  # what is not read is not looked at


def test_large_values_are_no_mistake_but_differences_that_overflow_are() -> None:
    big = {**BASE, "bias": np.full(5, 3e38, np.float32)}
    (tau,) = TaskVectorStream(BASE, {"a": big}).read("bias")[1].values()
    np.testing.assert_array_equal(tau, big["bias"] - BASE["bias"])
    with np.errstate(over="ignore"), pytest.raises(InputError, match="'bias' of the expert 'a' holds NaN or infinite"):
        TaskVectorStream({**BASE, "bias": -big["bias"]}, {"a": big}).read("bias")


# Rows of one array --------------------------------------------------------------------------------------


def test_stacked_rows_of_one_array_are_that_array() -> None:
    workspace = np.empty((3, 8), np.float32)
    workspace[:] = np.arange(24).reshape(3, 8)
    for size in (8, 5, 1):
        rows = [row[:size] for row in workspace]
        found = stream.stacked(rows)
        assert np.shares_memory(found, workspace)
        np.testing.assert_array_equal(found, np.stack(rows))


def test_other_arrays_are_copied() -> None:
    square = np.empty((3, 3), np.float32)
    square[:] = np.arange(9).reshape(3, 3)
    rows = list(square)
    for arrays in (
        [rows[1], rows[0], rows[2]],
        [rows[0], rows[0], rows[2]],
        [rows[0], rows[2], rows[1]],
        [square[:, 0], square[:, 1], square[:, 2]],  # columns
        [row[::-1] for row in rows],
        [row[1:] for row in rows],
        [row[::2] for row in rows],
        [rows[0], rows[1].copy(), rows[2]],
        rows[:2],
        [row.reshape(1, 3) for row in rows],
        [np.ones(2), np.zeros(2)],
        [np.ones((2, 2))],
    ):
        np.testing.assert_array_equal(stream.stacked(arrays), np.stack(arrays))


# Work on threads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [None, 1, 2, 7])
def test_results_come_in_order(threads: int | None) -> None:
    def slow(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        return item * item

    assert list(ordered_map(slow, range(30), threads)) == [item * item for item in range(30)]
    assert list(ordered_map(slow, [], threads)) == []


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_only_a_few_results_are_computed_ahead(threads: int) -> None:
    done: list[int] = []
    results = ordered_map(done.append, range(100), threads)
    for taken in range(1, 6):
        next(results)
        time.sleep(0.01)
        assert len(done) <= taken + threads + 1
    results.close()  # type: ignore[attr-defined]
    time.sleep(0.01)
    assert len(done) <= 5 + threads + 1 and threading.active_count() < 50


@pytest.mark.parametrize("threads", [1, 3])
def test_an_exception_comes_where_its_result_would_have(threads: int) -> None:
    def fails(item: int) -> int:
        if item in (4, 6):
            raise ValueError(f"item {item}")
        return item

    results = ordered_map(fails, range(10), threads)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="item 4"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_one_thread_is_the_caller_s() -> None:
    me = threading.get_ident()
    assert set(ordered_map(lambda _: threading.get_ident(), range(5), 1)) == {me}
    assert me not in set(ordered_map(lambda _: threading.get_ident(), range(5), 2))
    assert available_cores() >= 1


def blas_threads() -> set[int]:
    return {int(pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "blas"}


@pytest.mark.parametrize("threads", [1, 2])
def test_the_linear_algebra_library_has_one_thread_inside_and_its_own_after(threads: int) -> None:
    def fails(item: int) -> set[int]:
        if item == 2:
            raise ValueError("stop")
        return blas_threads()

    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        assert before == {2}
        assert set().union(*ordered_map(lambda _: blas_threads(), range(4), threads)) == {1}
        assert blas_threads() == before
        with pytest.raises(ValueError, match="stop"):
            list(ordered_map(fails, range(4), threads))
        assert blas_threads() == before
        outer, inner = (ordered_map(fails, [0, 0, 0], threads) for _ in range(2))
        next(outer), next(inner)
        inner.close()  # type: ignore[attr-defined]
        assert blas_threads() == {1}  # the outer one is not done
        list(outer)
        assert blas_threads() == before


def test_numpy_warns_again_after_a_tensor_and_only_then() -> None:
    opened = TaskVectorStream(BASE, MODELS, threads=1)
    for _name, total in opened.map(lambda name: float(np.float32(3e38) + np.float32(3e38))):
        assert total == np.inf
        with pytest.warns(RuntimeWarning, match="overflow"):
            np.float32(3e38) + np.float32(3e38)
