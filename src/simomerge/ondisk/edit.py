"""Add a task to a merged model later, or remove one, from what its simo.json says it was made of."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.checkpoints import Checkpoint, tensor_info
from simomerge.errors import InputError
from simomerge.merging import LinearMethod, described_method, merge_tensors, with_experts
from simomerge.ondisk.merge import MergedOnDisk, Source, open_source, write_model
from simomerge.progress import Progress, silent


def edit_on_disk(
    model: str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    add: Mapping[str, str | os.PathLike[str]] | None = None,
    remove: Mapping[str, str | os.PathLike[str]] | None = None,
    others: Mapping[str, str | os.PathLike[str]] | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
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
            method needs, adapters beside its blocks, and what ``merge_on_disk`` raises.

    Example:
        >>> edit_on_disk("scene", "rooms-base", "scene-2", add={"edges": "runs/edges"})        # doctest: +SKIP
    """
    output, add, remove, others = Path(output), dict(add or {}), dict(remove or {}), dict(others or {})
    if not add and not remove:
        raise InputError("nothing to do: name a task to add or to remove.")
    if output.exists() and not overwrite:
        raise InputError(f"{output} already exists: choose another path, or pass overwrite to replace it.")
    merged, foundation = open_source(model), open_source(base)
    assert isinstance(foundation.weights, Checkpoint)
    recorded = _recorded(merged)
    opened = {t: open_source(path, foundation.weights) for t, path in {**others, **remove, **add}.items()}
    _check_recorded(recorded, foundation, {task: opened[task] for task in (*others, *remove)})
    after = [task for task in recorded["experts"] if task not in remove] + list(add)
    tensors = _tensors(merged, foundation, opened, recorded, add, remove, after)
    heads = {task: opened[task] if task in add else merged for task in after}
    provenance = {
        "base": recorded["base"],
        "experts": {task: opened[task].origin() if task in add else recorded["experts"][task] for task in after},
        "merge": recorded["merge"],
    }
    if "realign" in recorded:
        warnings.warn(
            "the heads that stay were re-aligned with the old encoder: re-align the new model again.", stacklevel=2
        )
    layout = {name: tensor_info(foundation.weights, name) for name in foundation.weights}
    stored = {name: merged.weights.info(name).dtype for name in merged.weights}  # type: ignore[attr-defined]
    dtypes = {name: dtype for name, dtype in stored.items() if name in layout and layout[name].is_float}
    write_model(output, heads, provenance, tensors, layout, dtypes or None, overwrite=overwrite, progress=progress)
    return MergedOnDisk(output, recorded["merge"], tuple(after))


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
    return provenance


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
    recorded: Mapping[str, Any],
    add: Mapping[str, Any],
    remove: Mapping[str, Any],
    after: list[str],
) -> Iterator[tuple[str, np.ndarray]]:
    method, schedule = described_method(recorded["merge"])
    if isinstance(method, LinearMethod) and schedule is None:
        added, removed = ({task: opened[task].weights for task in some} for some in (add, remove))
        return with_experts(merged.weights, base.weights, method, list(recorded["experts"]), added, removed)
    if missing := [task for task in after if task not in opened]:
        raise InputError(
            f"'{method.name}' weighs every entry by all the experts: give those that stay too ({', '.join(missing)})."
        )
    return merge_tensors(base.weights, {task: opened[task].weights for task in after}, method, schedule)
