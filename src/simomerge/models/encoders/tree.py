"""An encoder whose blocks are shared by groups of tasks: a tree that branches with depth.

Each leaf of the tree has a *path*: a complete encoder of the usual kind. Paths share their modules: a block that a
group of tasks shares is the same module in all their paths, and runs once per image. Where a group splits, each child
starts with a *stitch*, an affine map of the hidden states.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from simomerge.checkpoints.names import canonicalise
from simomerge.core.errors import InputError
from simomerge.merging.engine.depth import Depth, comes_first
from simomerge.merging.tree import Group, Tree
from simomerge.models.encoders.adapters import Adapters, TreeAdapters
from simomerge.models.encoders.encoder import Encoder
from simomerge.models.encoders.features import Features
from simomerge.models.encoders.layout import BlockShape


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
    """

    def __init__(self, inner: nn.Module, stitch: Stitch | None = None) -> None:
        super().__init__()
        self.inner, self.stitch = inner, stitch
        self.keeps = False
        self._result: Any = None

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


class TreeEncoder(Encoder):
    """An encoder with shared and own blocks.

    A new tree has the weights of the given encoder in every block, and stitches that change nothing.

    Args:
        tree: Which tasks share which units (blocks of a plain transformer, stages of a pyramid).
        encoder: An encoder of the same architecture. It stays as it is.

    Attributes:
        backbone: One complete encoder per leaf, in the order of ``tree.leaves``. They share modules.

    Raises:
        InputError: The units of the encoder are unknown, or not as many as the tree has.

    Example:
        >>> from transformers import Dinov2Config, Dinov2Model
        >>> config = Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, patch_size=8)
        >>> tree = Tree.of(3, ["depth", "edges"], blocks=4)
        >>> features = TreeEncoder(tree, Encoder(Dinov2Model(config)))(torch.rand(2, 3, 60, 80))
        >>> features.of("depth").maps[3].shape
        torch.Size([2, 32, 8, 10])
    """

    def __init__(self, tree: Tree, encoder: Encoder) -> None:
        names = unit_names(encoder)
        if len(names) != tree.blocks:
            raise InputError(f"the tree has {tree.blocks} blocks, but the encoder has {len(names)}.")
        plain, (widths, before) = _without_hooks(encoder), _probed(encoder, names)
        loose = [value for name, value in plain.named_parameters() if not _within(name, names) and comes_first(name)]
        nodes: list[list[Unit]] = []
        for node in tree.nodes:
            first, *others = (copy.deepcopy(plain.get_submodule(name)) for name in names[node.first - 1 : node.last])
            stitch = None if node.parent is None else Stitch(widths[node.first - 1])
            nodes.append([Unit(first, stitch), *map(Unit, others)])
        paths: list[Encoder] = []
        units_of: list[dict[str, Unit]] = []
        roots: dict[int, tuple[dict[str, Unit], dict[int, Any]]] = {}
        for leaf in tree.leaves:
            steps = tree.path(leaf)
            if steps[0] not in roots:
                stems = {name: Unit(copy.deepcopy(plain.get_submodule(name))) for name in before}
                roots[steps[0]] = stems, {id(value): copy.deepcopy(value) for value in loose}
            stems, memo = roots[steps[0]]
            units = dict(zip(names, (unit for step in steps for unit in nodes[step]), strict=True)) | stems
            memo = memo | {id(plain.get_submodule(name)): unit.inner for name, unit in units.items()}
            paths.append(encoder.around(copy.deepcopy(plain, memo)))
            units_of.append(units)
            _replace(paths[-1].backbone, units)
        layout = replace(paths[0].layout, blocks=(), tapped=(), windows=(), units=())
        how = (paths[0].preprocessing["mean"], paths[0].preprocessing["std"], paths[0].apply_layernorm)
        super().__init__(nn.ModuleList(paths), paths[0].taps, *how, layout=layout)
        self.tree = tree
        self.nodes = nodes
        self._units = units_of
        self._before = before
        self.to(next(encoder.parameters()).device)

    @property
    def paths(self) -> list[Encoder]:
        return cast(list[Encoder], list(self.backbone))

    @property
    def architecture(self) -> str:
        return self.paths[0].architecture

    def describe(self) -> dict[str, Any]:
        """The entry ``encoder`` of simo.json: also ``tree``, as text."""
        return {**self.paths[0].describe(), "tree": str(self.tree)}

    def source(self, task: str) -> str:
        return self.tree.nodes[self.tree.leaf_of(task)].tasks[0]

    def branch(self, task: str) -> Encoder:
        return self.paths[self.tree.leaves.index(self.tree.leaf_of(task))]

    @property
    def stitches(self) -> dict[str, Stitch]:
        """By the name of their node."""
        found = {node.name: units[0].stitch for node, units in zip(self.tree.nodes, self.nodes, strict=True)}
        return {name: stitch for name, stitch in found.items() if stitch is not None}

    def shares(self) -> list[float]:
        """Share of each unit in the parameters of all units of one encoder."""
        units = list(self._units[0].values())[: self.tree.blocks]
        sizes = [sum(parameter.numel() for parameter in unit.inner.parameters()) for unit in units]
        return [size / max(sum(sizes), 1) for size in sizes]

    # Weights ------------------------------------------------------------------------------------------------

    @contextmanager
    def plain(self, path: int) -> Iterator[nn.Module]:
        """The backbone of a path as a plain module, with the usual names of its tensors, inside the block."""
        backbone, units = self.paths[path].backbone, self._units[path]
        _replace(backbone, {name: unit.inner for name, unit in units.items()})
        try:
            yield backbone
        finally:
            _replace(backbone, units)

    def load_groups(self, weights: Callable[[Group], Mapping[str, Tensor]]) -> None:
        """Give every unit the weights of its group; the stitches stay.

        Args:
            weights: The state dict of a whole encoder for a group of tasks. Tensors outside the units come from the
                group of the first or the last unit.
        """
        for path, leaf in enumerate(self.tree.leaves):
            with self.plain(path) as backbone:
                groups = [self.tree.nodes[step] for step in self.tree.path(leaf)]
                units, state = list(self._units[path])[: self.tree.blocks], {}
                for name in backbone.state_dict():
                    block = self._unit_of(name, units) + 1
                    state[name] = weights(next(node.tasks for node in groups if block <= node.last))[name]
                backbone.load_state_dict(state)

    def branch_tensors(self, path: int) -> dict[str, Tensor]:
        """The tensors of a path that no earlier path has, by their names on disk."""
        with self.plain(path) as backbone:
            state = backbone.state_dict()
        own = self._own_names(path, state)
        return {name: state[given] for name, given in canonicalise(state).items() if given in own}

    def load_branch(self, path: int, tensors: Mapping[str, Tensor]) -> None:
        """Set the tensors of `branch_tensors`. Raises RuntimeError if a tensor is missing, unknown or misshapen."""
        with self.plain(path) as backbone:
            known = canonicalise(backbone.state_dict())
            own = self._own_names(path, known.values())
            expected = {name for name, given in known.items() if given in own}
            if wrong := sorted(expected ^ set(tensors)):
                raise RuntimeError(f"{'missing' if wrong[0] in expected else 'unexpected'} tensor {wrong[0]}")
            backbone.load_state_dict({known[name]: tensor for name, tensor in tensors.items()}, strict=False)

    def _own_names(self, path: int, names: Iterable[str]) -> set[str]:
        """The names of tensors that belong to no earlier path."""
        steps = [self.tree.path(leaf) for leaf in self.tree.leaves]
        earlier = {step for other in steps[:path] for step in other}
        shared = [node for step, node in enumerate(self.tree.nodes) if step in steps[path] and step in earlier]
        first = max((node.last for node in shared), default=0)
        units = list(self._units[path])[: self.tree.blocks]
        return {name for name in names if self._unit_of(name, units) >= first}

    def _unit_of(self, name: str, units: Sequence[str]) -> int:
        """Position of the unit that a tensor belongs to. Tensors outside belong to the first or the last one."""
        if inside := _within(name, units):
            return units.index(inside)
        return 0 if _within(name, self._before) or comes_first(name) else len(units) - 1

    # Encoding -----------------------------------------------------------------------------------------------

    def _features(self, images: Tensor, size: tuple[int, int], tasks: Iterable[str] | None) -> Features:
        asked = set(self.tree.tasks if tasks is None else tasks)
        groups = [self.tree.nodes[leaf].tasks for leaf in self.tree.leaves]
        needed = [place for place, group in enumerate(groups) if asked & set(group)]
        found: dict[str, Features] = {}
        with self._sharing(needed):
            for place in needed:
                features = self.paths[place]._features(images, size, None)
                found |= dict.fromkeys(groups[place], features)
        height, width = images.shape[-2:]
        return Features((), (), size, (height, width), found)

    @contextmanager
    def _sharing(self, paths: Sequence[int]) -> Iterator[None]:
        """Inside the block, units that several of these paths share run once."""
        uses = Counter(unit for path in paths for unit in self._units[path].values())
        shared = [unit for unit, count in uses.items() if count > 1]
        with ExitStack() as stack:
            for unit in shared:
                unit.keeps = True
                stack.callback(unit.forget)
            for path in paths:  # one run of a shared unit gives the taps of all its paths
                stack.enter_context(self.paths[path].collecting())
            yield

    def depth(self, names: Iterable[str]) -> Depth:
        """The blocks that tensors belong to, by their names in `backbone`, in which each path has a number."""
        given = list(names)
        own = {name: re.sub(r"^\d+\.backbone\.", "", name).replace(".inner.", ".") for name in given}
        return Depth(given, self.layout.names, own)

    # Adapters and checkpointing -----------------------------------------------------------------------------

    def add_adapters(self, rank: int = 16, activation: str = "none", last: int = 0) -> TreeAdapters:
        """Add a fresh adapter to every block of every node, or to those of the last blocks; see `Encoder`."""
        alone = [Adapters(path.block_shapes(), rank, activation, last) for path in self.paths]
        units = [[self._unit_at(path, block) for block in each.layout.blocks] for path, each in enumerate(self.paths)]
        owners = [
            [
                next(other for other, theirs in enumerate(units) if theirs[block] is unit)
                for block, unit in enumerate(mine)
            ]
            for mine in units
        ]
        self.adapters = TreeAdapters(alone, owners)
        for path, adapters in zip(self.paths, self.adapters.paths, strict=True):
            # Not a submodule: the tensors of a path are those of a plain encoder.
            object.__setattr__(path, "adapters", adapters)
        return self.adapters

    def block_shapes(self) -> Sequence[BlockShape]:
        return self.paths[0].block_shapes()

    def _unit_at(self, path: int, block: nn.Module) -> Unit:
        """The unit of a path that a block is or belongs to."""
        return next(unit for unit in self._units[path].values() if any(each is block for each in unit.inner.modules()))

    def check_checkpointing(self) -> None:
        for path in self.paths:
            path.check_checkpointing()

    def checkpoint_gradients(self, on: bool = True) -> None:
        for path in self.paths:
            path.checkpoint_gradients(on)


