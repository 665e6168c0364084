"""Jobs in worker processes: results in order, original errors, no process left behind."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from simomerge.core.caution import Caution
from simomerge.core.errors import DivergedError, InputError
from simomerge.core.progress import show_progress
from simomerge.datasets.batches import training_batches
from simomerge.training import cluster
from simomerge.training.pool import Job, WorkerPool

from . import jobs


class Lines(list):
    """A progress sink that keeps its lines and can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.came = threading.Event()

    def __call__(self, *line: object) -> None:
        self.append(line)
        self.came.set()


LINES = Lines()


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with show_progress(LINES), WorkerPool(2) as running:
        yield running


def test_one_worker_is_this_process() -> None:
    lines = Lines()
    with show_progress(lines), WorkerPool(1) as alone:
        (found,) = alone.run([(jobs.process_and_threads, {})])
        assert found[0] == os.getpid()
        assert alone.run([(jobs.square, {"number": n}) for n in (3, 2)]) == [9, 4]
        with pytest.raises(InputError, match="lower the learning rate"):
            alone.run([(jobs.refuse, {})])
    assert lines == [("square 3", 1, 1, "done"), ("square 2", 1, 1, "done")]


def test_results_are_in_the_order_of_the_jobs_and_progress_is_forwarded(pool: WorkerPool) -> None:
    waits = [0.2, 0.0, 0.1, 0.0]  # the first to finish is not the first asked for
    results = pool.run([(jobs.square, {"number": n, "seconds": wait}) for n, wait in enumerate(waits)])
    assert results == [0, 1, 4, 9]
    deadline = time.monotonic() + 5
    while len(LINES) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(LINES) == [(f"square {n}", 1, 1, "done") for n in range(4)]


def test_warnings_of_jobs_become_warnings_of_this_process() -> None:
    """Also the last ones, and those of a job that fails. Filters of this process decide whether they are shown."""
    with pytest.warns(Caution) as found, WorkerPool(2) as pool:
        pool.run([(jobs.caution, {"text": text}) for text in ("one", "two")])
    assert {str(each.message) for each in found} == {"one", "two"}
    assert all(each.filename == __file__ for each in found)
    with pytest.warns(Caution, match="before the end"), pytest.raises(ValueError, match="end"), WorkerPool(2) as pool:
        pool.run([(jobs.caution, {"text": "before the end", "error": ValueError("end")})])
    with pytest.warns(UserWarning, match="^Strange: .*sight") as found, WorkerPool(2) as pool:
        pool.run([(jobs.caution, {"text": "sight", "category": jobs.Strange})])
    with pytest.warns(RuntimeWarning, match="division") as found, WorkerPool(2) as pool:
        pool.run([(jobs.caution, {"text": "division by zero", "category": RuntimeWarning})])
    assert found[0].filename == jobs.__file__  # as if the job had run here


def test_a_warning_that_is_an_error_here_does_not_hide_the_error_of_a_job() -> None:
    with warnings.catch_warnings(), WorkerPool(2) as pool:
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="in the end"):
            pool.run([(jobs.caution, {"text": "before", "error": InputError("in the end")})])
        with pytest.raises(Caution, match="alone"):
            pool.run([(jobs.caution, {"text": "alone"})])
        assert pool.run([(jobs.square, {"number": 2})]) == [4]


def test_workers_are_other_processes_of_one_thread(pool: WorkerPool) -> None:
    found = pool.run([(jobs.process_and_threads, {})] * 4)
    assert os.getpid() not in {process for process, _ in found}
    assert {threads for _, threads in found} == {1}


def test_errors_keep_their_type_and_the_pool_continues(pool: WorkerPool) -> None:
    with pytest.raises(InputError, match=r"^the loss is nan; lower the learning rate\.$"):
        pool.run([(jobs.square, {"number": 1}), (jobs.refuse, {})])
    with pytest.raises(KeyError, match="no such thing"):
        pool.run([(jobs.break_down, {})])
    assert pool.run([(jobs.square, {"number": 5})]) == [25]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_starts_when_those_it_waits_for_are_done(workers: int) -> None:
    waits = [0.3, 0.0, 0.0, 0.0]
    after = [(), (), (0,), (1, 2)]
    with WorkerPool(workers) as some:
        found = some.run([(jobs.timed, {"seconds": seconds}) for seconds in waits], after)
    for (start, _), needs in zip(found, after, strict=True):
        assert all(found[need][1] <= start for need in needs)
    assert workers > 1 or sorted(found) == found


def test_jobs_that_wait_for_each_other_are_an_error(pool: WorkerPool) -> None:
    with pytest.raises(ValueError, match="wait for each other"):
        pool.run([(jobs.square, {"number": 1}), (jobs.square, {"number": 2})], after=[[1], [0]])


def test_no_jobs_give_no_results(pool: WorkerPool) -> None:
    assert pool.run([]) == []


def test_a_killed_worker_is_explained() -> None:
    with (
        WorkerPool(2) as doomed,
        pytest.raises(InputError, match=r"ended.*memory ran out; use one worker"),
    ):
        doomed.run([(jobs.be_killed, {})])


def test_an_interruption_ends_the_workers_at_once() -> None:
    lines = Lines()
    with pytest.raises(KeyboardInterrupt), show_progress(lines), WorkerPool(2) as pool:
        assert pool._pool is not None
        pool._pool.submit(jobs.sleep_in_worker, 600.0)
        assert lines.came.wait(60)  # it sleeps now
        began = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - began < 30


class _Numbers:
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor(index)}


def _sum_of_batches(loader_workers: int) -> int:
    batches = training_batches(_Numbers(), 4, 4, 0, loader_workers=loader_workers)
    return sum(int(batch["x"].sum()) for batch in batches)


def test_a_worker_may_read_in_processes_of_its_own() -> None:
    """On a GPU, trainings in the pool have loader processes."""
    with WorkerPool(2) as pool:
        assert pool.run([(_sum_of_batches, {"loader_workers": count}) for count in (0, 1)]) == [56, 56]


def test_a_trial_that_fails_cancels_no_job_that_another_trial_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials of a search are threads that share the jobs of a Ray pool; here one thread stands for the cluster."""
    monkeypatch.setattr(cluster, "_imported", lambda: None)
    submitted, done = list[str](), list[str]()
    both_wait, one_failed = threading.Event(), threading.Event()

    class Pool(cluster.RayPool):
        def _submit(self, job: Job, memory: int) -> Future[Any]:
            future = super()._submit(job, memory)
            submitted.append(job[1]["output"])
            return future

        def _attempts(self, job: Job, memory: int) -> Any:
            return job[0](**job[1]), []

    def fail(output: str) -> None:
        assert both_wait.wait(30)
        raise DivergedError("the loss is nan.")

    def block(output: str) -> None:
        assert one_failed.wait(30)

    def work(output: str) -> str:
        done.append(output)
        return output

    def until(count: int) -> None:
        while len(submitted) < count:
            time.sleep(0.01)

    pool, shared = Pool("", tmp_path), (work, {"output": "shared"})
    lonely = (work, {"output": "lonely"})
    with ThreadPoolExecutor(1) as pool._threads, ThreadPoolExecutor(2) as trials:
        one = trials.submit(pool.run, [(fail, {"output": "own"}), (block, {"output": "block"}), shared, lonely])
        until(4)
        other = trials.submit(pool.run, [shared])
        until(5)
        both_wait.set()
        with pytest.raises(DivergedError):
            one.result(30)
        one_failed.set()
        assert other.result(30) == ["shared"]
    assert done == ["shared"] and not pool._same
