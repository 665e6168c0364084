"""The jobs of a run as tasks of a Ray cluster.

All nodes see the run folder under the same path, or its URL. A job whose process or node died is done again, and a
training resumes from its state in the folder, if the nodes share it. Each job writes what it prints to a file next to
its output, which is shown if it fails.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

from simomerge.core.classes import allow, allowed
from simomerge.core.distributed import started_processes
from simomerge.core.errors import InputError
from simomerge.core.machine import PRECISION, limit_threads, share_cores
from simomerge.core.progress import current_sink, progress, show_progress
from simomerge.core.text import first_line
from simomerge.training import tracking
from simomerge.training.nodes import check_nodes
from simomerge.training.pool import Job, WorkerPool, with_warnings
from simomerge.training.run_folder import RunFolder

ATTEMPTS = 4
"""How often a job is started whose process dies."""

_LINES = 12
"""Lines of a job's log that an error shows."""
_EVERY = 0.5
"""Seconds between two reports of a job, and between two looks at them."""
_LOOK, _ALONE = 5.0, 120.0
"""Seconds between two looks at the nodes, and for which there may be none."""
_MOST_TASKS = 1000


@dataclass(frozen=True)
class _Setup:
    """What a task takes over from the process that started the run."""

    precision: str | None
    tracking: tracking.Tracking | None
    allowed: tuple[bool, tuple[str, ...]]
    cpus: int
    tasks_per_node: int


