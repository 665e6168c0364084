"""Training with a model that is divided among processes: each keeps a share of its weights, gradients and moments.

torch's ``fully_shard`` (FSDP2) does the work. Each block of the encoder is collected when it runs and given up again
afterwards, so a process holds one whole block at a time and its share of everything else.

The choice is global and not an argument of the training functions: it changes no result, so it must not become part of
a cache key.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from simomerge.core import distributed
from simomerge.core.errors import InputError
from simomerge.core.machine import return_memory
from simomerge.models.encoders import Encoder, TreeEncoder


@dataclass(frozen=True)
class Sharding:
    """How models are divided while they train.

    Args:
        offload: Keep the shares in the memory of the CPU, and bring each block to the GPU when it runs.
    """

    offload: bool = False


_current: Sharding | None = None


def current() -> Sharding | None:
    """How this process divides models; None if it keeps whole ones."""
    return _current


@contextmanager
def sharded(on: bool = True, offload: bool = False) -> Iterator[None]:
    """Divide the models that are trained inside the block among the processes that torchrun started.

    Only trainings that run the encoder divide it. A training that ends with an exception, other than a diverged loss,
    leaves the model without weights.

    Args:
        on: If false, the block changes nothing.
        offload: See `Sharding`.

    Raises:
        InputError: There is only one process, or ``offload`` is asked for without ``on``.

    Example:
        >>> with sharded():                                                          # doctest: +SKIP
        ...     finetune(model, data, settings)
    """
    global _current
    if offload and not on:
        raise InputError("--offload moves the shares of a divided model to the CPU: give --shard too.")
    if on and distributed.processes() < 2:
        raise InputError(
            "--shard divides a model among several processes, and this is the only one. Start the command with"
            " `torchrun --nproc-per-node N -m simomerge ...`, N at least 2."
        )
    before, _current = _current, Sharding(offload) if on else _current
    try:
        yield
    finally:
        _current = before


def divide(root: nn.Module, encoder: Any, device: torch.device, how: Sharding) -> None:
    """Divide a module among the processes, in place: its parameters become DTensors. Call it before the optimiser.

    Args:
        root: The module. Its forward pass must be called on itself, not on a part of it.
        encoder: The part of it whose blocks are collected one by one, if it is an `Encoder`.
        device: Where the module computes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    if device.type == "cpu":
        return_memory()  # or the blocks that were given up would stay in the memory of the process
    policy = CPUOffloadPolicy(pin_memory=device.type != "cpu") if how.offload else OffloadPolicy()
    mesh = init_device_mesh(device.type, (distributed.processes(),))
    given: dict[str, Any] = {"mesh": mesh, "offload_policy": policy}
    for parameter in root.parameters():
        parameter.data = parameter.data.contiguous()  # which FSDP2 asks for
    for block in _blocks(encoder):
        fully_shard(block, **given)
    fully_shard(root, **given)


def _blocks(encoder: Any) -> Iterable[nn.Module]:
    """The blocks of an encoder; none of a tree, whose blocks keep their results while several paths use them."""
    known = isinstance(encoder, Encoder) and not isinstance(encoder, TreeEncoder)
    return [block for block in encoder.layout.blocks if list(block.parameters())] if known else ()


def twin(module: nn.Module) -> nn.Module:
    """A module of the same structure that shares all tensors. `divide` it, and the given module stays what it is."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})


def release(module: nn.Module) -> None:
    """Free the memory of a module's parameters, until `collect` fills them again."""
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)


@torch.no_grad()
def collect(divided: nn.Module, module: nn.Module, device: torch.device) -> None:
    """Fill the parameters of a module from its divided twin, one after the other. All processes call this together."""
    shares = dict(divided.named_parameters())
    for name, parameter in module.named_parameters():
        parameter.data = whole(shares[name]).detach().to(device)


def whole(tensor: Any) -> Tensor:
    """A tensor from the shares of all processes, which call this together; a plain tensor as it is."""
    if not hasattr(tensor, "full_tensor"):
        return cast(Tensor, tensor)
    return cast(Tensor, tensor.to(tensor.device_mesh.device_type).full_tensor())


def own(tensor: Any) -> Tensor:
    """This process's share of a tensor; a plain tensor as it is."""
    return cast(Tensor, tensor.to_local() if hasattr(tensor, "to_local") else tensor)


@torch.no_grad()
def assign(target: Any, value: Tensor) -> None:
    """Copy a whole tensor, which all processes have, into a tensor that may be divided."""
    if hasattr(target, "to_local"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, target.device_mesh, target.placements).to_local()
    own(target).copy_(value)
