"""What predictions are judged against: labels, or the experts' own predictions on images that have none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simomerge.assembly.realign.teacher import evaluating, observe
from simomerge.core.errors import InputError
from simomerge.core.machine import autocast
from simomerge.core.progress import progress
from simomerge.datasets.batches import ordered_batches
from simomerge.datasets.pictures import as_images
from simomerge.datasets.tasks import Task
from simomerge.models.model import SimoModel
from simomerge.training.evaluate import Scores
from simomerge.training.metrics import TaskMetrics


@dataclass(frozen=True)
class Look:
    """A batch of images and what is true of them.

    Attributes:
        images: float (B, 3, H, W), where the experts are.
        truth: by task, a target as in `simomerge.datasets.tasks.KINDS`.
    """

    images: Tensor
    truth: dict[str, Tensor]


class Judge:
    """Says how good predictions are, in units of the experts.

    With labels, performance is the metric relative to the expert's own (normalised performance): 1 equals the expert,
    more is possible. Without labels the expert's prediction is the truth, and performance is the agreement with it:
    1 predicts what the expert predicts, 0 agrees no better than the expert's prediction for the next image does, in the
    task's metric.

    Args:
        experts: by task, as `simomerge.assembly.experts.check_experts` gives.
        source: a dataset, whose labels are read where ``labelled``; else whatever has images.
        labelled: judge by labels.

    Raises:
        InputError: fewer than two images, a dataset without the labels of a task, images that cannot be batched, or an
            expert whose predictions can judge nothing: the same for every image.

    Example:
        >>> judge = Judge(experts, load_data("rooms", split="val"), labelled=True)          # doctest: +SKIP
        >>> judge.performance(judge.scores(model))["depth"]                                 # doctest: +SKIP
        0.97
    """

    def __init__(
        self,
        experts: Mapping[str, SimoModel],
        source: Any,
        labelled: bool,
        batch_size: int = 32,
    ) -> None:
        self.experts = experts
        self.tasks: dict[str, Task] = {name: expert.tasks[name] for name, expert in experts.items()}
        self.labelled = labelled
        self.source = source if labelled else as_images(source).readable()
        self.batch_size = batch_size
        self.device = next(next(iter(experts.values())).parameters()).device
        if len(self.source) < 2:
            raise InputError("one image: how experts relate takes at least two to judge on.")
        # One image after the other would cost each expert a pass per model that is judged.
        self._looks = [] if labelled else list(self._predictions())
        self.best, self.chance = self._experts_scores() if labelled else self._ends()

    def __iter__(self) -> Iterator[Look]:
        """The images in batches, with their truth."""
        if not self.labelled:
            yield from self._looks
            return
        dataset = self.source.select(list(self.tasks))
        for batch in ordered_batches(dataset, self.batch_size):
            truth = {name: batch[name].to(self.device) for name in self.tasks}
            yield Look(batch["image"].to(self.device), truth)

    def _predictions(self) -> Iterator[Look]:
        for batch in observe(self.experts, self.source, self.batch_size, "experts' predictions"):
            with torch.no_grad(), evaluating(*self.experts.values()), autocast(self.device):
                logits = {
                    name: expert.decode(batch.features[name], [name])[name] for name, expert in self.experts.items()
                }
            truth = {name: self.tasks[name].activate(value.float()) for name, value in logits.items()}
            yield Look(batch.images, truth)

    def metrics(self) -> dict[str, TaskMetrics]:
        """Fresh ones of every task."""
        return {name: TaskMetrics(task).to(self.device) for name, task in self.tasks.items()}

    @torch.no_grad()
    def scores(self, model: SimoModel) -> Scores:
        """Metrics of the model's tasks against the truth."""
        metrics = {name: TaskMetrics(self.tasks[name]).to(self.device) for name in model.tasks}
        for look in self:
            with evaluating(model), autocast(self.device):
                logits = model(look.images)
            for name, metric in metrics.items():
                metric.update(self.tasks[name].activate(logits[name].float()), look.truth[name])
        return {name: metric.compute() for name, metric in metrics.items()}

    def performance(self, scores: Scores) -> dict[str, float]:
        """By task 1 for the expert's own; see above for what 0 is."""
        found = {}
        for name, values in scores.items():
            value, best = values[self.tasks[name].metric], self.best[name]
            if not self.labelled:
                found[name] = (value - self.chance[name]) / (best - self.chance[name])
            elif self.tasks[name].higher_is_better:
                found[name] = value / best
            else:
                found[name] = best / value if value else math.inf
        return found

    def gains(self, scores: Scores) -> dict[str, float]:
        """By task what a model has over the expert, in percent: 0 equals it.

        With labels the relative change of the metric, whose mean over the tasks is Delta_MTL; without them the
        performance above less 1.
        """
        if not self.labelled:
            return {name: 100 * (value - 1) for name, value in self.performance(scores).items()}
        found = {}
        for name, values in scores.items():
            sign = 1 if self.tasks[name].higher_is_better else -1
            found[name] = 100 * sign * (values[self.tasks[name].metric] - self.best[name]) / self.best[name]
        return found

    def _experts_scores(self) -> tuple[dict[str, float], dict[str, float]]:
        best = {}
        for done, (name, expert) in enumerate(self.experts.items(), start=1):
            best[name] = self.scores(expert)[name][self.tasks[name].metric]
            if not best[name] > 0:
                raise InputError(
                    f"task {name!r}: the expert's {self.tasks[name].metric} is {best[name]}; nothing can be relative"
                    " to it."
                )
            progress("experts", done, len(self.experts), "")
        return best, {}

    def _ends(self) -> tuple[dict[str, float], dict[str, float]]:
        """The metrics of full agreement, and of every image's prediction taken for the next image's."""
        same, other = self.metrics(), self.metrics()
        before = self._looks[-1].truth
        for look in self:
            for name, truth in look.truth.items():
                last = before[name][-1:]
                same[name].update(truth, truth)
                other[name].update(torch.cat([_as_large(last, truth), truth[:-1]]), truth)
            before = look.truth
        best, chance = (
            {name: metric.compute()[self.tasks[name].metric] for name, metric in ends.items()} for ends in (same, other)
        )
        for name in self.tasks:
            if not math.isfinite(best[name] - chance[name]):
                raise InputError(
                    f"what the expert of {name!r} predicts is not finite, or nowhere valid, so it can judge nothing:"
                    " give labelled data, or look at the expert."
                )
            if not abs(best[name] - chance[name]) > 1e-6:
                raise InputError(
                    f"the expert of {name!r} predicts the same for every image, so its predictions can judge nothing:"
                    " give labelled data, or other images."
                )
        return best, chance


def _as_large(values: Tensor, like: Tensor) -> Tensor:
    """Of the size of others, by the nearest pixels."""
    if values.shape[-2:] == like.shape[-2:]:
        return values
    planes = values[:, None] if values.ndim == 3 else values
    resized = F.interpolate(planes.double(), like.shape[-2:], mode="nearest").to(values.dtype)
    return resized[:, 0] if values.ndim == 3 else resized
