"""Custom encoders: any module that maps images to one map per tap."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import combinations
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from simomerge.core.classes import class_path, settings_of
from simomerge.core.errors import InputError
from simomerge.models.encoders.encoder import Encoder
from simomerge.models.encoders.features import Features
from simomerge.models.encoders.layout import BlockShape, Layout


class ImageEncoder(Protocol):
    """What an ``nn.Module`` needs to be an encoder.

    It may also have

    - ``has_cls = True`` if it returns `Features` with a CLS token per tap,
    - ``settings``, the keyword arguments that create it again; a model folder stores them together with the name of the
      class,
    - ``blocks``, the modules that it runs one after the other: their names in order, such as ``("stem", "stages.0")``,
      or an ``nn.ModuleList`` or ``nn.Sequential``. Each of them takes a map (B, C, h, w) or tokens (B, N, C) as its
      first argument and returns one. Adapters, ProDistill, schedules over the depth, coefficients per block and
      learning rates per block need the blocks.

    Attributes:
        channels: Channels of each map it returns.
        strides: Pixels per place of each map. Images are padded to a multiple of the largest.
    """

    channels: Sequence[int]
    strides: Sequence[int]

    def __call__(self, images: Tensor) -> Sequence[Tensor] | Features:
        """Float images (B, 3, H, W), RGB in [0, 1] -> maps (B, C, h, w), or `Features` with CLS tokens."""


class CustomEncoder(Encoder):
    """An `Encoder` around an `ImageEncoder`; all its maps are tapped. `SimoModel` creates it when needed.

    Args:
        module: An `ImageEncoder`.

    Raises:
        InputError: The module has no ``channels`` or ``strides``, or not equally many, or declares blocks that it does
            not have.

    Example:
        >>> import torch
        >>> class Tiny(nn.Sequential):
        ...     channels, strides = (8,), (4,)
        ...     def forward(self, images):
        ...         return [super().forward(images)]
        >>> CustomEncoder(Tiny(nn.Conv2d(3, 8, 4, stride=4)))(torch.rand(2, 3, 30, 40)).maps[0].shape
        torch.Size([2, 8, 8, 10])
    """

    def __init__(self, module: nn.Module) -> None:
        channels, strides = (tuple(getattr(module, name, ())) for name in ("channels", "strides"))
        if not channels or len(channels) != len(strides):
            raise InputError(
                f"{type(module).__name__} has channels {list(channels)} and strides {list(strides)}."
                " A custom encoder needs both, one number for each map it returns."
            )
        names = declared_blocks(module)
        blocks = [module.get_submodule(name) for name in names]
        layout = Layout(
            channels,
            strides,
            blocks=blocks,
            units=blocks,
            names=names,
            has_cls=bool(getattr(module, "has_cls", False)),
        )
        super().__init__(module, range(1, len(channels) + 1), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), layout=layout)
        self._shapes: list[BlockShape] = []

    def around(self, backbone: nn.Module) -> CustomEncoder:
        return CustomEncoder(backbone)

    def describe(self) -> dict[str, Any]:
        """The entry ``encoder`` of simo.json: also its blocks, its class and the arguments that create it again."""
        blocks = {"blocks": list(self.layout.names)} if self.layout.names else {}
        made_from = {"class": class_path(self.backbone), "settings": settings_of(self.backbone)}
        return {**super().describe(), **blocks, **made_from}

    def block_shapes(self) -> Sequence[BlockShape]:
        """What each block does to the shape of its input, measured on one small image.

        Raises:
            InputError: No blocks are declared, or they are not run once each, in their order, with a map or tokens.
        """
        super().block_shapes()  # raises if there are no blocks
        self._shapes = self._shapes or _measured_shapes(self)
        return self._shapes

    def _encode(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        given = self.backbone(self._in_own_dtype(images))
        maps, cls = (given.maps, given.cls) if isinstance(given, Features) else (given, ())
        name, found = type(self.backbone).__name__, tuple(each.shape[1] for each in maps)
        if bool(cls) != self.has_cls:
            gave = "gave" if cls else "gave no"
            raise InputError(f"{name} {gave} CLS tokens, but it declares has_cls = {self.has_cls}.")
        if found != self.channels:
            raise InputError(f"{name} gave maps of {found} channels, but it declares {self.channels}.")
        return tuple(maps), tuple(cls)


def declared_blocks(module: nn.Module) -> list[str]:
    """Names of the modules that an encoder declares as its blocks; see `ImageEncoder`.

    Raises:
        InputError: It has no such module, declares one twice, or one within another.

    Example:
        >>> class Tiny(nn.Module):
        ...     blocks = ("stem", "stages")
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stem = nn.Conv2d(3, 8, 4, 4)
        ...         self.stages = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 2, 2)])
        >>> declared_blocks(Tiny())
        ['stem', 'stages.0', 'stages.1']
    """
    kind, given = type(module).__name__, getattr(module, "blocks", ())
    if isinstance(given, nn.Module):
        given = _parts(module, "blocks") if isinstance(given, nn.Sequential) else ["blocks"]
    if isinstance(given, str) or not (isinstance(given, Sequence) and all(isinstance(name, str) for name in given)):
        raise InputError(
            f"{kind}.blocks is {given!r}; give the names of the modules that are its blocks, in order, such as"
            ' ("stem", "stages.0").'
        )
    known = dict(module.named_modules())
    if wrong := [name for name in given if not name or name not in known]:
        raise InputError(f"{kind}.blocks names {wrong[0]!r}, and the encoder has no such module.")
    found = [part for name in given for part in _runnable(module, name)]
    for first, second in combinations(found, 2):
        if f"{first}.".startswith(f"{second}.") or f"{second}.".startswith(f"{first}."):
            raise InputError(f"{kind}.blocks names {first!r} and {second!r}, which are not two separate modules.")
    return found


def _parts(module: nn.Module, name: str) -> list[str]:
    return [f"{name}.{part}" for part, _ in module.get_submodule(name).named_children()]


def _runnable(module: nn.Module, name: str) -> list[str]:
    """A module's name, or those of its items if it is a list, which has no forward pass."""
    if not isinstance(module.get_submodule(name), nn.ModuleList):
        return [name]
    return [inner for part in _parts(module, name) for inner in _runnable(module, part)]