class RayPool(WorkerPool):
    """Runs jobs on a Ray cluster; used as a context, like `WorkerPool`.

    Args:
        address: The cluster, such as ``auto`` or ``ray://host:10001``. Empty: that of the variable RAY_ADDRESS, or else
            this machine alone.
        folder: The run folder, or its URL, which all nodes must see.
        workers: The largest number of jobs at the same time. By default as many as the cluster has room for.

    Raises:
        InputError: Ray is not installed, there is no cluster at the address, torchrun started this process, the nodes
            differ from this machine or do not see the folder, or fewer jobs have room than ``workers``.
    """

    def __init__(self, address: str, folder: str | Path | RunFolder, workers: int | None = None) -> None:
        if started_processes() > 1:
            raise InputError("--ray shares stages among machines by itself: start the command without torchrun.")
        self.address, self.folder, self.asked = address, RunFolder.of(folder), workers
        self.workers, self.slots = workers or _MOST_TASKS, 1
        self._ray = _imported()
        self._same: dict[str, Future[Any]] = {}  # jobs that several runs of this process wait for
        self._waiting: WeakKeyDictionary[Future[Any], int] = WeakKeyDictionary()  # how many runs wait for each
        self._lock = threading.Lock()
        self._allowed = allowed()  # threads do not know it

    @property
    def needs_locks(self) -> bool:
        return False

    def __enter__(self) -> RayPool:
        ray = self._ray
        try:
            _connect(self.address)  # Ray itself waits for minutes
            ray.init(address=self.address or None, log_to_driver=False, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"--ray: no cluster answers at {self.address or 'this machine'} ({first_line(error)}). Start one with"
                " `ray start --head`, or give --ray alone to use this machine."
            ) from error
        try:
            self.nodes = check_nodes(ray, self.folder)
            if self.asked and self.asked > self.nodes.slots:
                raise InputError(
                    f"--workers {self.asked}: the cluster has room for {self.nodes.slots} stages at the same time; give"
                    " fewer workers, or add nodes."
                )
            self.slots = min(self.workers, self.nodes.slots)
            self._reports = ray.remote(num_cpus=0)(_Reports).options(**self.nodes.here()).remote()
            self._threads = ThreadPoolExecutor(self.workers)
            self._sink, self._ended = current_sink(), threading.Event()
            self._thread = threading.Thread(target=self._forward, daemon=True)
            self._thread.start()
        except BaseException:
            ray.shutdown()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        assert self._thread is not None
        self._thread.join(timeout=5)
        self._ray.shutdown()  # also ends the tasks that still run after an error
        self._threads.shutdown(wait=False, cancel_futures=True)

    def run(self, jobs: Sequence[Job], after: Any = (), memory: Sequence[int] = ()) -> list[Any]:
        self._pool = self._threads
        return super().run(jobs, after, memory)

    def _submit(self, job: Job, memory: int) -> Future[Any]:
        """Start a job, or wait for it where another trial of a search has started it."""
        key = str(job[1].get("output", uuid.uuid4()))
        with self._lock:
            if (started := self._same.get(key)) is not None:
                self._waiting[started] += 1
                return started
            future = self._same[key] = self._threads.submit(self._attempts, job, memory)
            self._waiting[future] = 1
        future.add_done_callback(lambda _: self._same.pop(key, None))  # at once, if it is done by now
        return future

    def _leave(self, future: Future[Any]) -> None:
        """Wait no longer for a job, which need not start if no other trial waits for it."""
        with self._lock:
            self._waiting[future] -= 1
            if not self._waiting[future]:
                future.cancel()

    def _attempts(self, job: Job, memory: int) -> Any:
        """The result of a job, which is started again if its process dies."""
        ray, (function, arguments) = self._ray, job
        name, log = _name(arguments), _log(arguments)
        self.nodes.check_memory(name, memory)
        setup = _Setup(
            os.environ.get(PRECISION), tracking.current(), self._allowed, self.nodes.cpus, self.nodes.tasks_per_node
        )
        needs = {"num_cpus": self.nodes.cpus, "num_gpus": self.nodes.gpus, "memory": memory, "max_retries": 0}
        task = ray.remote(_task).options(**needs, name=name)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._result(name, task.remote(function, dict(arguments), setup, self._reports))
            except ray.exceptions.RayTaskError as error:  # an exception of the job itself
                if isinstance(error.cause, (OSError, MemoryError)) and attempt < ATTEMPTS:
                    self._say(name, f"{type(error.cause).__name__}, attempt {attempt + 1} of {ATTEMPTS}")
                    continue
                if isinstance(error.cause, InputError):
                    raise error.cause from None
                where, *lines = _tail(log, str(error))
                raised = InputError(f"{name}: {_described(error.cause)}. {where}", *lines)
                raised.worker_warnings = getattr(error.cause, "worker_warnings", [])  # type: ignore[attr-defined]
                raise raised from error
            except ray.exceptions.RayError as error:  # its process or its node is gone
                if self._ended.is_set():  # or Ray would start again
                    raise
                if attempt == ATTEMPTS:
                    reason = first_line(error)
                    where, *lines = _tail(log)
                    raise InputError(
                        f"{name}: its process ended {ATTEMPTS} times, most often because memory ran out ({reason})."
                        f" {where}",
                        *lines,
                    ) from error
                self._say(name, f"its process ended, attempt {attempt + 1} of {ATTEMPTS}")
        raise AssertionError("the last attempt returns or raises")

    def _result(self, name: str, started: Any) -> Any:
        """The result of a task. Raises InputError if the cluster has no node to run it any more."""
        without = 0.0
        while not self._ray.wait([started], timeout=_LOOK)[0]:
            working = [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
            without = 0.0 if working else without + _LOOK
            if without >= _ALONE:
                raise InputError(
                    f"{name}: no node of the cluster is left to do it. Start nodes with `ray start --address=...`, and"
                    " repeat the command to go on."
                )
        return self._ray.get(started)

    def _say(self, label: str, note: str) -> None:
        with show_progress(self._sink):
            progress(label, 0, 1, note)

    def _forward(self) -> None:
        """Show what the jobs report, until the pool is left."""
        while not self._ended.is_set():
            with contextlib.suppress(self._ray.exceptions.RayError):
                for message in self._ray.get(self._reports.take.remote()):
                    if self._sink is not None:
                        self._sink(*message)
            self._ended.wait(_EVERY)


def pool_of(folder: RunFolder, workers: int | None, ray: str | None) -> WorkerPool:
    """The processes of this machine, or those of a Ray cluster if its address is given. See `RayPool`."""
    return WorkerPool(workers) if ray is None else RayPool(ray, folder, workers)


class _Reports:
    """An actor that keeps the reports of all jobs until the first process takes them."""

    def __init__(self) -> None:
        self.waiting: list[tuple[str, int, int, str]] = []

    def put(self, message: tuple[str, int, int, str]) -> None:
        self.waiting.append(message)

    def take(self) -> list[tuple[str, int, int, str]]:
        found, self.waiting = self.waiting, []
        return found


def _task(function: Callable[..., Any], arguments: dict[str, Any], setup: _Setup, reports: Any) -> Any:
    """Do a job in a process of the cluster."""
    if setup.precision is not None:
        os.environ[PRECISION] = setup.precision
    tracking.use(setup.tracking)
    allow(*setup.allowed)
    limit_threads(setup.cpus)
    share_cores(setup.tasks_per_node)
    said: dict[str, float] = {}

    def report(label: str, done: int, total: int, note: str) -> None:
        if done >= total or time.monotonic() - said.get(label, 0.0) >= _EVERY:
            said[label] = time.monotonic()
            reports.put.remote((label, done, total, note))

    log = _log(arguments)
    with _logged(log), show_progress(report):
        result = with_warnings(function, arguments)
    if log:
        log.unlink(missing_ok=True)
    return result


@contextmanager
def _logged(path: Path | None) -> Iterator[None]:
    """Write what this process prints to a file, including the traceback of a crash in C code."""
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush(), sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        faulthandler.enable(file)
        try:
            yield
        finally:
            faulthandler.disable()
            for number, descriptor in zip((1, 2), kept, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)


def _name(arguments: Mapping[str, Any]) -> str:
    return str(getattr(arguments.get("stage"), "name", "job"))


def _log(arguments: Mapping[str, Any]) -> Path | None:
    """Where this machine writes the log of a job."""
    folder = arguments.get("folder")
    return folder.stage(f"{arguments['output'].name}.log") if isinstance(folder, RunFolder) else None


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")


def _tail(log: Path | None, text: str = "") -> list[str]:
    """The end of a job's log: a sentence and perhaps lines."""
    if log is not None and log.is_file():
        text = f"{log.read_text(encoding='utf-8', errors='replace')}\n{text}"
    lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()][-_LINES:]
    where = f" ({log})" if log is not None else ""
    if not lines and log is not None and not log.exists():
        return [f"Its log is {log.name} in the run folder of the node that ran it."]
    return [f"Its log{where} ends with:", *lines] if lines else [f"Its log{where} is empty."]


def _connect(address: str) -> None:
    """Raise OSError if nothing listens at an address that has a port."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _imported() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise InputError(f'--ray needs Ray ({error}): pip install "simomerge[ray]", on every node.') from error
    return ray