def unit_names(encoder: Encoder) -> list[str]:
    """The names, in the backbone, of the modules between which a tree can split.

    Raises:
        InputError: They are unknown; the message says how an encoder of one's own declares them.
    """
    encoder.block_shapes()  # raises if they are unknown
    names = {id(module): name for name, module in encoder.backbone.named_modules()}
    return [names[id(unit)] for unit in encoder.layout.units]


def _within(name: str, modules: Sequence[str]) -> str:
    """The one of these modules that a tensor is in; empty if there is none."""
    return next((module for module in modules if name.startswith(f"{module}.")), "")


def _replace(backbone: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, key = name.rpartition(".")
        setattr(backbone.get_submodule(parent), key, module)


def _without_hooks(encoder: Encoder) -> nn.Module:
    """A copy of an encoder's backbone without the hooks of the encoder."""
    encoder.restore_windows()
    backbone: nn.Module = copy.deepcopy(encoder.backbone)
    for module in backbone.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, partial) and isinstance(getattr(hook.func, "__self__", None), Encoder):
                module._forward_hooks.pop(key)
                module._forward_hooks_with_kwargs.pop(key, None)
    return backbone


@torch.no_grad()
def _probed(encoder: Encoder, units: Sequence[str]) -> tuple[list[int], list[str]]:
    """What encoding a small image shows.

    Returns:
        Channels of the hidden states that reach each unit; and the names of the modules that run before the first unit,
        once each, without those inside of others.
    """
    widths: dict[str, int] = {}
    earlier: Counter[str] = Counter()

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in units:
            hidden = args[0] if args else kwargs["hidden_states"]
            widths[name] = hidden.shape[1 if hidden.ndim == 4 else -1]
        elif not widths or name in earlier:
            earlier[name] += 1

    training = encoder.training
    with ExitStack() as stack:
        stack.callback(encoder.train, training)
        for name, module in encoder.backbone.named_modules():
            around = any(unit.startswith(f"{name}.") for unit in units)
            if not around and not _within(name, units):
                stack.callback(module.register_forward_pre_hook(partial(note, name), with_kwargs=True).remove)
        encoder.eval()
        encoder(torch.zeros(1, 3, *encoder.padded(1, 1), device=next(encoder.parameters()).device))
    once = [name for name, count in earlier.items() if name and count == 1]
    return [widths[unit] for unit in units], [name for name in once if not _within(name, once)]
