"""Judges predictions against labels, or against the experts' own predictions for images without labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simomerge.assembly.realign.teacher import observe
from simomerge.core.caution import warn
from simomerge.core.errors import InputError
from simomerge.core.machine import autocast, in_float64
from simomerge.core.modes import evaluating
from simomerge.core.progress import progress
from simomerge.datasets.batches import images_within, ordered_batches
from simomerge.datasets.pictures import as_images
from simomerge.datasets.tasks import Task
from simomerge.models.model import SimoModel
from simomerge.training.evaluate import Scores, normalised_performance
from simomerge.training.metrics import TaskMetrics


@dataclass(frozen=True)
class JudgedBatch:
    """A batch of images and the targets that predictions for it are compared with.

    Attributes:
        images: float (B, 3, H, W), on the experts' device.
        targets: targets by task, as in `simomerge.datasets.tasks.KINDS`.
    """

    images: Tensor
    targets: dict[str, Tensor]


class Judge:
    """Measures how good predictions are, relative to the experts.

    With labels, performance is the metric relative to the expert's own (normalised performance): 1 is equal to the
    expert, higher is possible. Without labels the expert's prediction is the target, and performance is the agreement
    with it in the task's metric: 1 is the expert's prediction, 0 agrees no better than the expert's prediction for the
    next image.

    Args:
        experts: experts by task, as `simomerge.assembly.experts.check_experts` returns them.
        source: a dataset, whose labels are read if ``labelled``; otherwise images of any form.
        labelled: compare with labels.
        batch_size: images in a batch.
        lenient: leave out the tasks whose expert predicts the same for every image, with a warning, if others remain.

    Raises:
        InputError: fewer than two images, a dataset without the labels of a task, images that cannot be batched, or an
            expert that predicts the same for every image.

    Example:
        >>> judge = Judge(experts, load_data("rooms", split="val"), labelled=True)          # doctest: +SKIP
        >>> judge.performance(judge.scores(model))["depth"]                                 # doctest: +SKIP
        0.97
    """

    def __init__(
        self, experts: Mapping[str, SimoModel], source: Any, labelled: bool, batch_size: int = 32, lenient: bool = False
    ) -> None:
        self.experts = experts
        self.tasks: dict[str, Task] = {name: expert.tasks[name] for name, expert in experts.items()}
        self.labelled = labelled
        self.source = source if labelled else as_images(source).readable()
        self.batch_size = batch_size
        self.device = next(next(iter(experts.values())).parameters()).device
        if len(self.source) < 2:
            raise InputError("one image: agreement with the experts is judged on at least two images; give more.")
        # Kept, because every model that is judged would otherwise cost another pass of all experts.
        self._predicted = [] if labelled else list(self._predictions())
        self.best, self.chance = (self._expert_metrics(), {}) if labelled else self._agreement_range()
        if not labelled:
            self._check_range(lenient)

    def __iter__(self) -> Iterator[JudgedBatch]:
        """The images in batches, with their targets."""
        if not self.labelled:
            yield from self._predicted
            return
        dataset = self.source.select(list(self.tasks))
        for batch in ordered_batches(dataset, images_within(self.batch_size, dataset[0]["image"])):
            targets = {name: batch[name].to(self.device) for name in self.tasks}
            yield JudgedBatch(batch["image"].to(self.device), targets)

    def _predictions(self) -> Iterator[JudgedBatch]:
        for batch in observe(self.experts, self.source, self.batch_size, "experts' predictions", check=False):
            with torch.no_grad(), evaluating(*self.experts.values()), autocast(self.device):
                logits = {
                    name: expert.decode(batch.features[name], [name])[name] for name, expert in self.experts.items()
                }
            targets = {name: _as_target(self.tasks[name], value.float()) for name, value in logits.items()}
            yield JudgedBatch(batch.images, targets)

    def metrics(self) -> dict[str, TaskMetrics]:
        """New, empty metrics of every task."""
        return {name: TaskMetrics(task).to(self.device) for name, task in self.tasks.items()}

    @torch.no_grad()
    def scores(self, model: SimoModel) -> Scores:
        """Metrics of the model's tasks against the targets."""
        names = [name for name in model.tasks if name in self.tasks]
        metrics = {name: TaskMetrics(self.tasks[name]).to(self.device) for name in names}
        for batch in self:
            with evaluating(model), autocast(self.device):
                logits = model.decode(model.encode(batch.images), names)
            for name, metric in metrics.items():
                metric.update_by_logits(logits[name], batch.targets[name])
        return {name: metric.compute() for name, metric in metrics.items()}

    def performance(self, scores: Scores) -> dict[str, float]:
        """Performance by task: 1 is equal to the expert; the class describes what 0 is."""
        if self.labelled:
            own = {name: {self.tasks[name].metric: best} for name, best in self.best.items()}
            return normalised_performance(scores, own, self.tasks)
        found = {}
        for name, values in scores.items():
            chance = self.chance[name]
            found[name] = (values[self.tasks[name].metric] - chance) / (self.best[name] - chance)
        return found

    def gains(self, scores: Scores) -> dict[str, float]:
        """Gain over the expert by task, in percent: 0 is equal to the expert.

        With labels it is the relative change of the metric, whose mean over the tasks is Delta_MTL. Without labels it
        is the performance minus 1.
        """
        if not self.labelled:
            return {name: 100 * (value - 1) for name, value in self.performance(scores).items()}
        found = {}
        for name, values in scores.items():
            sign = 1 if self.tasks[name].higher_is_better else -1
            found[name] = 100 * sign * (values[self.tasks[name].metric] - self.best[name]) / self.best[name]
        return found

    def _expert_metrics(self) -> dict[str, float]:
        best = {}
        for done, (name, expert) in enumerate(self.experts.items(), start=1):
            best[name] = self.scores(expert)[name][self.tasks[name].metric]
            if not best[name] > 0:
                raise InputError(
                    f"task {name!r}: the expert's {self.tasks[name].metric} is {best[name]}; nothing can be relative"
                    " to it."
                )
            progress("experts", done, len(self.experts), "")
        return best

    def _agreement_range(self) -> tuple[dict[str, float], dict[str, float]]:
        """Metrics of full agreement, and of the expert's prediction for the previous image in place of its own."""
        same, other = self.metrics(), self.metrics()
        before = self._predicted[-1].targets
        for batch in self:
            for name, target in batch.targets.items():
                previous = torch.cat([_resize_like(before[name][-1:], target), target[:-1]])
                same[name].update(target, target)
                other[name].update(previous, target)
            before = batch.targets
        best, chance = (
            {name: metric.compute()[self.tasks[name].metric] for name, metric in metrics.items()}
            for metrics in (same, other)
        )
        return best, chance

    def _check_range(self, lenient: bool) -> None:
        """Check for every task that the metric of full agreement differs from that of another image's prediction.

        Args:
            lenient: leave out tasks where it does not differ, with a warning, if others remain.

        Raises:
            InputError: the metrics of a task are equal or not finite.
        """
        ranges = {name: self.best[name] - self.chance[name] for name in self.tasks}
        for name, width in ranges.items():
            if not math.isfinite(width):
                raise InputError(
                    f"the predictions of the expert of {name!r} are not finite, or nowhere valid, so nothing can be"
                    " compared with them: give labelled data, or check the expert."
                )
        constant = [name for name, width in ranges.items() if not abs(width) > 1e-6 * self._size(name)]
        if constant and (not lenient or len(constant) == len(ranges)):
            raise InputError(
                f"the expert of {constant[0]!r} predicts the same for every image, so nothing can be compared with its"
                " predictions: give labelled data, or other images."
            )
        for name in constant:
            warn(
                f"the expert of {name!r} predicts the same for all held-out images, so {name} does not count in the"
                " choice; give images of different scenes."
            )
            del self.tasks[name]

    def _size(self, name: str) -> float:
        """Mean absolute value of a task's predictions in a unit of their own; 1 for tasks without one."""
        if not self.tasks[name].has_own_scale:
            return 1.0
        return sum(float(batch.targets[name].abs().mean()) for batch in self._predicted) / len(self._predicted)


def _as_target(task: Task, logits: Tensor) -> Tensor:
    """An expert's prediction as a target, of which every finite pixel counts.

    In labels of a distance map 0 means no value, but an expert that predicts a disparity of 0 says that it is far away.
    """
    prediction = task.activate(logits)
    is_distance = task.channels == 1 and task.behaviour.invalid == 0
    return prediction.clamp(min=torch.finfo(prediction.dtype).tiny) if is_distance else prediction


def _resize_like(values: Tensor, like: Tensor) -> Tensor:
    """Resize targets to the height and width of others, by nearest neighbour."""
    if values.shape[-2:] == like.shape[-2:]:
        return values
    planes = values[:, None] if values.ndim == 3 else values
    resized = F.interpolate(in_float64(planes), like.shape[-2:], mode="nearest").to(values)
    return resized[:, 0] if values.ndim == 3 else resized
