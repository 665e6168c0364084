"""The parts of a tree of shared blocks: the blocks or stages of an encoder, and the stitches between them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from simomerge.models.encoders.encoder import Encoder
from simomerge.models.encoders.low_rank import Factors, low_rank_layers


class Stitch(nn.Linear):
    """An affine map of the channels of tokens (B, N, C) or maps (B, C, h, w). It starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.movedim(1, -1)).movedim(-1, 1) if hidden.ndim == 4 else super().forward(hidden)


class Unit(nn.Module):
    """A block or stage that several paths share, with the stitch before it if it starts a branch.

    While ``keeps`` is true it runs once; further calls return the same result. Paths that share a unit share everything
    before it, so that its input is the same in all of them.

    Args:
        inner: The block or stage.
        stitch: The map of its input.
        low_rank: The names of its linear layers that add a low-rank difference to weights that branches share.
        rank: The rank of these differences.
    """

    def __init__(
        self, inner: nn.Module, stitch: Stitch | None = None, low_rank: Iterable[str] = (), rank: int = 0
    ) -> None:
        super().__init__()
        self.inner, self.stitch = inner, stitch
        layers = {name: inner.get_submodule(name) for name in low_rank} if rank else {}
        self._factors = nn.ModuleDict({name.replace(".", "/"): Factors(layer, rank) for name, layer in layers.items()})
        self.keeps = False
        self._result: Any = None

    @property
    def factors(self) -> dict[str, Factors]:
        """The low-rank differences by the names of their layers in ``inner``."""
        return {name.replace("/", "."): factors for name, factors in self._factors.items()}  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._result is not None:
            return self._result
        if self.stitch is not None and args:
            args = (self.stitch(args[0]), *args[1:])
        elif self.stitch is not None:
            kwargs = {**kwargs, "hidden_states": self.stitch(kwargs["hidden_states"])}
        result = self.inner(*args, **kwargs)
        if self.keeps:
            self._result = result
        return result

    def __getattr__(self, name: str) -> Any:
        """The inner module's attributes too: some encoders read the dtype of their patch embeddings."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner":
                raise
            return getattr(self.inner, name)

    def forget(self) -> None:
        """Drop the result, and run in every call again."""
        self.keeps, self._result = False, None


def unit_names(encoder: Encoder) -> list[str]:
    """The names, in the backbone, of the modules between which a tree can split.

    Raises:
        InputError: They are unknown; the message says how an encoder of one's own declares them.
    """
    encoder.block_shapes()  # raises if they are unknown
    names = {id(module): name for name, module in encoder.backbone.named_modules()}
    return [names[id(unit)] for unit in encoder.layout.units]


def low_rank_of(encoder: Encoder, rank: int) -> dict[str, list[str]]:
    """By the names of the units, the layers that are low-rank differences in own units; raises as `low_rank_layers`."""
    names = unit_names(encoder)
    units = {name: encoder.backbone.get_submodule(name) for name in names}
    return low_rank_layers(units, Trial.of(encoder, names).linear, rank)


def within(name: str, modules: Sequence[str]) -> str:
    """The one of these modules that a tensor or module is in; empty if there is none."""
    return next((module for module in modules if name.startswith(f"{module}.")), "")


def replace_modules(backbone: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules in the place of those with their names."""
    for name, module in modules.items():
        parent, _, key = name.rpartition(".")
        setattr(backbone.get_submodule(parent), key, module)


def twin(module: nn.Module) -> Any:
    """A module of the same structure that shares all tensors."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())})


def remove_hooks(module: nn.Module, kept: Collection[Encoder] = ()) -> nn.Module:
    """The module, in place, without the hooks of encoders other than these."""
    for part in module.modules():
        for key, hook in list(part._forward_hooks.items()):
            owner = getattr(hook.func, "__self__", None) if isinstance(hook, partial) else None
            if isinstance(owner, Encoder) and not any(owner is each for each in kept):
                part._forward_hooks.pop(key)
                part._forward_hooks_with_kwargs.pop(key, None)
    return module


@dataclass(frozen=True)
class Trial:
    """What encoding a small image shows about an encoder.

    Attributes:
        widths: Channels of the hidden states that reach each unit.
        before: Names of the modules that run before the first unit, once each, without those inside of others.
        linear: Names of the linear layers inside the units that run.
    """

    widths: Sequence[int]
    before: Sequence[str]
    linear: Sequence[str]

    @classmethod
    @torch.no_grad()
    def of(cls, encoder: Encoder, units: Sequence[str]) -> Trial:
        """Encode a small image with an encoder whose units have these names."""
        seen, training = _Seen(units), encoder.training
        with ExitStack() as stack:
            stack.callback(encoder.train, training)
            for name, module in encoder.backbone.named_modules():
                if note := seen.noting(name, module):
                    stack.callback(module.register_forward_pre_hook(partial(note, name), with_kwargs=True).remove)
            encoder.eval()
            encoder(torch.zeros(1, 3, *encoder.padded(1, 1), device=next(encoder.parameters()).device))
        once = [name for name, count in seen.earlier.items() if name and count == 1]
        before = [name for name in once if not within(name, once)]
        return cls([seen.widths[unit] for unit in units], before, list(seen.linear))


@dataclass
class _Seen:
    """What hooks note while an encoder encodes: the fields of `Trial` by name, in order."""

    units: Sequence[str]
    widths: dict[str, int] = field(default_factory=dict)
    earlier: Counter[str] = field(default_factory=Counter)
    linear: dict[str, None] = field(default_factory=dict)

    def noting(self, name: str, module: nn.Module) -> Callable[..., None] | None:
        """The hook that a module needs, if any."""
        if within(name, self.units):
            return self._inside if type(module) is nn.Linear else None
        around = any(unit.startswith(f"{name}.") for unit in self.units)
        return None if around else self._outside

    def _outside(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in self.units:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.widths[name] = hidden.shape[1 if hidden.ndim == 4 else -1]
        elif not self.widths or name in self.earlier:
            self.earlier[name] += 1

    def _inside(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            self.linear[name] = None
