"""An encoder whose blocks are shared by groups of tasks: a tree that branches with depth.

Each leaf of the tree has a *path*: a complete encoder of the usual kind. Paths share their modules: a block that a
group of tasks shares is the same module in all their paths, and runs once per image. Where a group splits, each child
starts with a *stitch*, an affine map of the hidden states. With a rank, the linear layers of own blocks are low-rank
differences to weights that all branches share; see `simomerge.models.encoders.low_rank`.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from simomerge.checkpoints.names import canonical_name, canonicalise
from simomerge.core.errors import InputError
from simomerge.merging.engine.depth import Depth, comes_first
from simomerge.merging.tree import Group, Node, Tree
from simomerge.models.encoders.adapters import Adapter, Adapters, TreeAdapters
from simomerge.models.encoders.encoder import Encoder
from simomerge.models.encoders.features import Features
from simomerge.models.encoders.layout import BlockShape
from simomerge.models.encoders.low_rank import errors, low_rank_layers, shared_and_factors
from simomerge.models.encoders.units import (
    Stitch,
    Trial,
    Unit,
    remove_hooks,
    replace_modules,
    twin,
    unit_names,
    within,
)


class TreeEncoder(Encoder):
    """An encoder with shared and own blocks.

    A new tree has the weights of the given encoder in every block, and stitches that change nothing.

    Args:
        tree: Which tasks share which units (blocks of a plain transformer, stages of a pyramid).
        encoder: An encoder of the same architecture. It stays as it is.
        rank: The rank of the differences between own blocks and shared weights. By default, own blocks have full
            weights.
        kept: Tasks. Only the paths that one of them needs are made; by default all.

    Attributes:
        backbone: One complete encoder per leaf, in the order of ``leaves``. They share modules.
        leaves: The places in ``tree.nodes`` of the leaves whose paths there are.

    Raises:
        InputError: The units of the encoder are unknown, or not as many as the tree has; or they cannot have low-rank
            differences.

    Example:
        >>> from transformers import Dinov2Config, Dinov2Model
        >>> config = Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, patch_size=8)
        >>> tree = Tree.of(3, ["depth", "edges"], blocks=4)
        >>> features = TreeEncoder(tree, Encoder(Dinov2Model(config)))(torch.rand(2, 3, 60, 80))
        >>> features.of("depth").maps[3].shape
        torch.Size([2, 32, 8, 10])
    """

    def __init__(
        self, tree: Tree, encoder: Encoder, rank: int | None = None, kept: Collection[str] | None = None
    ) -> None:
        names = unit_names(encoder)
        if len(names) != tree.blocks:
            raise InputError(f"the tree has {tree.blocks} blocks, but the encoder has {len(names)}.")
        encoder.restore_windows()
        plain, trial = remove_hooks(copy.deepcopy(encoder.backbone)), Trial.of(encoder, names)
        given = {name: plain.get_submodule(name) for name in names}
        low_rank = {} if rank is None else low_rank_layers(given, trial.linear, rank)
        leaves = tree.leaves_of(tree.tasks if kept is None else kept)
        needed = {step for leaf in leaves for step in tree.path(leaf)}
        layers = [given[name].get_submodule(layer) for name, own in low_rank.items() for layer in own]
        shared = {id(layer.weight): layer.weight for layer in layers}

        def grown(place: int, node: Node) -> Iterator[Unit]:
            """New units of a node. Their shared weights are those of ``plain``."""
            for block in range(node.first, node.last + 1) if place in needed else ():
                inner = copy.deepcopy(given[names[block - 1]], dict(shared))
                begins = block == node.first and node.parent is not None
                stitch = Stitch(trial.widths[block - 1]) if begins else None
                own = low_rank.get(names[block - 1], ()) if node.first >= tree.splits else ()
                yield Unit(inner, stitch, own, rank or 0)

        nodes = [list(grown(place, node)) for place, node in enumerate(tree.nodes)]
        loose = [value for name, value in plain.named_parameters() if not within(name, names) and comes_first(name)]
        paths: list[Encoder] = []
        units_of: list[dict[str, Unit]] = []
        roots: dict[int, tuple[dict[str, Unit], dict[int, Any]]] = {}
        for leaf in leaves:
            steps = tree.path(leaf)
            if steps[0] not in roots:
                stems = {name: Unit(copy.deepcopy(plain.get_submodule(name))) for name in trial.before}
                roots[steps[0]] = stems, {id(value): copy.deepcopy(value) for value in loose}
            stems, memo = roots[steps[0]]
            units = dict(zip(names, (unit for step in steps for unit in nodes[step]), strict=True)) | stems
            memo = memo | {id(plain.get_submodule(name)): unit.inner for name, unit in units.items()}
            paths.append(encoder.around(copy.deepcopy(plain, memo)))
            units_of.append(units)
            replace_modules(paths[-1].backbone, units)
        how = (paths[0].preprocessing["mean"], paths[0].preprocessing["std"], paths[0].apply_layernorm)
        super().__init__(nn.ModuleList(paths), paths[0].taps, *how, layout=_outside(paths[0]))
        self.tree, self.rank, self.leaves, self.nodes = tree, rank, leaves, nodes
        self._units, self._before, self._low_rank = units_of, trial.before, low_rank
        self.to(next(encoder.parameters()).device)

    @property
    def paths(self) -> list[Encoder]:
        return cast(list[Encoder], list(self.backbone))

    @property
    def architecture(self) -> str:
        return self.paths[0].architecture

    @property
    def tasks(self) -> list[str]:
        """The tasks whose paths there are, in order."""
        return [task for task in self.tree.tasks if self.tree.leaf_of(task) in self.leaves]

    @property
    def alone(self) -> list[str]:
        """The tasks that share no weight with another one: each has the encoder of its expert."""
        return [] if self.rank is not None else [task for task in self.tasks if (task,) in self.tree.partitions[0]]

    def describe(self) -> dict[str, Any]:
        """The entry ``encoder`` of simo.json: also ``tree``, as text, and perhaps ``branch_rank`` and ``kept``."""
        rank = {} if self.rank is None else {"branch_rank": self.rank}
        kept = {"kept": self.tasks} if len(self.leaves) < len(self.tree.leaves) else {}
        return {**self.paths[0].describe(), "tree": str(self.tree), **rank, **kept}

    def source(self, task: str) -> str:
        return self.tree.nodes[self.tree.leaf_of(task)].tasks[0]

    def branch(self, task: str) -> Encoder:
        return self.paths[self.leaves.index(self.tree.leaf_of(task))]

    @property
    def stitches(self) -> dict[str, Stitch]:
        """By the name of their node."""
        pairs = zip(self.tree.nodes, self.nodes, strict=True)
        found = {node.name: units[0].stitch for node, units in pairs if units}
        return {name: stitch for name, stitch in found.items() if stitch is not None}

    def shares(self) -> list[float]:
        """Share of each unit in the parameters of all units of one encoder."""
        units = list(self._units[0].values())[: self.tree.blocks]
        sizes = [sum(parameter.numel() for parameter in unit.inner.parameters()) for unit in units]
        return [size / max(sum(sizes), 1) for size in sizes]

    # Weights ------------------------------------------------------------------------------------------------

    @contextmanager
    def plain(self, path: int) -> Iterator[nn.Module]:
        """The backbone of a path as a plain module, with the usual names of its tensors, inside the block.

        The linear layers of low-rank blocks have the shared weights there. Their forward hooks add the differences.
        """
        backbone, units = self.paths[path].backbone, self._units[path]
        replace_modules(backbone, {name: unit.inner for name, unit in units.items()})
        try:
            yield backbone
        finally:
            replace_modules(backbone, units)

    @torch.no_grad()
    def load_groups(self, weights: Callable[[Group], Mapping[str, Tensor]]) -> None:
        """Give every unit the weights of its group, or those of this rank that are nearest; the stitches stay.

        Args:
            weights: The state dict of a whole encoder for a group of tasks. Tensors outside the units come from the
                group of the first or the last unit.
        """
        for path, leaf in enumerate(self.leaves):
            with self.plain(path) as backbone:
                groups = [self.tree.nodes[step] for step in self.tree.path(leaf)]
                units, state = list(self._units[path])[: self.tree.blocks], {}
                for name in backbone.state_dict():
                    block = self._unit_of(name, units) + 1
                    state[name] = weights(next(node.tasks for node in groups if block <= node.last))[name]
                backbone.load_state_dict(state)
        layers: dict[str, list[tuple[Unit, str, Tensor]]] = {}
        for _, name, unit, layer, wanted in self._low_rank_weights(weights):
            layers.setdefault(name, []).append((unit, layer, wanted))
        for found in layers.values():
            shared, pairs = shared_and_factors([wanted for _, _, wanted in found], self.rank or 0)
            for (unit, layer, _), (up, down) in zip(found, pairs, strict=True):
                unit.inner.get_submodule(layer).weight.copy_(shared)  # type: ignore[operator]
                if factors := unit.factors.get(layer):
                    factors.up.copy_(up)
                    factors.down.copy_(down)

    def kept_shares(self, weights: Callable[[Group], Mapping[str, Tensor]]) -> dict[str, float]:
        """What the rank keeps of the squared differences between own and shared weights, by the name of the node."""
        sums: dict[str, tuple[float, float]] = {}
        for node, _, unit, layer, wanted in self._low_rank_weights(weights):
            shared = cast(Tensor, unit.inner.get_submodule(layer).weight)
            pairs = zip(sums.get(node, (0.0, 0.0)), errors(wanted, shared, unit.factors.get(layer)), strict=True)
            sums[node] = cast(tuple[float, float], tuple(map(sum, pairs)))
        return {node: 1 - after / before if before else 1.0 for node, (before, after) in sums.items()}

    def _low_rank_weights(
        self, weights: Callable[[Group], Mapping[str, Tensor]]
    ) -> Iterator[tuple[str, str, Unit, str, Tensor]]:
        """For each low-rank layer: its node, name in the backbone, unit, name in the unit, and its group's weights."""
        names = list(self._units[0])[: self.tree.blocks]
        for node, units in zip(self.tree.nodes, self.nodes, strict=True):
            if self.rank is None or node.first < self.tree.splits or not units:
                continue
            state = weights(node.tasks)
            for name, unit in zip(names[node.first - 1 : node.last], units, strict=True):
                for layer in self._low_rank[name]:
                    yield node.name, f"{name}.{layer}", unit, layer, state[f"{name}.{layer}.weight"]

    def branch_tensors(self, path: int) -> dict[str, Tensor]:
        """The tensors of a path that neither the first path nor an earlier one has, by their names on disk.

        The first path has some, too, if there is a rank: its factors, which are no tensors of a plain encoder.
        """
        with self.plain(path) as backbone:
            state = backbone.state_dict()
        units, found = list(self._units[path])[: self.tree.blocks], dict[str, Tensor]()
        steps = [self.tree.path(leaf) for leaf in self.leaves]
        earlier = {step for other in steps[:path] for step in other}
        begins = max((self.tree.nodes[step].last for step in steps[path] if step in earlier), default=0)
        first = self.tree.splits - 1
        shared = {f"{unit}.{layer}.weight" for unit in units[first:] for layer in self._low_rank.get(unit, ())}
        for name, given in canonicalise(state).items() if path else ():
            if self._unit_of(given, units) >= begins and given not in shared:
                found[name] = state[given]
        for unit in units[begins:]:
            for layer, factors in self._units[path][unit].factors.items():
                found |= {canonical_name(f"{unit}.{layer}.{n}"): value for n, value in factors.state_dict().items()}
        return found

    @torch.no_grad()
    def load_branch(self, path: int, tensors: Mapping[str, Tensor]) -> None:
        """Set the tensors of `branch_tensors`. Raises RuntimeError if a tensor is missing, unknown or misshapen."""
        known = self.branch_tensors(path)
        if wrong := sorted(known.keys() ^ tensors.keys()):
            raise RuntimeError(f"{'missing' if wrong[0] in known else 'unexpected'} tensor {wrong[0]}")
        for name, value in known.items():
            if value.shape != tensors[name].shape:
                raise RuntimeError(f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(value.shape)}")
            value.copy_(tensors[name])

    def _unit_of(self, name: str, units: Sequence[str]) -> int:
        """Position of the unit that a tensor belongs to. Tensors outside belong to the first or the last one."""
        if inside := within(name, units):
            return units.index(inside)
        return 0 if within(name, self._before) or comes_first(name) else len(units) - 1

    def for_tasks(self, tasks: Iterable[str]) -> Encoder:
        """This encoder without the paths that none of these tasks needs; its tensors are the same.

        A single path without a stitch, a low-rank difference or an adapter is a plain encoder.
        """
        places = [self.leaves.index(leaf) for leaf in self.tree.leaves_of(tasks) if leaf in self.leaves]
        if len(places) in (0, len(self.leaves)):
            return self
        if len(self.tree.path(self.leaves[places[0]])) == len(places) == 1 and self.rank is self.adapters is None:
            with self.plain(places[0]) as backbone:
                alone = self.paths[places[0]].around(remove_hooks(twin(backbone)))
            return alone.to(self.mean.device).train(self.training)
        found: TreeEncoder = twin(self)
        found._keep(places)
        return found

    def _keep(self, places: Sequence[int]) -> None:
        """Drop all paths but these, in place."""
        adapters = self._adapters_by_block()
        paths = [self.paths[place] for place in places]
        self.leaves, self._units = [self.leaves[place] for place in places], [self._units[place] for place in places]
        needed = {step for leaf in self.leaves for step in self.tree.path(leaf)}
        self.nodes = [units if place in needed else [] for place, units in enumerate(self.nodes)]
        self.backbone, self.layout = nn.ModuleList(paths), _outside(paths[0])
        remove_hooks(self.backbone, paths)
        if isinstance(self.adapters, TreeAdapters):
            self._share_adapters(adapters, self.adapters.settings)

    # Encoding -----------------------------------------------------------------------------------------------

    def _features(self, images: Tensor, size: tuple[int, int], tasks: Iterable[str] | None) -> Features:
        asked = set(self.tree.tasks if tasks is None else tasks)
        groups = [self.tree.nodes[leaf].tasks for leaf in self.leaves]
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
        own = {name: _in_plain(name) for name in names}
        for name, plain in own.items():
            stage, is_stitch, _ = plain.partition(".stitch.")
            if is_stitch:  # it runs before the first block of its stage
                first = re.compile(rf"{re.escape(stage)}\.(?:blocks?|layers?)\.0\.")
                own[name] = next((found[0] for each in own.values() if (found := first.match(each))), plain)
        return Depth(own, self.layout.names, own)

    # Adapters and checkpointing -----------------------------------------------------------------------------

    def add_adapters(self, rank: int = 16, activation: str = "none", last: int = 0) -> TreeAdapters:
        """Add a fresh adapter to every block of every node, or to those of the last blocks; see `Encoder`."""
        found: dict[int, Adapter] = {}
        for path in self.paths:
            alone = Adapters(path.block_shapes(), rank, activation, last)
            settings = alone.settings
            for index, block in enumerate(path.layout.blocks):
                if (adapter := alone.of_block(index)) is not None:
                    found.setdefault(id(block), adapter)
        return self._share_adapters(found, settings)

    def _share_adapters(self, found: dict[int, Adapter], settings: Mapping[str, Any]) -> TreeAdapters:
        """Set the adapters, given by the ids of their blocks. Each belongs to the first path with its block."""
        blocks = [path.layout.blocks for path in self.paths]
        own = [{n: found.pop(id(each)) for n, each in enumerate(some) if id(each) in found} for some in blocks]
        made: TreeAdapters = self._beside(TreeAdapters(own, settings))
        self.adapters = made
        for path, adapters in zip(self.paths, made.paths, strict=True):
            # Not a submodule: the tensors of a path are those of a plain encoder.
            object.__setattr__(path, "adapters", adapters)
        return made

    def _adapters_by_block(self) -> dict[int, Adapter]:
        """The adapters by the ids of their blocks."""
        own = self.adapters.paths if isinstance(self.adapters, TreeAdapters) else []
        pairs = zip(self.paths, own, strict=False)
        return {id(path.layout.blocks[n]): each for path, some in pairs for n, each in some.adapters.items()}

    def block_shapes(self) -> Sequence[BlockShape]:
        return self.paths[0].block_shapes()

    def check_checkpointing(self) -> None:
        for path in self.paths:
            path.check_checkpointing()

    def checkpoint_gradients(self, on: bool = True) -> None:
        for path in self.paths:
            path.checkpoint_gradients(on)


def _in_plain(name: str) -> str:
    """A tensor's name in a plain encoder, from that in `TreeEncoder.backbone`; a factor gets the name of its layer."""
    name = re.sub(r"^\d+\.backbone\.", "", name).replace(".inner.", ".")
    return name.replace("._factors.", ".").replace("/", ".")


def _outside(path: Encoder) -> Any:
    """The layout of a tree: that of its first path, without its modules."""
    return replace(path.layout, blocks=(), tapped=(), windows=(), units=())
