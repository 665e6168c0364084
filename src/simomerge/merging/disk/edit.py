"""Add a task to a merged model later, or remove one, from what its simo.json says it was made of."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.checkpoints import Checkpoint, tensor_info
from simomerge.core.errors import InputError
from simomerge.merging import (
    LinearMethod,
    MergeMethod,
    Schedule,
    describe_method,
    described_method,
    merge_tensors,
    with_experts,
)
from simomerge.merging.disk.merge import (
    MergedOnDisk,
    Source,
    check_base,
    check_output,
    open_source,
    without_extras,
    write_model,
)
from simomerge.merging.method import restricted


def edit_on_disk(
    model: str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    add: Mapping[str, str | os.PathLike[str]] | None = None,
    remove: Mapping[str, str | os.PathLike[str]] | None = None,
    others: Mapping[str, str | os.PathLike[str]] | None = None,
    overwrite: bool = False,
) -> MergedOnDisk:
    """A merged model with tasks added or removed; the merge method and its parameters are those it records.

    A weighted sum of task vectors (average, weighted average, task arithmetic without a schedule) needs the experts
    that come and go only. Every other method merges anew and needs all the others too. The heads of the tasks
    that stay are the model's own; where they were re-aligned, they were to the old encoder, and a warning says so.

    Args:
        model: a merged model folder.
        base: the base it was merged from.
        output: the folder to write.
        add, remove: task -> expert (model folders).
        others: task -> expert for those that stay, where the method needs them.

    Raises:
        InputError: a model that no merge made, another base or expert than it records, an expert missing that the
            method needs, adapters beside its blocks or LoRA folded into its weights, and what ``merge_on_disk`` raises.

    Example:
        >>> edit_on_disk("scene", "rooms-base", "scene-2", add={"edges": "runs/edges"})        # doctest: +SKIP
    """
    output, add, remove, others = Path(output), dict(add or {}), dict(remove or {}), dict(others or {})
    if not add and not remove:
        raise InputError("nothing to do: name a task to add or to remove.")
    merged = open_source(model)
    recorded = _recorded(merged)
    foundation = without_extras(open_source(base), {"model": merged})
    assert isinstance(foundation.weights, Checkpoint)
    opened = {t: open_source(path, foundation.weights) for t, path in {**others, **remove, **add}.items()}
    check_output(output, [merged, foundation, *opened.values()], overwrite)
    _check_recorded(recorded, foundation, {task: opened[task] for task in (*others, *remove)})
    check_base(recorded["base"], {task: opened[task] for task in add})
    if bare := [opened[task].path for task in add if opened[task].description is None]:
        raise InputError(f"{bare[0]}: not a model folder (no simo.json in it), and so without a head; give one.")
    if twice := [task for task in add if task in recorded["experts"]]:
        raise InputError(f"the expert '{twice[0]}' is in the merged model already: remove it first.")
    after = [task for task in recorded["experts"] if task not in remove] + list(add)
    method, schedule = described_method(recorded["merge"])
    if method.needs_data:
        raise InputError(f"'{method.name}' computed with images, which the model does not record: merge all anew.")
    method = method.for_experts(list(recorded["experts"]))  # a sequence goes with the experts in the recorded order
    tensors = _tensors(merged, foundation, opened, method, schedule, list(recorded["experts"]), add, remove, after)
    how = {**recorded["merge"], **describe_method(restricted(method, after), schedule)}
    heads = {task: opened[task] if task in add else merged for task in after}
    provenance = {
        "base": recorded["base"],
        "experts": {task: opened[task].origin() if task in add else recorded["experts"][task] for task in after},
        "merge": how,
    }
    if "realign" in recorded:
        warnings.warn(
            "the heads that stay were re-aligned with the old encoder: re-align the new model again.", stacklevel=2
        )
    layout = {name: tensor_info(foundation.weights, name) for name in foundation.weights}
    stored = {name: merged.weights.info(name).dtype for name in merged.weights}  # type: ignore[attr-defined]
    dtypes = {name: dtype for name, dtype in stored.items() if name in layout and layout[name].is_float}
    write_model(output, heads, provenance, tensors, layout, dtypes or None, overwrite=overwrite)
    return MergedOnDisk(output, how, tuple(after))


def _recorded(merged: Source) -> dict[str, Any]:
    """What the model says it was made of."""
    description = merged.description
    if description is None:
        raise InputError(f"{merged.path}: not a model folder (no simo.json in it); give one that a merge wrote.")
    provenance = description["provenance"]
    if not all(key in provenance for key in ("base", "experts", "merge")):
        raise InputError(f"{merged.path}: its simo.json does not say what it was merged from; merge the experts anew.")
    if description["adapters"]:
        raise InputError(f"{merged.path}: has adapters beside its blocks, which fit its weights only; edit the merge.")
    if _holds_lora(provenance.get("realign")):
        raise InputError(f"{merged.path}: LoRA was folded into its weights, which are no merge now; edit the merge.")
    return provenance


def _holds_lora(record: Mapping[str, Any] | None) -> bool:
    """Whether a re-alignment, or one that it started from, folded LoRA into the encoder."""
    if record is None:
        return False
    return "lora" in (record.get("method"), record.get("adapters")) or _holds_lora(record.get("after"))


def _check_recorded(recorded: Mapping[str, Any], base: Source, experts: Mapping[str, Source]) -> None:
    for what, source, origin in (
        ("the base", base, recorded["base"]),
        *((f"expert {task!r}", source, recorded["experts"].get(task)) for task, source in experts.items()),
    ):
        if origin is None:
            raise InputError(f"{what} is not in the merged model, which has {', '.join(recorded['experts'])}.")
        if source.origin()["fingerprint"] != origin["fingerprint"]:
            raise InputError(
                f"{source.path}: not what the model was merged from as {what} ({origin['source']}, fingerprint"
                f" {origin['fingerprint'][:12]}); give that one."
            )


def _tensors(
    merged: Source,
    base: Source,
    opened: Mapping[str, Source],
    method: MergeMethod,
    schedule: Schedule | None,
    before: list[str],
    add: Mapping[str, Any],
    remove: Mapping[str, Any],
    after: list[str],
) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(method, LinearMethod) and schedule is None:
        added, removed = ({task: opened[task].weights for task in some} for some in (add, remove))
        return with_experts(merged.weights, base.weights, method, before, added, removed)
    if missing := [task for task in after if task not in opened]:
        raise InputError(
            f"'{method.name}' weighs every entry by all the experts: give those that stay too ({', '.join(missing)})."
        )
    weights = {task: opened[task].weights for task in after}
    return merge_tensors(base.weights, weights, restricted(method, after), schedule)
