"""The scale of a merge, chosen on labelled validation data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simomerge.assembly.experts import assemble, check_experts, with_merged_encoder, with_parameters, with_statistics
from simomerge.assembly.realign.sums import fold_heads, head_targets
from simomerge.core.errors import InputError
from simomerge.core.progress import progress
from simomerge.datasets.pictures import as_images
from simomerge.merging import MergeMethod, ZeroShot
from simomerge.models.heads.projections import is_foldable
from simomerge.models.model import SimoModel
from simomerge.training.evaluate import Scores, delta_mtl, evaluate, normalised_performance

SCALE_GRID: tuple[float, ...] = tuple(round(0.1 * step, 1) for step in range(11))
"""The scales that ``scale="auto"`` tries: 0 to 1 in eleven values, as the paper's reference code does."""


@dataclass(frozen=True)
class ScaleSearch:
    """The result of a search for the scale.

    Attributes:
        scales: The scales that were tried.
        delta_mtl: Delta_MTL in percent against the experts, per scale, on the validation data.
        normalised: Normalised performance per task and scale.
        scale: The scale with the greatest Delta_MTL.
        model: The model merged with that scale.
    """

    scales: list[float]
    delta_mtl: list[float]
    normalised: dict[str, list[float]]
    scale: float
    model: SimoModel


def search_scale(
    base: SimoModel,
    experts: Mapping[str, SimoModel],
    method: str | MergeMethod,
    validation: Any,
    scales: Sequence[float] = SCALE_GRID,
    baseline: Scores | None = None,
    align: bool | None = None,
    **parameters: Any,
) -> ScaleSearch:
    """Merge with every scale and keep the one of the best Delta_MTL on labelled validation data.

    Args:
        validation: A dataset with labels of every task; never the test split.
        baseline: The experts' scores on the validation data; computed by default.
        align: Fold the heads on 64 of the images before each evaluation. Without a fold, heads that do not fit the
            merged features prefer a scale that is far too small. False evaluates the merge as it is, as the paper does.
            The default folds the heads if all of them can be folded.

    Raises:
        InputError: There is no validation data, the data has no labels of a task, there are no scales, the method has
            no scale, or a head cannot be folded although ``align`` is true.
    """
    if not scales:
        raise InputError("scale='auto': give at least one scale to try.")
    with_parameters(method, {**parameters, "scale": scales[0]})  # raises before any model is evaluated
    if validation is None:
        raise InputError(
            "scale='auto' chooses on data: give validation= (with labels) or images= (without), or a number as scale."
        )
    experts = check_experts(base, experts)
    missing = [task for task in experts if task not in validation.tasks]
    if missing:
        raise InputError(f"scale='auto': the validation data has no labels of {', '.join(missing)}.")
    if baseline is None:
        baseline = {name: evaluate(expert, validation)[name] for name, expert in experts.items()}
    method = with_statistics(with_parameters(method, {**parameters, "scale": scales[0]}), experts, validation)
    unmerged = with_merged_encoder(base, experts, ZeroShot())
    if align is None:
        align = all(is_foldable(head) for head in unmerged.heads.values())
    targets = list(head_targets(unmerged, experts, as_images(validation, 64))) if align else []
    deltas: list[float] = []
    normalised: dict[str, list[float]] = {name: [] for name in experts}
    for done, scale in enumerate(scales, start=1):
        model = with_merged_encoder(base, experts, with_parameters(method, {"scale": scale}))
        scores = evaluate(fold_heads(model, targets).model if align else model, validation)
        deltas.append(delta_mtl(scores, baseline, model.tasks))
        for name, value in normalised_performance(scores, baseline, model.tasks).items():
            normalised[name].append(value)
        progress("scale", done, len(scales), f"scale {scale:.1f}: Delta_MTL {deltas[-1]:+.1f} %")
    comparable = [-math.inf if math.isnan(value) else value for value in deltas]
    best = scales[comparable.index(max(comparable))]
    model = assemble(base, experts, with_parameters(method, {"scale": best}))
    aligned = ", after a fold" if align else ", unaligned"
    model.provenance["merge"]["scale_chosen_on"] = f"{len(validation)} labelled images{aligned}"
    return ScaleSearch(list(scales), deltas, normalised, best, model)
