"""What this machine computes with: cores, threads, mixed precision."""

from __future__ import annotations

import os

import torch


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def compute_device() -> torch.device:
    """What this process computes with where it may choose: its GPU where there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


_SIDE_BY_SIDE = 1


def share_cores(processes: int) -> None:
    """Say that so many processes on this machine do what this one does."""
    global _SIDE_BY_SIDE
    _SIDE_BY_SIDE = processes


def loader_workers(device: torch.device | str) -> int:
    """Processes that read and decode images while a GPU computes; 0 on a CPU, which has no core to spare."""
    together = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * _SIDE_BY_SIDE  # the former are torchrun's
    return 0 if torch.device(device).type == "cpu" else min(8, available_cores() // together)


def limit_threads(count: int) -> None:
    """Use ``count`` threads, and treat denormal numbers as zero: on a CPU they take a slow path."""
    torch.set_num_threads(count)
    torch.set_flush_denormal(True)


def mixed_precision(device: torch.device | str | None = None) -> str:
    """ "bf16" where the device computes in it (a GPU, or a CPU with its matrix instructions), else "no".

    Args:
        device: which; by default the one that training uses, a GPU where there is one.
    """
    kind = torch.device(device).type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    has_matrix_unit = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return "bf16" if kind == "cpu" and has_matrix_unit() else "no"


def autocast(device: torch.device | str) -> torch.autocast:
    """The mixed precision that training uses on a device, for inference."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=mixed_precision(device) == "bf16")
