"""Experts in, one model out: merge the encoders, carry over the heads, choose the scale."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from simomerge.checkpoints import check_same_encoder
from simomerge.errors import InputError
from simomerge.evaluation import Scores, delta_mtl, evaluate, normalised_performance
from simomerge.merging import (
    Fisher,
    MergeMethod,
    RegMean,
    Schedule,
    as_schedule,
    describe_method,
    get_method,
    merge_state_dicts,
)
from simomerge.model import SimoModel, load
from simomerge.progress import Progress, silent
from simomerge.tasks import Task
from simomerge.training.statistics import fisher_information, input_grams

SCALE_GRID: tuple[float, ...] = tuple(round(0.1 * step, 1) for step in range(11))
"""The scales that ``scale="auto"`` tries: 0 to 1 in eleven values, as the paper's reference code does."""


def load_experts(**folders: str | Path) -> dict[str, SimoModel]:
    """Experts by task name, from their folders.

    Example:
        >>> experts = load_experts(depth="runs/depth", normals="runs/normals")     # doctest: +SKIP
    """
    return {task: load(folder) for task, folder in folders.items()}


def merge(
    base: SimoModel,
    experts: Mapping[str, SimoModel],
    method: str | MergeMethod = "task-arithmetic",
    scale: float | str | None = None,
    validation: Any = None,
    schedule: Schedule | Sequence[float] | str | None = None,
    progress: Progress = silent,
    **parameters: Any,
) -> SimoModel:
    """Merge the experts' encoders into one model that has all their heads, unmerged.

    Args:
        base: the foundation encoder all experts were fine-tuned from.
        experts: one model per task; the key names the task.
        method: a name of `simomerge.merging.available()` or a method.
        scale: of the merged task vector; ``"auto"`` tries `SCALE_GRID` on ``validation``.
        validation: a dataset with labels of every task, for ``scale="auto"``; for ``"regmean"`` a dataset of images
            and for ``"fisher"`` one with labels, where their statistics are not given as parameters.
        schedule: factors over the depth, such as ``"lines"``; see `simomerge.merging.as_schedule`.
        **parameters: further parameters of the method.

    Returns:
        A new model; base and experts stay as they are. Its provenance says what it was made of.

    Raises:
        InputError: experts that do not fit the base or each other (the message says in what), a base that
            is not the experts' base, or ``scale="auto"`` without validation data.

    Warns:
        UserWarning: an expert records no base, with how far its weights are from the given one.

    Example:
        >>> model = merge(base, experts, "ties", density=0.2, scale=0.4)          # doctest: +SKIP
    """
    if scale == "auto":
        if schedule is not None:
            raise InputError("scale='auto' and a schedule do not go together: give a number as scale.")
        return search_scale(base, experts, method, validation, progress=progress, **parameters).model
    if isinstance(scale, str):
        raise InputError(f"scale {scale!r}: give a number, or 'auto' with validation data.")
    if scale is not None:
        parameters["scale"] = scale
    chosen = _with_parameters(method, parameters)
    experts = check_experts(base, experts)
    chosen = _with_statistics(chosen, experts, validation, progress)
    return _assemble(base, experts, chosen, as_schedule(schedule))


@dataclass
class ScaleSearch:
    """What a search for the scale tried, and the model it chose.

    Attributes:
        scales: the scales tried.
        delta_mtl: Delta_MTL in percent against the experts, per scale, on the validation data.
        normalised: normalised performance per task and scale.
        scale: the scale of the greatest Delta_MTL.
        model: the model merged with it.
    """

    scales: list[float]
    delta_mtl: list[float]
    normalised: dict[str, list[float]] = field(default_factory=dict)
    scale: float = 0.0
    model: Any = None


