"""ReACT: maps from merged to expert features in closed form, shrunk towards a rotation, absorbed into the heads.

Source: "From Parameter to Representation: A Closed-Form Approach for Controllable Model Merging" (arXiv 2511.10943).
The paper corrects the one final feature vector of a classifier by a linear map, and regularises the map towards the
orthogonal Procrustes map between merged and expert features. Dense heads read tokens of several taps, so here each task
has a map for the patch tokens of each tap that its head reads, and one for each CLS token. The paper's preferences
between tasks have no counterpart, because each head has maps of its own. These choices are ours: the maps have a bias,
the ridge is in units of the mean variance, and "auto" chooses it on held-out images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from simomerge.assembly.realign.method import Inputs, Realignment, register, rounded
from simomerge.core.caution import warn
from simomerge.core.registry import parameter

if TYPE_CHECKING:
    from simomerge.models.model import SimoModel


@register(
    "react",
    "From Parameter to Representation (ReACT; Wu et al., 2025)",
    "https://arxiv.org/abs/2511.10943",
)
@dataclass(frozen=True)
class React(Realignment):
    """Map merged features to each expert's by ridge regression towards a rotation (ReACT), absorbed into the heads.

    It differs from the per-tap fold in two ways: the map is shrunk towards the orthogonal Procrustes map instead of the
    identity, and the ridge is chosen by the error of the features instead of that of the heads' first layers. The
    model's heads must still be the experts' heads.
    """

    teacher: ClassVar[str] = "experts"
    default_count: ClassVar[int] = 64
    needs_plain_heads: ClassVar[bool] = True

    ridge: float | str = parameter(
        "auto",
        kind=float,
        low=0,
        words=("auto",),
        help="Shrinkage towards the Procrustes map, in units of the mean variance; auto chooses it for each head.",
    )
    images_at_once: int = parameter(32, low=1, resource=True, help="Images per batch.")

    @property
    def phrase(self) -> str:
        return "mapping its features by ReACT"

    def change(self, model: SimoModel, inputs: Inputs) -> dict[str, Any]:
        from simomerge.assembly.realign.procrustes import feature_maps
        from simomerge.assembly.realign.teacher import check_heads

        check_heads(model, inputs.experts)
        maps = feature_maps(model, inputs.experts, inputs.images, self.images_at_once)
        fits = {task: each.choose(self.ridge) for task, each in maps.items()}
        if not all(math.isfinite(fit.r2) for fit in fits.values()):
            warn("too few images to hold one out, so the fit of the maps is unknown; give more.")
        for task, each in maps.items():
            model.heads[task] = each.head(fits[task].ridge)
        return {
            "unlabelled_images": max(each.images for each in maps.values()),  # those that could be read
            "ridge": {task: fit.ridge for task, fit in fits.items()},
            "r2_before": {task: rounded(fit.r2_before) for task, fit in fits.items()},
            "r2": {task: rounded(fit.r2) for task, fit in fits.items()},
        }
