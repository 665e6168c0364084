"""Merge checkpoints from disk to disk, a tensor of each model in memory, without torch and transformers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simomerge.checkpoints.experts import (
    check_base,
    check_plain,
    merge_provenance,
    warn_of_unrecorded_base,
)
from simomerge.checkpoints.writing import storage_layout
from simomerge.merging import (
    Merged,
    MergeMethod,
    Schedule,
    TaskVectorStream,
    as_schedule,
    check_models,
    describe_method,
    get_method,
    sampled_distances,
    warn_of_other_tensors,
)
from simomerge.merging.disk.output import Output, describe_heads, write_model, write_weights
from simomerge.merging.disk.sources import Source, open_experts


@dataclass(frozen=True)
class MergedOnDisk:
    """What a merge wrote: where, how, and with which tasks (none where only weights were merged)."""

    output: Path
    merge: dict[str, Any]
    tasks: tuple[str, ...]


def merge_on_disk(
    base: str | os.PathLike[str],
    experts: Mapping[str, str | os.PathLike[str]],
    output: Output | str | os.PathLike[str],
    method: str | MergeMethod = "task-arithmetic",
    schedule: Schedule | Sequence[float] | str | None = None,
    **parameters: Any,
) -> MergedOnDisk:
    """Merge experts' encoders from disk to disk, streaming.

    If every expert is a model folder and ``output`` is not a file, the result is a model folder with all the heads.
    Otherwise only weights are merged, into a file or a transformers folder.

    Args:
        base: the base: a weight file, a transformers or model folder, or ``rooms-base``.
        experts: expert name (for model folders: the task) -> the same, or a peft LoRA adapter folder.
        output: a folder, a file ``*.safetensors``, or an `Output`, which also has a dtype and other settings.
        method, schedule, **parameters: see `simomerge.merging.merge_tensors`.

    Raises:
        InputError: an output that exists or contradicts its settings, a damaged input, models that do not fit, a base
            other than the experts record, an unknown method or parameter, no space left. Nothing is written then.

    Example:
        >>> from simomerge.checkpoints import open_checkpoint, write_safetensors
        >>> for name, value in (("base", 4), ("depth", 5), ("normals", 6)):
        ...     _ = write_safetensors(f"{name}.safetensors", {"w": np.full(2, value, np.float32)})
        >>> experts = {"depth": "depth.safetensors", "normals": "normals.safetensors"}
        >>> merged = merge_on_disk("base.safetensors", experts, "merged.safetensors", "average")
        >>> open_checkpoint(merged.output)["w"]
        array([5.5, 5.5], dtype=float32)
    """
    target = output if isinstance(output, Output) else Output(Path(output))
    chosen = method if isinstance(method, MergeMethod) else get_method(method, **parameters)
    depthwise = as_schedule(schedule)
    foundation, opened = open_experts(base, experts)
    target.check([foundation, *opened.values()])
    for name, expert in opened.items():
        check_plain(name, expert.description or {})
    makes_model = not target.is_file and bool(opened) and all(expert.description for expert in opened.values())
    if makes_model:
        describe_heads(opened)  # reports heads that do not fit before the long work
    weights = {name: expert.weights for name, expert in opened.items()}
    check_models(chosen, foundation.weights, weights)
    warn_of_other_tensors(foundation.weights, weights)
    unrecorded = {name: opened[name] for name in check_base(foundation, opened)}
    warn_of_unrecorded_bases(foundation, unrecorded, target.threads)
    how, layout = describe_method(chosen, depthwise), storage_layout(foundation.weights, target.storage)
    blocks = foundation.blocks or opened[min(opened)].blocks
    # The first pass is made in this thread, where Ctrl-C stops it at once, and before anything is written.
    tensors = Merged(chosen, foundation.weights, weights, depthwise, target.threads, blocks).at_once()
    if makes_model:
        recorded = merge_provenance(foundation.origin(), {task: one.origin() for task, one in opened.items()}, how)
        write_model(target, opened, recorded, tensors, layout, [foundation])
    else:
        write_weights(target, [foundation, *opened.values()], tensors, layout)
    tensors.warn_of_unchanged()
    return MergedOnDisk(target.path, how, tuple(opened) if makes_model else ())


def warn_of_unrecorded_bases(base: Source, experts: Mapping[str, Source], threads: int | None) -> None:
    """Warn of experts without a record of their base, with how far their weights are from the given one."""
    if not experts:
        return
    stream = TaskVectorStream(base.weights, {name: expert.weights for name, expert in experts.items()}, threads)
    for name, distance in sampled_distances(stream).items():
        # A weight file never records its base; a model folder should, so it deserves a warning in any case.
        if distance > 0.5 or experts[name].description is not None:
            warn_of_unrecorded_base(name, distance)
