"""Evaluate merges without labels.

Each merge is folded. On held-out images, the outputs of its heads' first layers are then compared with the experts'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simomerge.assembly.experts import check_experts, with_merged_encoder, with_parameters
from simomerge.assembly.realign.sums import fold_heads, head_targets
from simomerge.core.errors import InputError
from simomerge.core.progress import progress
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
        r2: By task, R^2 of the output of the folded head's first layer as a prediction of the expert's, on held-out
            images.
        alignment: A proxy for Delta_MTL: 1 minus the geometric mean over the tasks of 1 - R^2. In a plain mean of R^2,
            a task with a good fit would hardly count if another task has a poor fit.
    """

    method: MergeMethod
    schedule: Schedule | None
    r2: dict[str, float]

    @property
    def alignment(self) -> float:
        left = [math.log(max(1 - r2, 1e-9)) for r2 in self.r2.values()]
        return 1 - math.exp(sum(left) / len(left))

    def describe(self) -> dict[str, Any]:
        """As plain data, for provenance."""
        return {**describe_method(self.method, self.schedule), "alignment": round(self.alignment, 4)}


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
        InputError: The experts do not fit, there are fewer than four images, or a head cannot be folded.

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
        if len(self.images) < 4:
            raise InputError(
                f"{len(self.images)} images: a choice without labels holds out every fourth image; give at least 4."
            )
        self.trials: list[Trial] = []
        unmerged = with_merged_encoder(base, self.experts, ZeroShot())
        self._targets = list(head_targets(unmerged, self.experts, self.images))

    def try_out(self, method: MergeMethod, schedule: Schedule | None = None) -> Trial:
        """Merge, fold per tap, and measure. A merge that was tried before is not repeated."""
        for trial in self.trials:
            if (trial.method, trial.schedule) == (method, schedule):
                return trial
        model = with_merged_encoder(self.base, self.experts, method, schedule)
        fits = fold_heads(model, self._targets).fits
        trial = Trial(method, schedule, {task: fit.r2 for task, fit in fits.items()})
        self.trials.append(trial)
        scale = getattr(method, "scale", None)
        shown = f"{method.name}{f' {scale:.2f}' if isinstance(scale, float) else ''}"
        progress("trials", len(self.trials), len(self.trials), f"{shown}: alignment {trial.alignment:.3f}")
        return trial

    def best_scale(self, method: MergeMethod, schedule: Schedule | None = None) -> Trial:
        """The trial of the method with the best scale: hill climbing from `START_SCALE` in steps of 0.1, then of 0.05.

        Raises:
            InputError: The method has no scale.
        """

        def at(scale: float) -> Trial:
            return self.try_out(with_parameters(method, {"scale": round(scale, 2)}), schedule)

        best, scale = at(START_SCALE), START_SCALE
        for step in (0.1, 0.05):
            for direction in (step, -step):
                while (near := round(scale + direction, 2)) >= 0 and (tried := at(near)).alignment > best.alignment:
                    best, scale = tried, near
        return best

    @property
    def best(self) -> Trial:
        """The trial with the best alignment."""
        return max(self.trials, key=lambda trial: trial.alignment)
