"""Evaluate merges without labels.

Each merge is folded. On held-out images, its predictions are then compared with the experts'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simomerge.assembly.experts import check_experts, with_merged_encoder, with_parameters
from simomerge.assembly.judging import Judge
from simomerge.assembly.realign.sums import head_sums, head_targets, with_heads
from simomerge.core.errors import InputError
from simomerge.core.progress import progress
from simomerge.datasets.groups import LEAST_IMAGES, held_out
from simomerge.datasets.pictures import as_images
from simomerge.merging import MergeMethod, Schedule, ZeroShot, describe_method
from simomerge.models.model import SimoModel

START_SCALE = 0.3
"""The first scale of a search; the best scale of several merged experts is usually near it."""


@dataclass(frozen=True)
class Trial:
    """One merge that was tried.

    Attributes:
        method, schedule: The merge.
        agreement: By task, how far the predictions of the folded merge agree with the expert's on held-out images, in
            the task's metric: 1 is the expert, 0 is no better than the expert's prediction for another image.
    """

    method: MergeMethod
    schedule: Schedule | None
    agreement: dict[str, float]

    @property
    def score(self) -> float:
        """The mean agreement of the tasks, a proxy for Delta_MTL; minus infinity if it is not a number."""
        mean = sum(self.agreement.values()) / len(self.agreement)
        return -math.inf if math.isnan(mean) else mean

    def describe(self) -> dict[str, Any]:
        """As plain data, for provenance. An agreement that is not a number is None."""
        agreement = round(self.score, 4) if math.isfinite(self.score) else None
        return {**describe_method(self.method, self.schedule), "agreement": agreement}


class Aligner:
    """Tries merges of the same experts on the same unlabelled images.

    The experts process the images once. Each trial then costs a merge, a pass of its encoder and a fold.

    Args:
        base: The foundation encoder.
        experts: By task.
        images: A folder of pictures, a sequence of images, or a dataset whose labels are not read.
        count: Number of images to use.

    Attributes:
        trials: All trials so far, in order.

    Raises:
        InputError: The experts do not fit, there are fewer than eight images, or a head cannot be folded.

    Example:
        >>> aligner = Aligner(base, experts, "photos/")                               # doctest: +SKIP
        >>> aligner.best_scale(get_method("ties", density=0.2)).method.scale                      # doctest: +SKIP
        0.4
    """

    def __init__(
        self,
        base: SimoModel,
        experts: Mapping[str, SimoModel],
        images: Any,
        count: int | None = 64,
    ) -> None:
        self.base = base
        self.experts = check_experts(base, experts)
        self.images = as_images(images, count).readable()
        judging = held_out(self.images)
        if len(self.images) < LEAST_IMAGES:
            raise InputError(
                f"{len(self.images)} images: a choice without labels judges on a quarter; give at least {LEAST_IMAGES}."
            )
        self.trials: list[Trial] = []
        unmerged = with_merged_encoder(base, self.experts, ZeroShot())
        self._targets = list(head_targets(unmerged, self.experts, self.images))
        self._judge = Judge(self.experts, self.images._subset(judging), labelled=False, lenient=True)

    def try_out(self, method: MergeMethod, schedule: Schedule | None = None) -> Trial:
        """Merge, fold per tap, and measure. A merge that was tried before is not repeated."""
        for trial in self.trials:
            if (trial.method, trial.schedule) == (method, schedule):
                return trial
        model = with_merged_encoder(self.base, self.experts, method, schedule)
        sums = head_sums(model, self._targets)
        heads = sums.heads({task: fit.ridge for task, fit in sums.choose().items()}, hold_out=True)
        trial = Trial(method, schedule, self._judge.performance(self._judge.scores(with_heads(model, heads))))
        self.trials.append(trial)
        scale = getattr(method, "scale", None)
        shown = f"{method.name}{f' {scale:.2f}' if isinstance(scale, float) else ''}"
        progress("trials", len(self.trials), len(self.trials) + 1, f"{shown}: agreement {trial.score:.3f}")
        return trial

    def best_scale(self, method: MergeMethod, schedule: Schedule | None = None) -> Trial:
        """The trial of the method with the best scale: hill climbing from `START_SCALE` in steps of 0.1, then of 0.05.

        The coarse search goes on for one step after a decline, because the agreement on few images is not smooth.

        Raises:
            InputError: The method has no scale.
        """

        def at(scale: float) -> Trial:
            return self.try_out(with_parameters(method, {"scale": round(scale, 2)}), schedule)

        best, scale = at(START_SCALE), START_SCALE
        for step, patience in ((0.1, 2), (0.05, 1)):
            for direction in (step, -step):
                ahead = 1  # number of steps from the best scale
                while ahead <= patience and (near := round(scale + ahead * direction, 2)) >= 0:
                    tried = at(near)
                    ahead += 1
                    if tried.score > best.score:
                        best, scale, ahead = tried, near, 1
        return best

    @property
    def best(self) -> Trial:
        """The trial with the best agreement."""
        return max(self.trials, key=lambda trial: trial.score)
