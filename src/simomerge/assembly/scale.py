"""The scale of a merge, chosen on labelled validation data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass
class ScaleSearch:
    """What a search for the scale tried, and the model that it chose.

    Attributes:
        scales: The scales that were tried.
        delta_mtl: Delta_MTL in percent against the experts, per scale, on the validation data.
        normalised: Normalised performance per task and scale.
        scale: The scale of the greatest Delta_MTL.
        model: The model merged with that scale.
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
    align: bool | None = None,
    **parameters: Any,
) -> ScaleSearch:
    """Merge with every scale and keep the one of the best Delta_MTL on labelled validation data.

    Args:
        validation: A dataset with labels of every task; never the test split.
        align: Fold the heads on 64 of the images before each evaluation. Heads that do not fit the merged features
            prefer a scale that is far too small. False judges the merge as it is, as the paper does. By default, heads
            are folded where all of them can be.
        baseline: The experts' scores on the validation data, where they are known already.

    Raises:
        InputError: No validation data, or data without a task; no scales, or a method without a scale; with ``align``,
            a head that cannot be folded.
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
    search = ScaleSearch(list(scales), [])
    search.normalised = {name: [] for name in experts}
    best = -math.inf
    method = with_statistics(with_parameters(method, {**parameters, "scale": scales[0]}), experts, validation)
    unmerged = with_merged_encoder(base, experts, ZeroShot())
    if align is None:
        align = all(is_foldable(head) for head in unmerged.heads.values())
    targets = list(head_targets(unmerged, experts, as_images(validation, 64))) if align else []
    for done, scale in enumerate(scales, start=1):
        model = with_merged_encoder(base, experts, with_parameters(method, {"scale": scale}))
        scores = evaluate(fold_heads(model, targets).model if align else model, validation)
        search.delta_mtl.append(delta_mtl(scores, baseline, model.tasks))
        for name, value in normalised_performance(scores, baseline, model.tasks).items():
            search.normalised[name].append(value)
        if search.delta_mtl[-1] > best:
            best, search.scale = search.delta_mtl[-1], scale
        progress("scale", done, len(scales), f"scale {scale:.1f}: Delta_MTL {search.delta_mtl[-1]:+.1f} %")
    search.model = assemble(base, experts, with_parameters(method, {"scale": search.scale}))
    aligned = ", after a fold" if align else ", unaligned"
    search.model.provenance["merge"]["scale_chosen_on"] = f"{len(validation)} labelled images{aligned}"
    return search
