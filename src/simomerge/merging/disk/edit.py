"""Add a task to a merged model later, or remove one, based on what its simo.json records about the merge."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.checkpoints.card import realignments
from simomerge.checkpoints.experts import check_base, check_merged_from, check_plain_merge, merge_provenance
from simomerge.checkpoints.names import canonical_name
from simomerge.checkpoints.parts import parts_of, separated
from simomerge.checkpoints.tensors import tensor_info
from simomerge.checkpoints.writing import storage_layout
from simomerge.core.caution import warn
from simomerge.core.errors import InputError
from simomerge.merging import (
    LinearMethod,
    MergeMethod,
    Schedule,
    describe_method,
    described_method,
    merge_tensors,
    warn_of_other_tensors,
    with_experts,
)
from simomerge.merging.disk.merge import MergedOnDisk, warn_of_unrecorded_bases
from simomerge.merging.disk.output import Output, write_model
from simomerge.merging.disk.sources import Source, open_source, without_extras
from simomerge.merging.method import restricted

_Paths = Mapping[str, str | os.PathLike[str]]


def edit_on_disk(
    model: str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    add: _Paths | None = None,
    remove: Mapping[str, str | os.PathLike[str] | None] | None = None,
    others: _Paths | None = None,
    overwrite: bool = False,
) -> MergedOnDisk:
    """Add tasks to a merged model or remove some, with the merge method and the parameters that it records.

    For a weighted sum of task vectors (average, weighted average, task arithmetic without a schedule), only the
    experts that are added or removed are needed. Every other method merges again and needs all that stay instead. The
    tasks that stay keep the model's heads. If these were re-aligned, it was with the old encoder; a warning reports
    that.

    Args:
        model: a merged model folder.
        base: the base it was merged from.
        output: the folder to write; the model itself, with ``overwrite``, is edited in place.
        add: task -> expert (model folders).
        remove: task -> expert, or None where the method does not need it.
        others: task -> expert for the tasks that stay, where the method needs them.
        overwrite: replace ``output`` if it exists.

    Raises:
        InputError: a model that is not a plain merge (without provenance, with adapters, or with an encoder that a
            re-alignment changed), another base or expert than it records, a missing expert, and whatever
            ``merge_on_disk`` raises.

    Example:
        >>> edit_on_disk("scene", "rooms-base", "scene-2", add={"edges": "runs/edges"})        # doctest: +SKIP
    """
    if not add and not remove:
        raise InputError("nothing to do: name a task to add or to remove.")
    target = Output(Path(output), overwrite=overwrite)
    merged = open_source(model)
    _check_editable(merged)
    foundation = without_extras(open_source(base), {"model": merged})
    given = {task: path for task, path in (remove or {}).items() if path is not None}
    opened = (_opened(add, foundation), _opened(given, foundation), _opened(others, foundation))
    edit = _Edit(merged, foundation, *opened, tuple(remove or ()))
    in_place = target.path.exists() and target.path.samefile(merged.path)
    target.check(
        [*([] if in_place else [merged]), foundation, *edit.add.values(), *edit.remove.values(), *edit.others.values()]
    )
    edit.check()
    method, schedule = edit.method()
    tensors = edit.tensors(method, schedule)
    if "realign" in merged.provenance:
        warn("the heads that stay were re-aligned with the old encoder: re-align the new model.")
    how = {**merged.provenance["merge"], **describe_method(restricted(method, edit.tasks), schedule)}
    heads = {task: edit.add.get(task, merged) for task in edit.tasks}
    layout = storage_layout(foundation.weights, _stored_dtypes(merged, foundation))
    read = [foundation, merged, *edit.remove.values(), *edit.others.values()]
    write_model(target, heads, edit.provenance(how), tensors, layout, read)
    return MergedOnDisk(target.path, how, tuple(edit.tasks))


@dataclass(frozen=True)
class _Edit:
    """A merged model, its base, the experts that are added, removed or stay, by task, and the tasks that leave."""

    merged: Source
    base: Source
    add: dict[str, Source]
    remove: dict[str, Source]
    others: dict[str, Source]
    leaving: tuple[str, ...]

    @property
    def present(self) -> list[str]:
        """The tasks before the edit, in the order in which they were merged."""
        return list(self.merged.provenance["experts"])

    @property
    def described(self) -> list[str]:
        """The tasks before the edit that have a head. A part of a merged model has fewer than experts."""
        return list((self.merged.description or {})["tasks"])

    @property
    def tasks(self) -> list[str]:
        """The tasks after the edit."""
        return [task for task in self.present if task not in self.leaving] + list(self.add)

    def check(self) -> None:
        """Raise InputError for a base or an expert that does not belong to the model."""
        if unknown := [task for task in (*self.others, *self.leaving) if task not in self.present]:
            raise InputError(f"expert {unknown[0]!r} is not in the merged model, which has {', '.join(self.present)}.")
        for experts in (self.others, self.remove):
            check_merged_from(self.merged.provenance, experts, self.base)
        headless = [task for task in self.tasks if task not in self.add and task not in self.described]
        if headless:
            raise InputError(
                f"{self.merged.path}: it was merged from {', '.join(self.present)}, but has no head for"
                f" {', '.join(headless)}. Edit the model from before that head was left out, or remove"
                f" {headless[0]!r} too."
            )
        unrecorded = check_base(self.base, self.add)
        if bare := [source.path for source in self.add.values() if source.description is None]:
            raise InputError(f"{bare[0]}: not a model folder (no simo.json in it), so it has no head; give one.")
        if twice := [task for task in self.add if task in self.present]:
            raise InputError(f"the expert '{twice[0]}' is in the merged model already: remove it first.")
        warn_of_other_tensors(self.base.weights, {task: source.weights for task, source in self.add.items()})
        warn_of_unrecorded_bases(self.base, {task: self.add[task] for task in unrecorded}, None)
        same = [
            task for task, each in self.add.items() if each.origin()["fingerprint"] == self.base.origin()["fingerprint"]
        ]
        if same:
            warn(f"The task vector of {', '.join(same)} is zero: the weights equal the base's.")

    def method(self) -> tuple[MergeMethod, Schedule | None]:
        """The method and the schedule that the model records."""
        method, schedule = described_method(self.merged.provenance["merge"])
        if method.needs_data:
            raise InputError(
                f"'{method.name}' computed with images, which the model does not record: merge all the experts again."
            )
        method = method.for_experts(self.present)  # a list of parameters is in the recorded order of experts
        each = [name for name, value in vars(method).items() if isinstance(value, Mapping)]
        if each and self.add:
            raise InputError(
                f"'{method.name}' has a {each[0]} for each expert ({', '.join(self.present)}), and none is recorded for"
                f" {', '.join(self.add)}: merge all the experts again."
            )
        return method, schedule

    def tensors(self, method: MergeMethod, schedule: Schedule | None) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors of the edited encoder."""
        if isinstance(method, LinearMethod) and schedule is None:
            if bare := [task for task in self.leaving if task not in self.remove]:
                raise InputError(
                    f"'{method.name}' subtracts the expert that leaves, so its weights are needed: remove"
                    f" {bare[0]}=EXPERT."
                )
            add, remove = ({task: source.weights for task, source in some.items()} for some in (self.add, self.remove))
            return with_experts(
                self.merged.weights, self.base.weights, method, self.present, add, remove, self.merged.blocks
            )
        given = {**self.others, **self.add}
        if missing := [task for task in self.tasks if task not in given]:
            raise InputError(
                f"'{method.name}' weighs every entry by all the experts: give those that stay too"
                f" ({', '.join(missing)})."
            )
        weights = {task: given[task].weights for task in self.tasks}
        method = restricted(method, self.tasks)
        return merge_tensors(self.base.weights, weights, method, schedule, blocks=self.merged.blocks)

    def provenance(self, how: Mapping[str, Any]) -> dict[str, Any]:
        """What the edited model records: the added experts, and what the model recorded about the others."""
        recorded = self.merged.provenance
        origins = {t: self.add[t].origin() if t in self.add else recorded["experts"][t] for t in self.tasks}
        made = merge_provenance(recorded["base"], origins, how)
        earlier = self._repaired()
        if earlier or "scale_chosen_on" in how:  # true of the model before the edit only
            made["edited"] = {"added": list(self.add), "removed": list(self.leaving), **earlier}
        return made

    def _repaired(self) -> dict[str, Any]:
        """The tasks whose heads were re-aligned with the encoder before an edit, and the re-alignments."""
        recorded = self.merged.provenance
        known = recorded.get("edited", {}).get("realigned", {"tasks": [], "by": []})
        if steps := realignments(recorded):
            known = {"tasks": self.present, "by": steps}
        tasks = [task for task in known["tasks"] if task not in self.leaving]
        return {"realigned": {**known, "tasks": tasks}} if tasks else {}


def _stored_dtypes(merged: Source, base: Source) -> dict[str, str]:
    """The storage dtype of every tensor of a merged model by its name in the base, which may spell it differently."""
    parts = separated(merged.weights)
    found = {canonical_name(name): tensor_info(parts, name).dtype for name in parts}
    known = {own: found.get(canonical_name(parts_of(own)[0])) for own in base.weights}
    return {own: dtype for own, dtype in known.items() if dtype}


def _opened(paths: _Paths | None, base: Source) -> dict[str, Source]:
    return {task: open_source(path, base.weights) for task, path in (paths or {}).items()}


def _check_editable(merged: Source) -> None:
    """Raise InputError if the model is not the plain merge of experts that it records."""
    if merged.description is None:
        raise InputError(f"{merged.path}: not a model folder (no simo.json in it); give one that a merge wrote.")
    if not all(key in merged.provenance for key in ("base", "experts", "merge")):
        raise InputError(f"{merged.path}: its simo.json does not record what it was merged from; merge the experts.")
    if merged.description["adapters"]:
        raise InputError(
            f"{merged.path}: has adapters in addition to its blocks, which fit only its weights. Edit the model from"
            " before they were added, and re-align the result."
        )
    check_plain_merge(merged)
