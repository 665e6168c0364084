"""Independent jobs at the same time: one process per core, one thread each.

On a CPU a small model trains nearly twice as fast on two processes of one thread as on one of two threads.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import os
import queue
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any

import torch

from simomerge.core.caution import Caution, warn
from simomerge.core.classes import allow, allowed
from simomerge.core.distributed import processes
from simomerge.core.errors import InputError
from simomerge.core.machine import available_cores, limit_threads, share_cores
from simomerge.core.progress import Sink, current_sink, show_progress
from simomerge.training import tracking

Job = tuple[Callable[..., Any], Mapping[str, Any]]
"""A function and its keyword arguments. Both must pickle; a function of the main script may be used (loky)."""


Warned = tuple[str, str, str, str, int]
"""A warning as another process can read it: text, module and name of its class, file and line."""


class WorkerPool:
    """Runs jobs in processes that stay warm, so that torch is imported once per core.

    The progress that jobs report goes to the sink that is installed where the pool is entered. Their warnings become
    warnings of this process when they end.

    Args:
        workers: Number of processes. The default is one per core that this process may use, or one where there is a
            GPU, because they would have to share it. With 1, everything runs in this process.

    Example:
        >>> import math
        >>> with WorkerPool(workers=1) as pool:
        ...     pool.run([(lambda number: math.sqrt(number), {"number": 9})])
        [3.0]
    """

    def __init__(self, workers: int | None = None) -> None:
        # Under torchrun all processes do every job together, one job after the other.
        default = 1 if torch.cuda.is_available() else available_cores()
        self.workers = 1 if processes() > 1 else workers or default
        self.slots = 1  # trials of a search at the same time
        self._pool: Any = None  # loky.ProcessPoolExecutor
        self._messages: Any = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> WorkerPool:
        if self.workers > 1:
            from loky import ProcessPoolExecutor
            from loky.backend import get_context

            context = get_context("loky")
            self._messages = context.Queue()
            self._messages.cancel_join_thread()  # a worker that was killed while it reported keeps the queue's lock
            self._pool = ProcessPoolExecutor(
                self.workers,
                context=context,
                initializer=_start_worker,
                initargs=(self._messages, tracking.current(), self.workers, allowed()),
            )
            self._thread = threading.Thread(target=self._forward_progress, args=(current_sink(),), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is None:
            return
        # After Ctrl-C or an error, the jobs that are running now would run on for minutes.
        self._pool.shutdown(wait=True, kill_workers=kind is not None)
        self._messages.put(None)
        assert self._thread is not None
        self._thread.join(timeout=5)  # the last reports arrive before the sink is closed
        self._messages.close()
        self._pool = self._messages = self._thread = None
        gc.collect()  # the semaphores of the pool are in cycles; loky may report those that live until Python ends

    @property
    def needs_locks(self) -> bool:
        """Whether another program may do the same jobs in the same folder."""
        return True

    def run(self, jobs: Sequence[Job], after: Sequence[Collection[int]] = (), memory: Sequence[int] = ()) -> list[Any]:
        """Results in the order of the jobs; the first error ends the run.

        Args:
            jobs: The first of those that can start is the next to start.
            after: For each job, the positions of the earlier jobs that must be done before it starts.
            memory: For each job, the bytes that it may need; only a cluster reads them.

        Raises:
            InputError: A worker was killed, most often because memory ran out.
            ValueError: Jobs that wait for each other.
        """
        if self._pool is None:
            return [function(**arguments) for function, arguments in jobs]
        memory = memory or [0] * len(jobs)
        waits = [set(places) for places in after] or [set() for _ in jobs]
        running: dict[Future[Any], int] = {}
        results: dict[int, Any] = {}
        try:
            while len(results) < len(jobs):
                idle = [i for i in range(len(jobs)) if i not in results and i not in running.values()]
                ready = [i for i in idle if waits[i] <= results.keys()]
                for index in ready[: self.workers - len(running)]:
                    running[self._submit(jobs[index], memory[index])] = index
                if not running:
                    raise ValueError(f"jobs {idle} wait for each other.")
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    results[running.pop(future)], found = future.result()
                    show_warnings(found)
        except BrokenProcessPool as error:
            raise InputError("a worker process ended, most often because memory ran out; use one worker.") from error
        except Exception as error:
            with contextlib.suppress(Warning):  # which a filter makes an error; the error of the job matters more
                show_warnings(getattr(error, "worker_warnings", []))
            raise
        finally:
            for future in running:
                self._leave(future)
        return [results[index] for index in range(len(jobs))]

    def _submit(self, job: Job, memory: int) -> Future[Any]:
        """Start a job."""
        function, arguments = job
        started: Future[Any] = self._pool.submit(_run_job, function, dict(arguments))
        return started

    def _leave(self, future: Future[Any]) -> None:
        """Wait no longer for a job, which need not start then."""
        future.cancel()

    def _forward_progress(self, sink: Sink | None) -> None:
        while (message := self._messages.get()) is not None:
            if sink is not None:
                sink(*message)


_messages: Any = None


def with_warnings(function: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[Any, list[Warned]]:
    """The result of a job, and its warnings, which are not shown. An error carries them as ``worker_warnings``."""
    found: list[Warned] = []

    def keep(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        found.append((str(message), category.__module__, category.__name__, filename, lineno))

    try:
        with warnings.catch_warnings():
            warnings.showwarning = keep
            return function(**arguments), found
    except Exception as error:
        error.worker_warnings = found  # type: ignore[attr-defined]
        raise


def show_warnings(found: Sequence[Warned]) -> None:
    """Warn of what a job in another process warned of. A class of another package is named in the text."""
    for text, module, name, file, line in found:
        if (module, name) == (Caution.__module__, Caution.__name__):
            warn(text)
        elif module == "builtins":
            warnings.warn_explicit(text, getattr(builtins, name), file, line)
        else:
            warnings.warn_explicit(f"{name}: {text}", UserWarning, file, line)


def _start_worker(messages: Any, reports: tracking.Tracking | None, workers: int, classes: Any) -> None:
    global _messages
    _messages = messages
    tracking.use(reports)
    allow(*classes)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers; one traceback is enough
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    limit_threads(1)
    share_cores(workers)


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, however the parent was killed."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _run_job(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    def report(label: str, done: int, total: int, note: str) -> None:
        with contextlib.suppress(queue.Full):  # a lost report is no reason to stop
            _messages.put_nowait((label, done, total, note))

    try:
        with show_progress(report):
            return with_warnings(function, arguments)
    finally:
        sys.stdout.flush()
