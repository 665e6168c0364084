"""Jobs that worker processes can import."""

from __future__ import annotations

import os
import signal
import time
import warnings
from typing import Any

from simomerge.core.caution import warn
from simomerge.core.errors import InputError
from simomerge.core.progress import progress
from simomerge.training import tracking


def square(number: float, seconds: float = 0.0) -> float:
    time.sleep(seconds)
    progress(f"square {number}", 1, 1, "done")
    return number * number


def timed(seconds: float) -> tuple[float, float]:
    start = time.monotonic()
    time.sleep(seconds)
    return start, time.monotonic()


def process_and_threads() -> tuple[int, int]:
    import torch

    return os.getpid(), torch.get_num_threads()


def refuse() -> None:
    raise InputError("the loss is nan; lower the learning rate.")


class Strange(UserWarning):
    """A class whose text alone does not make one."""

    def __init__(self, text: str, extent: int = 0, *, why: str = "") -> None:
        super().__init__(text, extent, why)


def caution(text: str, category: type[Warning] | None = None, error: Exception | None = None) -> None:
    if category is None:
        warn(text)
    else:
        warnings.warn(text, category, stacklevel=1)
    if error is not None:
        raise error


def break_down() -> None:
    raise KeyError("no such thing")


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(seconds: float) -> None:
    progress("sleeping", 0, 1, "")
    time.sleep(seconds)


def sleep_in_worker(seconds: float) -> None:
    from simomerge.training.pool import _run_job

    _run_job(sleep, {"seconds": seconds})


def reports_to() -> Any:
    return tracking.current()
