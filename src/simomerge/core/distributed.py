"""Several processes that work on one task, as torchrun starts them. In a single process these functions do nothing.

Every process runs the same program. `share` divides the input, `add_up` sums the results, and only the first process
writes files.
"""

from __future__ import annotations

import atexit
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simomerge.core.environment import versions
from simomerge.core.errors import InputError
from simomerge.core.files import atomic_folder

_LOOKS = 50
"""How often a process looks for a folder, at intervals of 0.1 s: network disks show new folders late."""


def join_processes() -> int:
    """Connect to the other processes that torchrun started, and return the rank; 0 in a single process.

    Raises:
        InputError: The number of connected processes differs from the number that was started, or a process has other
            versions.
    """
    started = started_processes()
    if started < 2:
        return 0
    from accelerate import PartialState

    gpu = torch.cuda.is_available()
    # Gradients are reduced on the GPU by NCCL, counts and metrics on the CPU by gloo. The timeout is long because one
    # process may work for hours while the others wait. If one fails, torchrun ends all.
    backend = "cuda:nccl,cpu:gloo" if gpu else None
    state = PartialState(cpu=not gpu, backend=backend, timeout=timedelta(days=7))
    if state.num_processes != started:
        raise InputError(
            f"{started} processes were started, and accelerate sees {state.num_processes}: start them with"
            " `torchrun --nproc-per-node N -m simomerge ...`."
        )
    atexit.register(state.destroy_process_group)
    _check_versions()
    return int(state.process_index)


def _check_versions() -> None:
    """Raise InputError if a process has other versions than the first one."""
    first, own = from_first(versions()), versions()
    if others := [f"{name} {own[name]} instead of {wanted}" for name, wanted in first.items() if own[name] != wanted]:
        raise InputError(
            f"process {rank()} on {platform.node()} has {', '.join(others)}; install the same versions on all machines."
        )


def started_processes() -> int:
    """Number of processes that torchrun started, whether or not they are connected yet."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes() -> int:
    """Number of connected processes (the world size)."""
    connected = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if connected else 1


def rank() -> int:
    """Index of this process, from 0."""
    return torch.distributed.get_rank() if processes() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def wait() -> None:
    """Wait until all processes call this (a barrier)."""
    if processes() > 1:
        torch.distributed.barrier()


def share(items: list[Any]) -> list[Any]:
    """Every world_size-th item, starting at this rank. The shares of all processes make up the list."""
    return items[rank() :: processes()]


def add_up(*tensors: Tensor) -> None:
    """Replace tensors by their sums over all processes, in place. The result is identical in all processes."""
    for tensor in tensors if processes() > 1 else ():
        packed = tensor.contiguous()
        torch.distributed.all_reduce(packed)
        if packed is not tensor:
            tensor.copy_(packed)


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, differentiable: gradients flow back to every process."""
    if processes() < 2:
        return values
    from torch.distributed.nn.functional import all_reduce

    total: Tensor = all_reduce(values)
    return total


def from_first(value: Any) -> Any:
    """The first process's value, in all processes. Use it for what may change between two looks at a disk."""
    values = [value]
    if processes() > 1:
        torch.distributed.broadcast_object_list(values, 0)
    return values[0]


@contextmanager
def first_before_others() -> Iterator[None]:
    """Run the block in the first process, then in the others, which find what the first one wrote."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()
    wait()


def folder_together(path: str | Path) -> AbstractContextManager[Path]:
    """`atomic_folder` for all processes: a temporary folder on a shared disk, moved to ``path`` when all are done."""
    return _made_by_first(partial(atomic_folder, path))


def temporary_folder() -> AbstractContextManager[Path]:
    """A temporary folder that all processes see."""
    return _made_by_first(tempfile.TemporaryDirectory)


def check_seen(folder: Path) -> None:
    """Raise InputError if a process does not see a folder that the first one made."""
    for _ in range(_LOOKS):
        if folder.is_dir():
            break
        time.sleep(0.1)
    unseen = torch.tensor(float(not folder.is_dir()), dtype=torch.float64)
    add_up(unseen)
    if unseen:
        raise InputError(
            f"{int(unseen)} of {processes()} processes do not see the folder {folder}, which the first one made. Choose"
            " a folder on a disk that all machines share; for temporary folders, set TMPDIR to one."
        )


@contextmanager
def _made_by_first(make: Callable[[], AbstractContextManager[str | Path]]) -> Iterator[Path]:
    """A folder that the first process makes and closes, by its path in all processes."""
    with make() if is_first() else nullcontext("") as made:
        folder = Path(from_first(str(made)))
        check_seen(folder)
        yield folder
        wait()
    wait()
