"""`merge`: one encoder from the experts' encoders. A method or scale that is not given is chosen on images."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simomerge.assembly.alignment import Aligner, Trial
from simomerge.assembly.budget import distil_until
from simomerge.assembly.coefficients import learn_coefficients
from simomerge.assembly.experts import assemble, check_experts, with_parameters, with_statistics
from simomerge.assembly.images import prepare
from simomerge.assembly.realign import realign
from simomerge.assembly.scale import search_scale
from simomerge.assembly.sharing.cost import check_kind
from simomerge.assembly.sharing.grow import Grower, share_blocks
from simomerge.assembly.sharing.search import Tried, choose_tree
from simomerge.core.caution import warn
from simomerge.core.errors import InputError
from simomerge.core.pixels import OWN_SIZE
from simomerge.core.schema import check_whole
from simomerge.datasets.pictures import as_images
from simomerge.merging import Lines, MergeMethod, Schedule, TaskArithmetic, as_schedule, get_method
from simomerge.merging.tree import Tree, check_sharing
from simomerge.models.encoders.low_rank import check_rank
from simomerge.models.encoders.units import low_rank_of, unit_names
from simomerge.models.model import SimoModel, as_model, as_models
from simomerge.training.evaluate import shared_tasks


@dataclass(frozen=True)
class _Sharing:
    """Which blocks are shared; see `merge`."""

    share: Any
    budget: float | None
    budget_of: str
    rank: int | None


AUTO_METHODS: tuple[tuple[str, Schedule | None], ...] = (
    ("task-arithmetic", None),
    ("task-arithmetic", Lines()),
    ("ties", None),
)
"""What ``method="auto"`` tries, each with its best scale. Coefficients are then learned from the first one."""


def merge(
    base: SimoModel | str | Path,
    experts: Mapping[str, SimoModel | str | Path],
    method: str | MergeMethod = "task-arithmetic",
    scale: float | Mapping[str, Any] | str | None = None,
    validation: Any = None,
    images: Any = None,
    schedule: Schedule | Sequence[float] | str | None = None,
    count: int | None = None,
    size: tuple[int, int] | str | None = None,
    minutes: float | None = None,
    share: int | str | Mapping[Any, Any] | None = None,
    budget: float | None = None,
    budget_of: str = "parameters",
    branch_rank: int | None = None,
    **parameters: Any,
) -> SimoModel:
    """Merge the experts' encoders into one model that has the head of every expert.

    Args:
        base: The foundation encoder that all experts were fine-tuned from, or its folder or hub id.
        experts: One model, or its folder, per task; the key names the task.
        method: A name of `simomerge.merging.available()`, a method, or ``"auto"``, which tries several on ``images``,
            folds each, and returns the best one, folded.
        scale: The factor of the merged task vector. ``"auto"`` chooses it on the labels of ``validation``, after a
            fold; or without ``validation`` on ``images``, by how well the merge can be folded. ``"learned"`` learns one
            factor per expert and block on ``images`` (task arithmetic only).
        validation: A dataset with labels of every task, for ``scale="auto"`` and for ``"fisher"`` without statistics.
        images: Images without labels: a folder of pictures, a sequence of images, or a dataset; also for ``"regmean"``.
        schedule: Factors over the depth, such as ``"lines"``; see `simomerge.merging.as_schedule`.
        count: Number of images to use: by default 64 to choose a scale, 1,024 for ``"auto"`` with ``minutes``, and 256
            for everything else.
        size: (height, width) to which pictures of a folder or list are resized. By default they are cut and resized to
            the experts' training size, if that is recorded; ``"own"`` keeps their sizes.
        minutes: For ``"auto"``: distil the whole model after the fold for the rest of this time, if it suffices for
            50 steps.
        share: Which tasks share which blocks: the number of blocks that all share before each goes its own way, or a
            tree such as ``"6: all | each"``; see `simomerge.merging.tree`. The heads are folded on ``images``. By
            default all tasks share all blocks.
        budget: Choose the tree for this cost, in units of one encoder: on ``images``, or by the labels of
            ``validation`` if that is given, too.
        budget_of: What the budget counts: ``"parameters"`` of the blocks, or their ``"time"``, measured on this device
            for the first image. For plain transformers they are the same; in pyramids they differ.
        branch_rank: With ``share`` or ``budget``: store the linear layers of own blocks as differences of this rank to
            weights that all branches share. By default own blocks are stored in full.
        **parameters: Further parameters of the method.

    Returns:
        A new model, whose provenance records its origin and what was tried. Base and experts stay as they are.

    Raises:
        InputError: Experts that do not fit the base or each other (the message says how), a base that is not the
            experts' base, or no data for a choice.

    Warns:
        UserWarning: An expert records no base; the warning says how far its weights are from the given base.

    Example:
        >>> model = merge(base, experts, "ties", density=0.2, scale=0.4)          # doctest: +SKIP
        >>> model = merge(base, experts, "auto", images="photos/")                # doctest: +SKIP
        >>> model = merge(base, experts, budget=1.5, images="photos/")            # doctest: +SKIP
    """
    if count is not None:
        check_whole("count", count)
    base, experts, plan = as_model(base), as_models(experts), as_schedule(schedule)
    pictures = None if images is None else prepare(images, experts, size=size)
    if share is not None or budget is not None:
        given = {"method": method, "scale": scale, "validation": validation, "minutes": minutes}
        return _shared(
            base, experts, pictures, _Sharing(share, budget, budget_of, branch_rank), given, plan, count, parameters
        )
    if budget_of != "parameters":
        raise InputError("budget_of is what a budget counts: give budget too, or leave it out.")
    if branch_rank is not None:
        raise InputError("branch_rank is the rank of own blocks: give share or budget too, or leave it out.")
    if method == "auto":
        given = {**parameters, "scale": scale, "schedule": schedule, "validation": validation}
        return _auto(base, experts, pictures, count, minutes, given)
    if minutes is not None:
        raise InputError("minutes is the time of method='auto'; leave it out, or give that method.")
    if not isinstance(scale, str):
        chosen = with_parameters(method, {**parameters, "scale": scale} if scale is not None else parameters)
        experts = check_experts(base, experts)
        data = _statistics_data(chosen, images, pictures, count) if validation is None else validation
        return assemble(base, experts, with_statistics(chosen, experts, data), plan)
    if scale == "learned":
        with_parameters(method, parameters)  # raises for a misspelt parameter
        return _learned(base, experts, method, pictures, count, plan)
    if scale != "auto":
        raise InputError(f"scale {scale!r}: give a number, 'auto' or 'learned'.")
    searched = with_parameters(method, {**parameters, "scale": 1.0})
    return _with_best_scale(base, experts, searched, validation, pictures, count, plan)


def _statistics_data(method: MergeMethod, given: Any, pictures: Any, count: int | None) -> Any:
    """What the statistics of a method are computed on: the images, with their labels if it needs them."""
    if pictures is None:
        return None
    if method.needs_labels:
        if not getattr(given, "tasks", None):
            raise InputError(
                f"{method.name!r} computes with labels: give validation=, or a dataset with labels as images."
            )
        return given.up_to(256 if count is None else count)
    return as_images(pictures, 256 if count is None else count)


def _shared(
    base: SimoModel,
    experts: Mapping[str, SimoModel],
    images: Any,
    wanted: _Sharing,
    given: Mapping[str, Any],
    schedule: Schedule | None,
    count: int | None,
    parameters: Mapping[str, Any],
) -> SimoModel:
    """Share blocks as a tree says, or as a budget allows. A scale of "auto" is chosen for each group of tasks."""
    share, budget, rank, method, scale = wanted.share, wanted.budget, wanted.rank, given["method"], given["scale"]
    check_sharing(share, budget, list(experts))
    check_kind(wanted.budget_of)
    if rank is not None:
        check_rank(rank)
    if method == "auto" or scale == "learned" or given["minutes"] is not None:
        raise InputError("a tree of shared blocks needs a merge method, and a number or 'auto' as scale.")
    data = given["validation"]
    if data is not None and budget is None:
        raise InputError("labels choose a tree for a budget only; leave validation out.")
    if data is not None and (missing := [task for task in experts if task not in data.tasks]):
        raise InputError(f"budget={budget}: the validation data has no labels of {', '.join(missing)}.")
    if images is None:
        raise InputError("a tree of shared blocks is fitted on images without labels: give images=, such as a folder.")
    searched = isinstance(scale, str)
    if searched and scale != "auto":
        raise InputError(f"scale {scale!r}: give a number, or 'auto'.")
    if scale is not None:
        parameters = {**parameters, "scale": 1.0 if searched else scale}
    chosen = with_parameters(method, parameters)
    if chosen.needs_labels:
        raise InputError(f"{chosen.name} needs labels, and a tree of shared blocks uses none: give another method.")
    experts = check_experts(base, experts)
    if data is not None:
        shared_tasks({task: expert.tasks[task] for task, expert in experts.items()}, data.tasks)
    encoder = next(iter(experts.values())).encoder
    tree = None if budget is not None else Tree.of(share, list(experts), len(unit_names(encoder)), encoder.layout.unit)
    if rank is not None:
        low_rank_of(encoder, rank)  # raises if it has blocks that cannot be low-rank differences
        if tree is not None and tree.is_trivial:
            raise InputError("all tasks share all blocks, so that no own block could have a rank: leave it out.")
    images = as_images(images, 256 if count is None else count).readable()
    chosen = with_statistics(chosen, experts, images)

    def with_best_scale(group: Sequence[str]) -> MergeMethod:
        return Aligner(base, {task: experts[task] for task in group}, images, 64).best_scale(chosen, schedule).method

    grower = Grower(base, experts, with_best_scale if searched else chosen, schedule)
    if tree is not None:
        return share_blocks(grower, tree, images, rank=rank)
    assert budget is not None
    found = choose_tree(grower, images, budget, data, wanted.budget_of)
    if rank is not None and found.tree.is_trivial:
        warn("the tree that was chosen has no own blocks, so that the branch rank changes nothing.")
    model = share_blocks(grower, found.tree, images, rank=rank)
    model.provenance["merge"] |= _chosen(wanted, found, data is not None)
    return model


def _chosen(wanted: _Sharing, found: Tried, labelled: bool) -> dict[str, Any]:
    """What the provenance says of the choice for a budget."""
    losses = {task: None if loss is None else round(loss, 4) for task, loss in found.losses.items()}
    measured = {"time": round(found.cost, 4)} if wanted.budget_of == "time" else {}
    return {"budget": wanted.budget, **measured, "loss" if labelled else "disagreement": losses}


def _with_best_scale(
    base: SimoModel,
    experts: Mapping[str, SimoModel],
    method: MergeMethod,
    validation: Any,
    images: Any,
    count: int | None,
    schedule: Schedule | None,
) -> SimoModel:
    """Choose the scale on labels, or without them on images."""
    if validation is None and images is not None:
        aligner = Aligner(base, experts, images, 64 if count is None else count)
        method = with_statistics(method, aligner.experts, aligner.images)
        return _assembled(aligner, aligner.best_scale(method, schedule))
    if schedule is not None:
        raise InputError("scale='auto' on labels and a schedule do not go together: give a number as scale.")
    return search_scale(base, experts, method, validation).model


def _learned(
    base: SimoModel,
    experts: Mapping[str, SimoModel],
    method: str | MergeMethod,
    images: Any,
    count: int | None,
    schedule: Schedule | None,
) -> SimoModel:
    name = method if isinstance(method, str) else method.name
    if name != "task-arithmetic" or schedule is not None:
        raise InputError(
            "scale='learned' works with task arithmetic without a schedule: leave method and schedule out."
        )
    if images is None:
        raise InputError("scale='learned' needs images without labels: give images=, such as a folder.")
    aligner = Aligner(base, experts, images, 64)
    start: Any = aligner.best_scale(TaskArithmetic()).method
    learned = learn_coefficients(base, experts, images, start.scale, count=256 if count is None else count)
    model = assemble(base, aligner.experts, learned)
    model.provenance["merge"]["scale_chosen_on"] = "unlabelled images, by matching the experts' predictions"
    return model


def _auto(
    base: SimoModel,
    experts: Mapping[str, SimoModel],
    images: Any,
    count: int | None,
    minutes: float | None,
    given: Mapping[str, Any],
) -> SimoModel:
    """Try `AUTO_METHODS` and learned coefficients, take the best by agreement, fold it cross tap, and distil it."""
    ends = None if minutes is None else time.monotonic() + 60 * minutes
    if images is None:
        raise InputError("method='auto' needs images without labels: give images=, such as a folder.")
    if wrong := [name for name, value in given.items() if value is not None]:
        raise InputError(f"method='auto' chooses {wrong[0]!r} itself; leave it out, or name a method.")
    if minutes is not None and not 0 < minutes < math.inf:
        raise InputError(f"minutes is {minutes}; give a number above 0.")
    experts = check_experts(base, experts)
    most = (256 if minutes is None else 1024) if count is None else count
    images = as_images(images, most).readable(one_size=True)
    few = images if minutes is None else as_images(images, 256)
    aligner = Aligner(base, experts, few, min(len(few), 64))
    has_blocks = base.encoder.depth(name for name, _ in base.encoder.backbone.named_parameters()).blocks > 0
    tried = [
        aligner.best_scale(get_method(name), schedule)
        for name, schedule in AUTO_METHODS
        if schedule is None or has_blocks
    ]
    plain: Any = tried[0].method
    aligner.try_out(learn_coefficients(base, experts, few, plain.scale, rounds=1))
    merged = _assembled(aligner, aligner.best)
    folded = realign(merged, experts, few, variant="cross-tap", size=OWN_SIZE)
    return folded if ends is None else distil_until(ends, folded, merged, experts, images)


def _assembled(aligner: Aligner, chosen: Trial) -> SimoModel:
    """The merge of a trial, with all trials in its provenance."""
    model = assemble(aligner.base, aligner.experts, chosen.method, chosen.schedule)
    model.provenance["merge"]["scale_chosen_on"] = (
        f"{len(aligner.images)} unlabelled images, by agreement with the experts"
    )
    model.provenance["merge"]["tried"] = [trial.describe() for trial in aligner.trials]
    return model
