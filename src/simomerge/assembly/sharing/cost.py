"""What blocks cost: their share in the parameters of an encoder, or in its measured time.

The blocks of a plain transformer are alike. In a pyramid, early stages have few parameters and large maps, so that the
two differ.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from simomerge.core.errors import InputError
from simomerge.models.encoders import Encoder
from simomerge.models.encoders.units import unit_names

KINDS = ("parameters", "time")
"""What a budget may count."""

RUNS = 7
"""Forward passes that are timed, after one to warm up."""


def check_kind(kind: str) -> None:
    """Raise InputError if a budget cannot count this."""
    if kind not in KINDS:
        raise InputError(f"a budget of {kind!r}: give {' or '.join(KINDS)}.")


@torch.inference_mode()
def time_shares(encoder: Encoder, image: Tensor) -> list[float]:
    """Share of each block (stage of a pyramid) in the time of all blocks, measured on this device.

    The median over `RUNS` forward passes of the encoder. Blocks of the same size on inputs of the same shape share
    their times, so that the shares of a plain transformer are equal. Other shares differ by a few percent from call to
    call. What comes before and after the blocks is not counted.

    Args:
        encoder: A plain encoder whose blocks are known.
        image: float (1, 3, H, W) in [0, 1], on the encoder's device. Shares in a pyramid and in a transformer with many
            tokens depend on its size.

    Returns:
        Numbers that add up to 1.

    Example:
        >>> import simomerge as sm
        >>> shares = time_shares(sm.load("rooms-base").encoder, torch.rand(1, 3, 64, 80))
        >>> [round(share, 6) for share in shares[:2]]
        [0.125, 0.125]
    """
    blocks = [encoder.backbone.get_submodule(name) for name in unit_names(encoder)]
    seconds: list[list[float]] = [[] for _ in blocks]
    shapes: list[Any] = [None for _ in blocks]
    encoder(image)
    with _timed(blocks, seconds, shapes):
        for _ in range(RUNS):
            encoder(image)
    medians = [statistics.median(each) for each in seconds]
    sizes = [sum(value.numel() for value in block.parameters()) for block in blocks]
    kinds = list(zip(sizes, shapes, strict=True))
    alike = [statistics.mean(m for m, other in zip(medians, kinds, strict=True) if other == kind) for kind in kinds]
    return [each / sum(alike) for each in alike]


@contextmanager
def _timed(blocks: Sequence[nn.Module], seconds: Sequence[list[float]], shapes: list[Any]) -> Iterator[None]:
    """Inside the block, every run of a module adds its seconds to a list, and sets the shape of its input."""

    def now() -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()

    def started(place: int) -> Callable[..., None]:
        def begin(_: nn.Module, given: tuple[Any, ...]) -> None:
            shapes[place] = getattr(given[0], "shape", None) if given else None
            begun[place] = now()

        return begin

    def ended(place: int) -> Callable[..., None]:
        return lambda *_: seconds[place].append(now() - begun[place])

    begun: dict[int, float] = {}
    with ExitStack() as stack:
        for place, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(started(place)).remove)
            stack.callback(block.register_forward_hook(ended(place)).remove)
        yield
