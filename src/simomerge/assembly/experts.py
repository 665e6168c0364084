"""One model of several experts: check that they belong together, merge the encoders, carry over the heads."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from simomerge.checkpoints import check_same_encoder
from simomerge.core.errors import InputError
from simomerge.merging import Fisher, MergeMethod, RegMean, Schedule, describe_method, get_method, merge_state_dicts
from simomerge.models.model import SimoModel, as_expert, load
from simomerge.training.statistics import fisher_information, input_grams


def load_experts(**folders: str | Path) -> dict[str, SimoModel]:
    """Experts by task name, from their folders.

    Example:
        >>> experts = load_experts(depth="runs/depth", normals="runs/normals")     # doctest: +SKIP
    """
    return {task: load(folder) for task, folder in folders.items()}


def merge_models(
    base: SimoModel,
    experts: Mapping[str, SimoModel],
    method: MergeMethod,
    schedule: Schedule | None = None,
    validation: Any = None,
) -> SimoModel:
    """Merge the experts' encoders by a method whose parameters are all numbers; see `simomerge.merge`."""
    experts = check_experts(base, experts)
    chosen = with_statistics(method, experts, validation)
    return assemble(base, experts, chosen, schedule)


def check_experts(base: SimoModel, experts: Mapping[str, SimoModel]) -> dict[str, SimoModel]:
    """The experts, each with exactly the task it is named for, after checking that they can be merged.

    Raises:
        InputError: no experts, an expert without the task, one with adapters, experts tapped or normalised
            differently, or made from another base.
    """
    if not experts:
        raise InputError("no experts given; name at least one, as TASK=EXPERT.")
    named = {task: as_expert(expert, task) for task, expert in experts.items()}
    first = next(iter(named))
    for task, expert in named.items():
        ours, theirs = named[first].encoder, expert.encoder
        if type(ours.backbone) is not type(theirs.backbone):
            kinds = f"{type(ours.backbone).__name__} and {type(theirs.backbone).__name__}"
            raise InputError(f"experts {first!r} and {task!r} differ in architecture: {kinds}.")
        if ours.multiple != theirs.multiple:
            raise InputError(
                f"experts {first!r} and {task!r} differ in patch size: {ours.multiple} and {theirs.multiple}."
            )
    check_same_encoder({task: expert.encoder_description() for task, expert in named.items()})
    _check_base(base, named)
    return named


def with_parameters(method: str | MergeMethod, parameters: Mapping[str, Any]) -> MergeMethod:
    """The method of that name, or the method given, with these parameters."""
    if isinstance(method, str):
        return get_method(method, **parameters)
    unknown = [name for name in parameters if name not in {spec.name for spec in fields(method)}]
    if unknown:
        raise InputError(f"The merge method '{method.name}' has no parameter '{unknown[0]}'.")
    return replace(method, **parameters)


def with_statistics(method: MergeMethod, experts: Mapping[str, SimoModel], data: Any) -> MergeMethod:
    """The method with what it needs to know of the experts' behaviour, from images or labels."""
    if isinstance(method, RegMean) and not method.grams and data is not None:
        grams = {task: input_grams(expert.encoder, data, label=f"Grams {task}") for task, expert in experts.items()}
        return replace(method, grams=grams)
    if isinstance(method, Fisher) and not method.fishers and data is not None:
        fishers = {
            task: fisher_information(expert, data, len(data), label=f"Fisher {task}")
            for task, expert in experts.items()
        }
        return replace(method, fishers=fishers)
    return method


def _check_base(base: SimoModel, experts: Mapping[str, SimoModel]) -> None:
    recorded = {task: expert.provenance.get("base", {}).get("fingerprint") for task, expert in experts.items()}
    if any(recorded.values()):
        given = base.encoder_fingerprint()
        for task, theirs in recorded.items():
            if theirs and theirs != given:
                raise InputError(
                    f"expert {task!r} was fine-tuned from another base (its base {theirs[:12]}, the given one"
                    f" {given[:12]}); give {experts[task].provenance['base'].get('source', 'that base')}."
                )
    for task in (task for task, theirs in recorded.items() if not theirs):
        distance = _relative_distance(base.encoder.backbone, experts[task].encoder.backbone)
        warnings.warn(
            f"expert {task!r} does not record its base. Its weights differ from the given one by {distance:.0%} of"
            f" their norm: {'this looks like another base' if distance > 0.5 else 'plausible for a fine-tuning'}.",
            stacklevel=3,
        )


def _relative_distance(base: nn.Module, expert: nn.Module) -> float:
    """``||expert - base|| / ||base||`` over the tensors that both have."""
    ours, theirs = base.state_dict(), expert.state_dict()
    shared = [name for name, value in ours.items() if name in theirs and theirs[name].shape == value.shape]
    if not shared:
        return math.inf
    difference = sum(float((theirs[name].float() - ours[name].float()).square().sum()) for name in shared)
    return math.sqrt(difference / max(sum(float(ours[name].float().square().sum()) for name in shared), 1e-30))


def assemble(
    base: SimoModel, experts: Mapping[str, SimoModel], method: MergeMethod, schedule: Schedule | None = None
) -> SimoModel:
    """The merged model of experts that `check_experts` has checked."""
    model = with_merged_encoder(base, experts, method, schedule)
    model.provenance = _provenance(base, experts, describe_method(method, schedule))
    return model


def with_merged_encoder(
    base: SimoModel, experts: Mapping[str, SimoModel], method: MergeMethod, schedule: Schedule | None = None
) -> SimoModel:
    """As `assemble`, without the provenance, which takes a checksum of every model: for trials."""
    weights: dict[str, Tensor] = merge_state_dicts(
        base.encoder.backbone.state_dict(),
        {task: expert.encoder.backbone.state_dict() for task, expert in experts.items()},
        method,
        schedule,
    )
    template = next(iter(experts.values())).encoder
    encoder = copy.deepcopy(template)  # taps and normalisation are the experts', not the base folder's
    encoder.backbone.load_state_dict(weights)
    heads = {task: copy.deepcopy(expert.heads[task]) for task, expert in experts.items()}
    return SimoModel(encoder, {task: expert.tasks[task] for task, expert in experts.items()}, heads).eval()


def _provenance(base: SimoModel, experts: Mapping[str, SimoModel], how: dict[str, Any]) -> dict[str, Any]:
    def origin(model: SimoModel) -> dict[str, Any]:
        # The folder's name, not its path: a model that is shared says nothing of the machine it was made on.
        name = Path(model.source).name if Path(model.source).exists() else model.source
        return {"source": name, "fingerprint": model.encoder_fingerprint()}

    return {
        "base": origin(base),
        "experts": {task: origin(expert) for task, expert in experts.items()},
        "merge": how,
    }
