"""Merge experts in memory: check that they fit together, merge the encoders, keep the heads."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from simomerge.checkpoints.experts import (
    check_base,
    check_same_encoder,
    merge_provenance,
    warn_of_unrecorded_base,
)
from simomerge.checkpoints.names import is_running_statistic
from simomerge.core.errors import InputError
from simomerge.core.registry import check_known
from simomerge.merging import (
    Fisher,
    Merged,
    MergeMethod,
    RegMean,
    Schedule,
    describe_method,
    get_method,
    warn_of_other_tensors,
)
from simomerge.models.model import SimoModel, as_expert, load
from simomerge.training.statistics import fisher_information, input_grams


def load_experts(**folders: str | Path) -> dict[str, SimoModel]:
    """Load experts from their folders, by task name, each as `simomerge.load` does.

    Example:
        >>> experts = load_experts(depth="runs/depth", normals="runs/normals")     # doctest: +SKIP
    """
    return {task: load(folder) for task, folder in folders.items()}


def check_experts(base: SimoModel, experts: Mapping[str, SimoModel]) -> dict[str, SimoModel]:
    """Check that experts can be merged, and reduce each to the task that it is given for.

    Raises:
        InputError: There are no experts, an expert does not have its task, has adapters or was made from another base,
            or experts differ in taps, patch size or normalisation.

    Warns:
        UserWarning: An expert records no base; the warning says how far its weights are from the given base. Or it has
            other values in tensors that are not floats, which no merge changes.
    """
    if not experts:
        raise InputError("no experts given; name at least one, as TASK=EXPERT.")
    named = {task: as_expert(expert, task) for task, expert in experts.items()}
    check_same_encoder({task: comparable(expert) for task, expert in named.items()})
    for task in check_base(base, named):
        distance = _relative_distance(base.encoder.backbone, named[task].encoder.backbone)
        warn_of_unrecorded_base(task, distance)
    warn_of_other_tensors(_weights(base), {task: _weights(expert) for task, expert in named.items()})
    return named


def comparable(model: SimoModel) -> dict[str, Any]:
    """The description of a model in memory that `check_same_encoder` compares with others."""
    description = model.encoder_description()
    more = {"architecture": model.encoder.architecture, "patch_size": model.encoder.multiple}
    return {**description, "encoder": {**description["encoder"], **more}}


def with_parameters(method: str | MergeMethod, parameters: Mapping[str, Any]) -> MergeMethod:
    """The method with this name, or the given method, with these parameters."""
    if isinstance(method, str):
        return get_method(method, **parameters)
    check_known(f"The merge method '{method.name}'", parameters, [spec.name for spec in fields(method)])
    return replace(method, **parameters)


def with_statistics(method: MergeMethod, experts: Mapping[str, SimoModel], data: Any) -> MergeMethod:
    """The method with the statistics that it needs, on images (RegMean: Gram matrices) or labels (Fisher)."""
    if data is None:
        return method
    if isinstance(method, RegMean) and not method.grams:
        grams = {task: input_grams(expert.encoder, data, label=f"Grams {task}") for task, expert in experts.items()}
        return replace(method, grams=grams)
    if isinstance(method, Fisher) and not method.fishers:
        fishers = {
            task: fisher_information(expert, data, len(data), label=f"Fisher {task}")
            for task, expert in experts.items()
        }
        return replace(method, fishers=fishers)
    return method


def assemble(
    base: SimoModel, experts: Mapping[str, SimoModel], method: MergeMethod, schedule: Schedule | None = None
) -> SimoModel:
    """The merged model of experts that passed `check_experts`, with its provenance."""
    model = with_merged_encoder(base, experts, method, schedule)
    origins = {task: expert.origin() for task, expert in experts.items()}
    model.provenance = merge_provenance(base.origin(), origins, describe_method(method, schedule))
    return model


def merged_weights(
    base: SimoModel, experts: Mapping[str, SimoModel], method: MergeMethod, schedule: Schedule | None = None
) -> dict[str, Tensor]:
    """The merged weights of the experts' encoders, as a state dict of the backbone."""
    states = {task: _weights(expert) for task, expert in experts.items()}
    blocks = next(iter(experts.values())).encoder.layout.names
    return Merged(method, _weights(base), states, schedule, blocks=blocks).state_dict()


def _weights(model: SimoModel) -> dict[str, Tensor]:
    return model.encoder.backbone.state_dict()


def with_merged_encoder(
    base: SimoModel, experts: Mapping[str, SimoModel], method: MergeMethod, schedule: Schedule | None = None
) -> SimoModel:
    """Like `assemble`, but without provenance, because its fingerprints take time. Use it for trials."""
    weights = merged_weights(base, experts, method, schedule)
    # The experts may have other taps and another normalisation than the base; the heads need the experts'.
    encoder = copy.deepcopy(next(iter(experts.values())).encoder)
    encoder.backbone.load_state_dict(weights)
    heads = {task: copy.deepcopy(expert.heads[task]) for task, expert in experts.items()}
    return SimoModel(encoder, {task: expert.tasks[task] for task, expert in experts.items()}, heads).eval()


def _relative_distance(base: nn.Module, expert: nn.Module) -> float:
    """``||expert - base|| / ||base||`` over the tensors that both models have."""
    ours, theirs = base.state_dict(), expert.state_dict()
    shared = [
        name
        for name, value in ours.items()
        if name in theirs
        and theirs[name].shape == value.shape
        and value.is_floating_point()
        and not is_running_statistic(name)
    ]
    if not shared:
        return math.inf
    difference = sum(float((theirs[name].float() - ours[name].float()).square().sum()) for name in shared)
    return math.sqrt(difference / max(sum(float(ours[name].float().square().sum()) for name in shared), 1e-30))
