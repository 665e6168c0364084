"""Add tasks to a model of shared and own blocks, or remove some: the tree changes, and its parts are made again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from simomerge.assembly.experts import check_experts
from simomerge.assembly.images import prepare
from simomerge.assembly.sharing.grow import Grower, share_blocks
from simomerge.checkpoints.experts import check_merged_from, check_plain_merge
from simomerge.core.errors import InputError
from simomerge.datasets.pictures import as_images
from simomerge.merging import MergeMethod, Schedule, described_method
from simomerge.merging.method import restricted
from simomerge.merging.tree import Group, Tree
from simomerge.models.encoders import TreeEncoder
from simomerge.models.model import SimoModel, as_model, as_models


def edit_tree(
    model: SimoModel | str | Path,
    base: SimoModel | str | Path,
    experts: Mapping[str, SimoModel | str | Path],
    images: Any,
    remove: Collection[str] = (),
    share: int | str | Mapping[Any, Any] | None = None,
    count: int | None = None,
    size: tuple[int, int] | str | None = None,
) -> SimoModel:
    """Add tasks to a model whose tasks share blocks as a tree says, or remove some.

    A group of tasks that stays keeps its merge. Other groups are merged as the recorded group that is most like them.
    Stitches and heads are fitted again on the images. The rank of own blocks stays.

    Args:
        model: The model, or its folder.
        base: The base that it was merged from.
        experts: The experts of all tasks after the edit, those that stay and those that are added, by task.
        images: Images without labels, as `simomerge.merge` takes them.
        remove: Tasks to remove.
        share: The new tree, as `simomerge.merge` takes it. By default a task that is added shares the blocks that all
            tasks share, and then has its own.
        count: Number of images to use, 256 by default.
        size: As in `simomerge.merge`.

    Returns:
        A new model; the given one stays as it is.

    Raises:
        InputError: A model without a tree or without a record of its merge, whose encoder a re-alignment changed, an
            expert that is missing or not the recorded one, an unknown task, or a single task that stays.

    Example:
        >>> edit_tree("scene", "rooms-base", experts, "photos/", remove=["depth"])              # doctest: +SKIP
    """
    model, base, experts = as_model(model), as_model(base), as_models(experts)
    encoder = _tree_of(model)
    before = encoder.tree
    present = [task for task in before.tasks if task in model.tasks]  # a path may lead to tasks that were left out
    staying = [task for task in present if task not in remove]
    _check(model, present, base, experts, remove)
    kept = before
    for task in experts:
        kept = kept if task in before.tasks else kept.joined_by(task)
    kept = kept.without([task for task in before.tasks if task not in experts])
    order = [*staying, *(task for task in experts if task not in staying)]
    tree = kept if share is None else Tree.of(share, order, before.blocks, encoder.layout.unit)
    checked = check_experts(base, {task: experts[task] for task in order})
    pictures = as_images(prepare(images, checked, size=size), 256 if count is None else count).readable()
    methods = _Methods(model.provenance["merge"]["groups"])
    return share_blocks(Grower(base, checked, methods, methods.schedule), tree, pictures, rank=encoder.rank)


class _Methods:
    """The merge of a group of tasks, by what a model records about its groups."""

    def __init__(self, recorded: Mapping[str, Mapping[str, Any]]) -> None:
        found = {tuple(name.split("+")): described_method(how) for name, how in recorded.items()}
        self.known = {group: method for group, (method, _) in found.items()}
        self.schedule: Schedule | None = next((schedule for _, schedule in found.values()), None)

    def __call__(self, group: Group) -> MergeMethod:
        alike = max(self.known, key=lambda other: (len(set(other) & set(group)), -len(set(other) - set(group))))
        if not set(group) <= set(alike) and any(
            isinstance(v, (Mapping, list)) for v in vars(self.known[alike]).values()
        ):
            raise InputError(
                f"the merge of {', '.join(alike)} has parameters for each expert, and none for the others of"
                f" {', '.join(group)}: merge all experts again."
            )
        return restricted(self.known[alike], group)


def _tree_of(model: SimoModel) -> TreeEncoder:
    if not isinstance(model.encoder, TreeEncoder):
        raise InputError(f"{model.place}: its tasks share one encoder; it has no tree that could change.")
    return model.encoder


def _check(
    model: SimoModel, present: list[str], base: SimoModel, experts: Mapping[str, SimoModel], remove: Collection[str]
) -> None:
    """Raise InputError for an edit that cannot be."""
    groups = model.provenance.get("merge", {}).get("groups")
    if groups is None:
        raise InputError(f"{model.place}: its simo.json records no merge of a group of tasks; merge the experts again.")
    if not groups:
        raise InputError(
            f"{model.place}: its tasks share no block, so that it records no merge that an edit could repeat; merge the"
            " experts of the tasks that you want."
        )
    check_plain_merge(model)
    if unknown := [task for task in remove if task not in present]:
        raise InputError(f"task {unknown[0]!r} is not in {model.place}, which has {', '.join(present)}.")
    staying = [task for task in present if task not in remove]
    if missing := [task for task in staying if task not in experts]:
        raise InputError(
            f"own blocks, stitches and heads are made again: give the experts that stay, too ({', '.join(missing)})."
        )
    if both := [task for task in experts if task in remove]:
        raise InputError(f"task {both[0]!r} is removed, and its expert is given; leave one out.")
    if set(experts) == set(present):
        raise InputError(
            "nothing to do: name a task to add or to remove. For another tree of the same tasks, merge their experts"
            " again: simomerge merge --share TREE, or simomerge.merge(..., share=)."
        )
    if len(experts) < 2:
        raise InputError(f"only {', '.join(experts) or 'no task'} stays, and its expert has that encoder already.")
    check_merged_from(model.provenance, {task: experts[task] for task in staying}, base)
