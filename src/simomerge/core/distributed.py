"""Several processes on one piece of work, as torchrun starts them. In a process that is alone, all this does nothing.

Every process runs the same program. What it reads is divided by `share`, what it finds is added up by `add_up`, and the
first writes what is written.
"""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from simomerge.core.errors import InputError
from simomerge.core.files import atomic_folder


def join_processes() -> int:
    """Under torchrun, meet the other processes; this one's rank, 0 where there is but one.

    Raises:
        InputError: the processes that met are not as many as were started.
    """
    started = started_processes()
    if started < 2:
        return 0
    from accelerate import PartialState

    gpu = torch.cuda.is_available()
    # Tensors of either kind are sent as they are: gradients from GPUs, counts and metrics from the CPU. One process may
    # work for hours on what the others wait for; where one ends, torchrun ends all.
    backend = "cuda:nccl,cpu:gloo" if gpu else None
    state = PartialState(cpu=not gpu, backend=backend, timeout=timedelta(days=7))
    if state.num_processes != started:
        raise InputError(
            f"{started} processes were started, and accelerate sees {state.num_processes}: start them with"
            " `torchrun --nproc-per-node N -m simomerge ...`."
        )
    atexit.register(_leave)
    return int(state.process_index)


def started_processes() -> int:
    """How many torchrun started, whether they have met or not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _leave() -> None:
    if processes() > 1:
        torch.distributed.destroy_process_group()


def processes() -> int:
    """How many work together."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return torch.distributed.get_rank() if processes() > 1 else 0


def is_first() -> bool:
    """Whether this is the one that writes and speaks."""
    return rank() == 0


def wait() -> None:
    """Until all processes are here."""
    if processes() > 1:
        torch.distributed.barrier()


def share(items: list[Any]) -> list[Any]:
    """This process's share of a list that all have: every so-manieth. Together the shares are the list."""
    return items[rank() :: processes()]


def add_up(*tensors: Tensor) -> None:
    """Replace tensors by their sums over all processes, in place; all then have the same numbers."""
    for tensor in tensors if processes() > 1 else ():
        packed = tensor.contiguous()
        torch.distributed.all_reduce(packed)
        if packed is not tensor:
            tensor.copy_(packed)


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, through which gradients go back to each."""
    if processes() < 2:
        return values
    from torch.distributed.nn.functional import all_reduce

    total: Tensor = all_reduce(values)
    return total


def add_up_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their sums over all processes."""
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if processes() < 2 or not found:
        return
    flat = torch.cat([gradient.flatten() for gradient in found])  # one message, not one a layer
    add_up(flat)
    for gradient, part in zip(found, flat.split([each.numel() for each in found]), strict=True):
        gradient.copy_(part.view_as(gradient))


def start_alike(module: nn.Module) -> None:
    """Give all processes the first one's parameters and buffers."""
    for tensor in (*module.parameters(), *module.buffers()) if processes() > 1 else ():
        packed = tensor.detach().contiguous()
        torch.distributed.broadcast(packed, 0)
        tensor.detach().copy_(packed)


@contextmanager
def first_before_others() -> Iterator[None]:
    """The first process does the block while the others wait; then they do it, and find what it has left."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()
    wait()


@contextmanager
def folder_together(path: str | Path) -> Iterator[Path]:
    """`atomic_folder` of all processes: one temporary folder on a disk that all share, in place when all are done."""
    if is_first():
        with atomic_folder(path) as folder:
            yield _of_first(folder)
            wait()
    else:
        yield _of_first(None)
        wait()
    wait()


@contextmanager
def locked(path: Path, waits: Callable[[], None]) -> Iterator[None]:
    """The block for one program at a time, of all on machines that share the disk; the lock of one that ended is free.

    All processes of a program are in it together. ``waits`` is called where another program is in it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    if is_first():
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waits()
            lock.acquire()
    try:
        wait()
        yield
        wait()
    finally:
        lock.release()


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A temporary folder that all processes see."""
    if is_first():
        with tempfile.TemporaryDirectory() as folder:
            yield _of_first(Path(folder))
            wait()
    else:
        yield _of_first(None)
        wait()


def _of_first(path: Path | None) -> Path:
    """The first process's path."""
    return Path(said_by_first(str(path)))


def said_by_first(value: Any) -> Any:
    """What the first process says, in all: what each would see on a disk for itself may change in between."""
    if processes() < 2:
        return value
    said = [value]
    torch.distributed.broadcast_object_list(said, 0)
    return said[0]
