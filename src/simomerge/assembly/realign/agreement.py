"""How far a merged model's predictions are from its experts' on held-out images, task by task. It needs no labels."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from simomerge.assembly.realign.predictions import as_stored
from simomerge.assembly.realign.teacher import Observation
from simomerge.core import distributed
from simomerge.core.machine import autocast
from simomerge.core.modes import evaluating
from simomerge.datasets.groups import evenly, held_out
from simomerge.datasets.tasks import Task
from simomerge.models.model import SimoModel

MOST_IMAGES = 64
"""At most this number of held-out images is kept; more change a mean distance little."""

LEAST_DISTANCE = 1e-6
"""Distances to an expert that are smaller are rounding, where predictions have no unit of their own."""


def distance_apart(task: Task, predictions: Tensor) -> float:
    """The distance between predictions (N, C, H, W) for different images, far apart in their order."""
    return float(task.distance(predictions.roll(max(len(predictions) // 2, 1), 0), predictions))


def least_distance(task: Task, predictions: Tensor) -> float:
    """The distance from predictions (N, C, H, W) below which a distance is rounding.

    If they have a unit of their own, it is relative to the distance between predictions for different images, and not
    below the distance that a relative error of `LEAST_DISTANCE` makes.
    """
    if not task.has_own_scale:
        return LEAST_DISTANCE
    rounding = float(task.distance((1 + LEAST_DISTANCE) * predictions, predictions))
    return max(LEAST_DISTANCE * distance_apart(task, predictions), rounding) or LEAST_DISTANCE


def judging(images: Any) -> list[int]:
    """Indices of the images on which a fold is judged: held-out ones, spread evenly over all of them."""
    return evenly(held_out(images), MOST_IMAGES)


@dataclass
class Agreement:
    """Held-out images with the experts' predictions for them.

    Args:
        experts: By task.
        chosen: Indices of the images to keep, see `judging`. Under torchrun each process keeps those of its share.

    Attributes:
        images: Batches of images, float (B, 3, H, W).
        logits: The experts' logits (B, C, H, W) by task, for each batch, as `as_stored` gives them.
    """

    experts: Mapping[str, SimoModel]
    chosen: Collection[int]
    images: list[Tensor] = field(default_factory=list)
    logits: list[dict[str, Tensor]] = field(default_factory=list)

    @torch.no_grad()
    def add(self, batch: Observation) -> None:
        """Keep the chosen images of a batch."""
        places = [place for place, index in enumerate(batch.indices) if index in self.chosen]
        if not places:
            return
        chosen = torch.tensor(places, device=batch.images.device)
        logits = {}
        for task, expert in self.experts.items():
            with evaluating(expert), autocast(batch.images.device):
                predicted = expert.decode(batch.features[task].of_images(chosen), [task])[task]
            logits[task] = as_stored(predicted, expert.tasks[task])
        self.images.append(batch.images[chosen])
        self.logits.append(logits)

    def tensors(self) -> dict[str, Tensor]:
        """What is kept, by name, to save it."""
        found = {f"agreement/{index}/image": images for index, images in enumerate(self.images)}
        for index, logits in enumerate(self.logits):
            found |= {f"agreement/{index}/logits/{task}": value for task, value in logits.items()}
        return found

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep what `tensors` gave. Raises RuntimeError if an earlier version rounded logits that must be float32."""
        for task, expert in self.experts.items():
            first = tensors.get(f"agreement/0/logits/{task}")
            if first is not None and first.dtype != as_stored(first, expert.tasks[task]).dtype:
                raise RuntimeError(f"its predictions of {task} are {first.dtype}")
        device = next(next(iter(self.experts.values())).parameters()).device
        while (found := tensors.get(f"agreement/{len(self.images)}/image")) is not None:
            place = len(self.images)
            self.logits.append({task: tensors[f"agreement/{place}/logits/{task}"].to(device) for task in self.experts})
            self.images.append(found.to(device))

    @torch.no_grad()
    def distances(self, model: SimoModel) -> dict[str, float]:
        """Mean `Task.distance` of the model's predictions from the experts', by task.

        NaN if no image was kept. Under torchrun it is the mean over the images of all processes.
        """
        sums = dict.fromkeys(self.experts, 0.0)
        for images, logits in zip(self.images, self.logits, strict=True):
            with evaluating(model), autocast(images.device):
                predicted = model.decode(model.encode(images), list(sums))
            for task in sums:
                sums[task] += float(model.tasks[task].distance(predicted[task], logits[task].float())) * len(images)
        return self._means(sums)

    def least(self) -> dict[str, float]:
        """`least_distance` by task. Under torchrun it is the mean over the images of all processes."""
        sums = dict.fromkeys(self.experts, 0.0)
        for size in {images.shape[-2:] for images in self.images}:
            chosen = [place for place, images in enumerate(self.images) if images.shape[-2:] == size]
            for name, expert in self.experts.items():
                task, found = expert.tasks[name], [self.logits[place][name] for place in chosen]
                # All logits of many classes take gigabytes, and this bound depends on those of some kinds only.
                predictions = torch.cat(found if task.has_own_scale else found[:1])
                sums[name] += least_distance(task, predictions) * sum(map(len, found))
        return self._means(sums)

    def _means(self, sums: Mapping[str, float]) -> dict[str, float]:
        totals = torch.tensor([sum(map(len, self.images)), *sums.values()], dtype=torch.float64)
        distributed.add_up(totals)
        count = float(totals[0])
        means = totals[1:] / count if count else totals[1:] * float("nan")
        return dict(zip(sums, means.tolist(), strict=True))
