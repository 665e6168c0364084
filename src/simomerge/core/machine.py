"""Hardware that computations use: cores, threads, device, mixed precision."""

from __future__ import annotations

import ctypes
import os

import torch
from torch import nn

from simomerge.core.errors import InputError
from simomerge.core.parallel import available_cores
from simomerge.core.text import first_line


def compute_device() -> torch.device:
    """The GPU of this process if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def training_device() -> torch.device:
    """Where accelerate trains: as `compute_device`, or on the GPU of an Apple computer."""
    from accelerate import PartialState

    device: torch.device = PartialState().device
    return device


_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of glibc."""

_pool_workers = 1


def share_cores(workers: int) -> None:
    """Declare that this process is one of ``workers`` on this machine that run at the same time."""
    global _pool_workers
    _pool_workers = workers


def loader_workers(device: torch.device | str) -> int:
    """Number of processes that read and decode images while a GPU computes; 0 on a CPU, which has no spare core."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * _pool_workers  # the variable is set by torchrun
    return 0 if torch.device(device).type == "cpu" else min(8, available_cores() // processes)


def limit_threads(count: int) -> None:
    """Use ``count`` threads, and flush denormal numbers to zero, because they are slow on a CPU."""
    torch.set_num_threads(count)
    torch.set_flush_denormal(True)


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float64, on its device, or on the CPU if the device has no float64 (Apple GPUs)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of Python, or of torch on a GPU or a CPU."""
    texts = ("allocate memory", "out of memory", "ALLOC_FAILED")  # of the CPU, CUDA and cuBLAS
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and any(text in str(error) for text in texts))


def return_memory() -> None:
    """Let freed blocks of 1 MB or more go back to the system at once. glibc keeps many of them for later by default."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1_000_000)


PRECISION = "SIMOMERGE_PRECISION"
"""The environment variable that chooses the precision of computations: auto, fp32 or bf16."""


def mixed_precision(device: torch.device | str | None = None, trained: nn.Module | None = None) -> str:
    """ "bf16" or "no": the mixed precision of computations on a device.

    The environment variable `PRECISION` may choose it. By default it is bf16 if the device has instructions for
    products in bfloat16 (a GPU, or a CPU with AMX or AVX512-BF16). Without them a CPU would emulate bfloat16, which is
    slower than float32. So is the training of depthwise convolutions in bfloat16 on a CPU.

    Args:
        device: The default is the device that training uses.
        trained: The module, if it is trained.
    """
    kind = torch.device(device).type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = os.environ.get(PRECISION, "auto")
    if chosen not in ("auto", "fp32", "bf16"):
        raise InputError(f"{PRECISION} is {chosen!r}; use auto, fp32 or bf16.")
    if chosen != "auto":
        return "bf16" if chosen == "bf16" else "no"
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    instructions = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    has_them = any(hasattr(torch.cpu, name) and getattr(torch.cpu, name)() for name in instructions)
    slow = trained is not None and any(layer.weight.requires_grad for layer in _depthwise(trained))
    return "bf16" if kind == "cpu" and has_them and not slow else "no"


def _depthwise(module: nn.Module) -> list[nn.Conv2d]:
    """The depthwise convolutions of a module."""
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Conv2d))
    return [layer for layer in layers if layer.groups == layer.in_channels > 1]


def arrange_convolutions(module: nn.Module) -> nn.Module:
    """Give the weights of convolutions the layout that is fastest on a CPU, in place; the module itself.

    Depthwise convolutions are faster with channels last: an EfficientNet-Lite0 trains 1.4 times as fast, and predicts
    1.5 times as fast in float32 and twice as fast in bfloat16. Values change by rounding only.
    """
    if _depthwise(module):
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    return module


def autocast(device: torch.device | str) -> torch.autocast:
    """The mixed precision of training on this device, for inference."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=mixed_precision(device) == "bf16")


def named_device(name: str | None) -> torch.device:
    """A device by its name, such as "cuda:1"; by default as `compute_device`. Raises InputError if there is none."""
    if name is None:
        return compute_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} cannot be used here ({first_line(error)[:100]}).") from error
    return device
