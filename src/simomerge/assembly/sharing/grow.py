"""From experts to a model whose encoder is a tree: the merged weights of every node, its stitches, its folded heads."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from simomerge.assembly.experts import merged_weights
from simomerge.assembly.realign import realign
from simomerge.assembly.sharing.stitches import Known, StitchFit, fit_stitches
from simomerge.checkpoints.experts import merge_provenance
from simomerge.core.pixels import OWN_SIZE
from simomerge.merging import MergeMethod, Schedule, describe_method
from simomerge.merging.method import restricted
from simomerge.merging.tree import Group, Tree
from simomerge.models.encoders import TreeEncoder
from simomerge.models.encoders.units import unit_names
from simomerge.models.heads.projections import is_foldable
from simomerge.models.model import SimoModel

KEPT = 8
"""Number of merged encoders that are kept in memory."""


class Grower:
    """Grows trees from the same experts.

    Args:
        base: The foundation encoder.
        experts: As `simomerge.assembly.experts.check_experts` returns them.
        method: The merge of a group of at least two tasks. A group of one task keeps its expert's weights.
        schedule: Factors over the depth, for every merge.

    Raises:
        InputError: The blocks of the encoder are unknown.
    """

    def __init__(
        self,
        base: SimoModel,
        experts: Mapping[str, SimoModel],
        method: MergeMethod | Callable[[Group], MergeMethod],
        schedule: Schedule | None = None,
    ) -> None:
        self.base, self.experts, self.schedule = base, experts, schedule
        self._method = method if callable(method) else partial(restricted, method.for_experts(list(experts)))
        self._methods: dict[Group, MergeMethod] = {}
        self._merged: dict[Group, Mapping[str, Tensor]] = {}
        self.blocks = len(unit_names(next(iter(experts.values())).encoder))

    def method(self, group: Group) -> MergeMethod:
        """The merge of a group of at least two tasks."""
        key = tuple(sorted(group))
        if key not in self._methods:
            self._methods[key] = self._method(key)
        return self._methods[key]

    def weights(self, group: Group) -> Mapping[str, Tensor]:
        """The weights of a whole encoder that a group of tasks shares."""
        key = tuple(sorted(group))
        if len(key) == 1:
            return self.experts[key[0]].encoder.backbone.state_dict()
        if key not in self._merged:
            some = {task: expert for task, expert in self.experts.items() if task in key}
            merged = merged_weights(self.base, some, self.method(key), self.schedule)
            self._merged = dict([*self._merged.items()][1 - KEPT :]) | {key: merged}
        return self._merged[key]

    def grow(self, tree: Tree, rank: int | None = None) -> SimoModel:
        """The model of a tree: merged weights, stitches that change nothing, the experts' heads, no provenance.

        With a rank, own blocks are differences of this rank to shared weights.
        """
        first = next(iter(self.experts.values())).encoder
        if tree.is_trivial:
            encoder = copy.deepcopy(first)
            encoder.backbone.load_state_dict(self.weights(tree.partitions[0][0]))
        else:
            encoder = TreeEncoder(tree, first, rank)
            encoder.load_groups(self.weights)
        heads = {task: copy.deepcopy(expert.heads[task]) for task, expert in self.experts.items()}
        return SimoModel(encoder, {task: expert.tasks[task] for task, expert in self.experts.items()}, heads).eval()


def share_blocks(
    grower: Grower, tree: Tree, images: Any = None, known: Known | None = None, rank: int | None = None
) -> SimoModel:
    """A model that shares blocks as a tree says, with its provenance.

    Args:
        images: Images without labels, as `simomerge.datasets.pictures.as_images` gives them, for the stitches and the
            cross-tap fold of the heads. Without images, stitches are the identity and heads are the experts'.
        known: See `fit_stitches`.
        rank: See `Grower.grow`. Stitches and heads are fitted to the weights of this rank.
    """
    model = grower.grow(tree, rank)
    fits: dict[str, StitchFit] = {}
    if images is not None and isinstance(model.encoder, TreeEncoder):
        fits = fit_stitches(model, grower.experts, images, known)
    origins = {task: expert.origin() for task, expert in grower.experts.items()}
    record = _record(grower, model) | _measured(fits, images)
    model.provenance = merge_provenance(grower.base.origin(), origins, record)
    if images is not None:
        model = fold_shared(model, grower.experts, images)
    return model


def fold_shared(model: SimoModel, experts: Mapping[str, SimoModel], images: Any) -> SimoModel:
    """Fold the heads that can be folded. The head of a task that shares nothing fits its encoder already."""
    tasks = [task for task, head in model.heads.items() if is_foldable(head) and not _is_alone(model, task)]
    if not tasks:
        return model
    chosen = {task: experts[task] for task in tasks}
    # The images have been prepared already.
    folded = realign(model.select(tasks), chosen, images, variant="cross-tap", size=OWN_SIZE)
    heads = {task: folded.heads[task] if task in tasks else head for task, head in model.heads.items()}
    provenance = {**model.provenance, "realign": folded.provenance["realign"]}
    return SimoModel(model.encoder, model.tasks, heads, provenance).eval()


def _is_alone(model: SimoModel, task: str) -> bool:
    """Whether a task has the weights of its expert in all blocks."""
    encoder = model.encoder
    return isinstance(encoder, TreeEncoder) and task in encoder.alone


def _record(grower: Grower, model: SimoModel) -> dict[str, Any]:
    """The entry ``merge`` of the provenance."""
    if not isinstance(model.encoder, TreeEncoder):
        return describe_method(grower.method(tuple(model.tasks)), grower.schedule)
    tree = model.encoder.tree
    groups = dict.fromkeys(node.tasks for node in tree.nodes if len(node.tasks) > 1)
    made = {"+".join(group): describe_method(grower.method(group), grower.schedule) for group in groups}
    kept = {name: round(share, 4) for name, share in model.encoder.kept_shares(grower.weights).items()}
    return {
        "method": next(iter(made.values()))["method"] if made else "none",
        "tree": str(tree),
        "cost": round(tree.cost(model.encoder.shares()), 4),
        "groups": made,
        **({} if model.encoder.rank is None else {"branch_rank": model.encoder.rank, "difference_kept": kept}),
    }


def _measured(fits: Mapping[str, StitchFit], images: Any) -> dict[str, Any]:
    if not fits:
        return {}
    shown = {name: {"ridge": fit.ridge if math.isfinite(fit.ridge) else "none"} for name, fit in fits.items()}
    for name, fit in fits.items():
        if math.isfinite(fit.r2):
            shown[name] |= {"r2_before": round(fit.r2_before, 4), "r2": round(fit.r2, 4)}
    return {"stitch_images": len(images), "stitches": shown}
