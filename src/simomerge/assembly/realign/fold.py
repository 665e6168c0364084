"""Fold: re-alignment in closed form, from unlabelled images, without adding a parameter.

The features of the merged encoder differ from those of an expert's encoder mostly by a linear map. A ridge regression
from merged to expert features, shrunk towards the identity, finds the map. Because it is linear, it can be folded into
the head's first layer. Let W be the weights of that layer, x a token's merged features and z the expert's features::

    argmin_A  sum_n || z[n] - A x[n] - b ||^2 + ridge || A - I ||^2,   then  W <- W A,  c <- c + W b

Ridge regression is linear in its targets, so a regression of the layer's own output, which penalises W' - W, gives the
same W A. The code solves this smaller problem: O outputs instead of C channels. docs/fold.md has the derivation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from simomerge.assembly.realign.method import Inputs, Realignment, distance_ratio, register, rounded
from simomerge.core.caution import warn
from simomerge.core.registry import parameter

if TYPE_CHECKING:
    from simomerge.models.model import SimoModel

VARIANTS = ("per-tap", "cross-tap")


@register("fold", "simomerge, docs/fold.md; relatives: ReACT (2025)", "https://arxiv.org/abs/2511.10943")
@dataclass(frozen=True)
class Fold(Realignment):
    """Fold the linear part of the mismatch between merged features and heads into the heads, in closed form.

    Each image passes once through the merged encoder and every expert's encoder. Only sums are kept, and their size
    depends on the encoder's width alone. Under torchrun each process takes its share of the images. The model's heads
    must still be the experts' heads; its encoder may have adapters.
    """

    teacher: ClassVar[str] = "experts"
    default_count: ClassVar[int] = 64
    needs_plain_heads: ClassVar[bool] = True

    variant: str = parameter(
        "per-tap", choices=VARIANTS, help="Map each tap from itself (shapes stay), or every tap from all taps."
    )
    ridge: float | str = parameter(
        "auto",
        kind=float,
        low=0,
        words=("auto", "none"),
        help="Shrinkage towards the identity, in units of the mean variance; auto chooses it for each head.",
    )
    images_at_once: int = parameter(32, low=1, resource=True, help="Images per batch.")

    @property
    def phrase(self) -> str:
        return "folding its heads" + (" cross tap" if self.variant == "cross-tap" else "")

    @property
    def takes_trees(self) -> bool:
        return True

    def change(self, model: SimoModel, inputs: Inputs) -> dict[str, Any]:
        from simomerge.assembly.realign.agreement import Agreement, judging
        from simomerge.assembly.realign.layout import FoldLayout
        from simomerge.assembly.realign.restart import SavedSums
        from simomerge.assembly.realign.sums import HeadSums, fold_heads, head_sums, head_targets
        from simomerge.assembly.realign.teacher import check_heads
        from simomerge.core import distributed

        check_heads(model, inputs.experts)
        agreement = Agreement(inputs.experts, judging(inputs.images))
        saved = SavedSums(inputs.work_folder, HeadSums(FoldLayout(model, self.variant)), agreement)
        start, step = saved.resume(), distributed.processes()
        targets = head_targets(
            model, inputs.experts, inputs.images, self.variant, self.images_at_once, agreement, start
        )
        sums = head_sums(model, targets, self.variant, saved.sums, lambda last: saved.save_once_in_a_while(last + step))
        saved.remove()
        ridge = math.inf if self.ridge == "none" else self.ridge
        folded = fold_heads(model, (), self.variant, ridge, agreement, sums)
        if message := folded.sums.shortcoming():
            warn(message)
        least = agreement.least()
        ratios = {task: distance_ratio(folded.before[task], after, least[task]) for task, after in folded.after.items()}
        for task in folded.kept:
            if ratios[task] > 1:  # it is 1 for a head that predicts what its expert does, as in a branch of one task
                further = f"{100 * (ratios[task] - 1):.0f} % further from its expert"
                warn(
                    f"{task}: on held-out images the folded head is {further} than the head before the fold, so that"
                    " one is kept."
                )
        model.heads = folded.model.heads
        kept = {task: {"ridge": math.inf, "r2": folded.fits[task].r2_before} for task in folded.kept}
        fits = {task: replace(fit, **kept.get(task, {})) for task, fit in folded.fits.items()}
        return {
            "unlabelled_images": folded.sums.images,  # those that could be read
            "ridge": {task: fit.ridge if math.isfinite(fit.ridge) else "none" for task, fit in fits.items()},
            "r2_before": {task: rounded(fit.r2_before) for task, fit in fits.items()},
            "r2": {task: rounded(fit.r2) for task, fit in fits.items()},
            "distance_ratio": {**ratios, **dict.fromkeys(folded.kept, 1.0)},
        }
