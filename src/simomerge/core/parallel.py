"""Threads for work on tensors. numpy releases the interpreter lock while it computes, so threads are enough."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _OneBlasThread:
    """A context in which the linear algebra library uses one thread.

    The threads of this module share the tensors between them. Threads started by the library would be too many, and
    would split sums differently on a machine with another number of cores. The limit applies to the whole process: the
    first context to be entered sets it, and the last one to be left restores the previous limit.
    """

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0
        self._limit: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._limit = threadpool_limits(1, user_api="blas")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._limit is not None:
                self._limit.restore_original_limits()


_ONE_BLAS_THREAD = _OneBlasThread()


def ordered_map(
    function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int | None = None
) -> Generator[_Result, None, None]:
    """Like ``map``, but on several threads. The results come in order.

    At most ``threads + 1`` results wait to be taken, which bounds the memory however slowly they are taken. The first
    exception of ``function`` is raised in place of its result. If you stop taking results early, call ``close()``,
    which waits for the threads.

    Args:
        function: Called with each item.
        items: The items, in order.
        threads: The number of threads, by default all cores. With 1, everything runs in the calling thread.

    Example:
        >>> list(ordered_map(abs, [-1, 2, -3], threads=2))
        [1, 2, 3]
    """
    threads = threads or available_cores()
    with _ONE_BLAS_THREAD:
        if threads == 1:
            yield from map(function, items)
        else:
            yield from _on_threads(function, items, threads)


def _on_threads(function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int) -> Iterator[_Result]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="simomerge")
    waiting: deque[Future[_Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