@torch.no_grad()
def _measured_shapes(encoder: CustomEncoder) -> list[BlockShape]:
    """The shapes of the inputs and outputs of all blocks in one forward pass."""
    kind, calls = type(encoder.backbone).__name__, list[tuple[int, Any, Any]]()

    def note(index: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.append((index, args[0] if args else None, output[0] if isinstance(output, tuple) else output))

    hooks = [block.register_forward_hook(partial(note, index)) for index, block in enumerate(encoder.layout.blocks)]
    weight, training = next(encoder.backbone.parameters()), encoder.training
    size = encoder.padded(2 * encoder.multiple, 2 * encoder.multiple)
    try:
        encoder.eval()(torch.zeros(1, 3, *size, device=weight.device, dtype=weight.dtype))
    finally:
        encoder.train(training)
        for hook in hooks:
            hook.remove()
    names = encoder.layout.names
    if [index for index, _, _ in calls] != list(range(len(names))):
        ran = ", ".join(names[index] for index, _, _ in calls) or "none of them"
        raise InputError(
            f"{kind} declares the blocks {', '.join(names)}, but its forward pass runs {ran}; blocks are run once each,"
            " in their order."
        )
    for index, before, after in calls:
        if not all(isinstance(each, Tensor) and each.ndim in (3, 4) for each in (before, after)):
            raise InputError(
                f"{kind}: the block {names[index]} does not take a map (B, C, h, w) or tokens (B, N, C) as its first"
                " argument and return one; declare other modules as blocks."
            )
    return [BlockShape.between(before.shape, after.shape) for _, before, after in calls]