def search_scale(
    base: SimoModel,
    experts: Mapping[str, SimoModel],
    method: str | MergeMethod,
    validation: Any,
    scales: Sequence[float] = SCALE_GRID,
    baseline: Scores | None = None,
    progress: Progress = silent,
    **parameters: Any,
) -> ScaleSearch:
    """Merge with every scale and keep the one of the best Delta_MTL on labelled validation data.

    Args:
        validation: a dataset with labels of every task; never the test split.
        baseline: the experts' scores on it, where they are known already.

    Raises:
        InputError: no validation data, or it lacks a task; no scales, or a method without one.
    """
    if not scales:
        raise InputError("scale='auto': give at least one scale to try.")
    _with_parameters(method, {**parameters, "scale": scales[0]})  # told before any model is evaluated
    if validation is None:
        raise InputError("scale='auto' chooses on labelled validation data: give validation=, or a number as scale.")
    experts = check_experts(base, experts)
    missing = [task for task in experts if task not in validation.tasks]
    if missing:
        raise InputError(f"scale='auto': the validation data has no labels of {', '.join(missing)}.")
    if baseline is None:
        baseline = {name: evaluate(expert, validation, progress=progress)[name] for name, expert in experts.items()}
    search = ScaleSearch(list(scales), [])
    search.normalised = {name: [] for name in experts}
    best = -math.inf
    for done, scale in enumerate(scales, start=1):
        model = _assemble(base, experts, _with_parameters(method, {**parameters, "scale": scale}))
        scores = evaluate(model, validation)
        search.delta_mtl.append(delta_mtl(scores, baseline, model.tasks))
        for name, value in normalised_performance(scores, baseline, model.tasks).items():
            search.normalised[name].append(value)
        if search.delta_mtl[-1] > best:
            best, search.scale, search.model = search.delta_mtl[-1], scale, model
        progress("scale", done, len(scales), f"scale {scale:.1f}: Delta_MTL {search.delta_mtl[-1]:+.1f} %")
    search.model.provenance["merge"]["scale_chosen_on"] = f"{len(validation)} labelled images"
    return search


def check_experts(base: SimoModel, experts: Mapping[str, SimoModel]) -> dict[str, SimoModel]:
    """The experts, each with exactly the task it is named for, after checking that they can be merged.

    Raises:
        InputError: no experts, an expert without the task, one with adapters, experts tapped or normalised
            differently, or made from another base.
    """
    if not experts:
        raise InputError("no experts given; name at least one, as TASK=EXPERT.")
    named = {task: as_expert(expert, task) for task, expert in experts.items()}
    patches = {task: expert.encoder.patch_size for task, expert in named.items()}
    for task, patch in patches.items():
        if patch != (first := next(iter(patches.values()))):
            raise InputError(f"experts {next(iter(patches))!r} and {task!r} differ in patch size: {first} and {patch}.")
    check_same_encoder({task: expert.description() for task, expert in named.items()})
    _check_base(base, named)
    return named


def _with_parameters(method: str | MergeMethod, parameters: Mapping[str, Any]) -> MergeMethod:
    """The method of that name, or the method given, with these parameters."""
    if isinstance(method, str):
        return get_method(method, **parameters)
    unknown = [name for name in parameters if name not in {spec.name for spec in fields(method)}]
    if unknown:
        raise InputError(f"The merge method '{method.name}' has no parameter '{unknown[0]}'.")
    return replace(method, **parameters)


def as_expert(expert: SimoModel, task: str) -> SimoModel:
    """The expert with one task, which is called ``task``."""
    if task in expert.tasks:
        return expert.select([task])
    if len(expert.tasks) != 1:
        raise InputError(f"expert {task!r} has the tasks {', '.join(expert.tasks) or 'none'}; name one of them.")
    (old,) = expert.tasks.values()
    renamed = Task(task, old.kind, old.classes, old.colours)
    result = SimoModel(expert.encoder, {task: renamed}, {task: expert.heads[old.name]}, expert.provenance)
    result.source = expert.source
    return result


def _with_statistics(
    method: MergeMethod, experts: Mapping[str, SimoModel], data: Any, progress: Progress
) -> MergeMethod:
    """The method with what it needs to know of the experts' behaviour, from images or labels."""
    if isinstance(method, RegMean) and not method.grams and data is not None:
        grams = {
            task: input_grams(expert.encoder, data, label=f"Grams {task}", progress=progress)
            for task, expert in experts.items()
        }
        return replace(method, grams=grams)
    if isinstance(method, Fisher) and not method.fishers and data is not None:
        fishers = {
            task: fisher_information(expert, data, len(data), label=f"Fisher {task}", progress=progress)
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


def _assemble(
    base: SimoModel, experts: Mapping[str, SimoModel], method: MergeMethod, schedule: Schedule | None = None
) -> SimoModel:
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
    tasks = {task: expert.tasks[task] for task, expert in experts.items()}
    return SimoModel(encoder, tasks, heads, _provenance(base, experts, describe_method(method, schedule))).eval()


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
