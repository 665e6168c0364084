"""Train a model, in place, to predict what its experts predict on unlabelled images.

Each task's distance to its expert is divided by its value at the start, so that the tasks are balanced whatever their
units. Some images are held out; the weights with the smallest distance on them are kept, the start included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from simomerge.assembly.realign.agreement import LEAST_DISTANCE, distance_apart, least_distance
from simomerge.assembly.realign.held_out import split_off, train_and_keep_best
from simomerge.assembly.realign.method import Inputs, distance_ratio
from simomerge.assembly.realign.predictions import TeacherPredictions, UnlabelledImages
from simomerge.core import distributed
from simomerge.core.caution import warn
from simomerge.core.machine import autocast, training_device
from simomerge.core.modes import evaluating
from simomerge.datasets.base import DenseDataset
from simomerge.datasets.batches import ordered_batches, ordered_batches_of_all
from simomerge.datasets.groups import evenly
from simomerge.models.heads.projections import Projection, is_foldable
from simomerge.models.model import SimoModel
from simomerge.training.settings import TrainSettings, TuneOptions

UNIT_IMAGES = 64
"""Images on which the distances at the start are measured."""

LEAST_UNIT = 0.02
"""The smallest unit of a task's distance, relative to the distance between predictions for different images."""

MOST_VALUES = 1 << 27
"""Predictions of a task that are compared at once: 0.5 GB in float32, and several times that while they are."""

FEW_IMAGES = 32
"""With fewer images for training, a warning says so."""


@dataclass(frozen=True)
class ExpertDistances:
    """The distance of each task's predictions to its expert's, in units of the distance at the start.

    An instance is called with a model and a batch, like every `ModelLosses`.

    Args:
        experts: By task.
        stored: The batches hold the experts' logits. If false, the experts predict each batch when it is needed.
        features: Weight of the distance between the outputs of the heads' first layers and the experts', relative to
            its value at the start. It needs ``stored`` to be false.
        units: The distances at the start by name; 1 by default.
        batch_size: Images at once where distances are measured.
    """

    experts: Mapping[str, SimoModel]
    stored: bool = True
    features: float = 0.0
    units: Mapping[str, float] = field(default_factory=dict)
    batch_size: int = 32

    def __call__(self, model: SimoModel, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        found = {name: value / self.units.get(name, 1.0) for name, value in self._distances(model, batch).items()}
        inside = {task: self.features * found.get(f"{task}/features", 0.0) for task in model.tasks}
        return {task: found[task] + inside[task] for task in model.tasks}

    def in_units_of(self, model: SimoModel, data: DenseDataset) -> ExpertDistances:
        """The same distances, in units of those of a model on some images of a dataset.

        A unit is at least `LEAST_UNIT` times the distance between the expert's predictions for different images, so
        that a task that merging hardly changed does not outweigh all others.
        """
        sample = data._subset(evenly(range(len(data)), UNIT_IMAGES))
        start, predicted = self.measured(model, sample), self._predictions(model, sample)
        least = {
            name: max(LEAST_UNIT * distance_apart(task, predicted[name]), least_distance(task, predicted[name]))
            for name, task in model.tasks.items()
        }
        return replace(self, units={name: max(value, least.get(name, LEAST_DISTANCE)) for name, value in start.items()})

    def least(self, model: SimoModel, data: DenseDataset) -> dict[str, float]:
        """`least_distance` of the experts' predictions for some images of a dataset, by task."""
        predicted = self._predictions(model, data)
        return {name: least_distance(task, predicted[name]) for name, task in model.tasks.items()}

    def ratios(self, model: SimoModel, data: DenseDataset, before: Mapping[str, float]) -> dict[str, float]:
        """How far every task of a model is from its expert, relative to what `measured` found before a change."""
        after, least = self.measured(model, data), self.least(model, data)
        return {task: distance_ratio(before[task], after[task], value) for task, value in least.items()}

    @torch.no_grad()
    def _predictions(self, model: SimoModel, sample: DenseDataset) -> dict[str, Tensor]:
        """Each expert's predictions for at most 32 images, spread evenly, on the model's device.

        There are fewer images, but two, if a task would have more than `MOST_VALUES` values.
        """
        device, (height, width) = next(model.parameters()).device, sample.image(0).shape[-2:]
        values = height * width * max(task.channels for task in model.tasks.values())
        places = evenly(range(len(sample)), min(32, max(2, MOST_VALUES // values)))
        parts = []
        for batch in ordered_batches(sample._subset(places), self.batch_size):
            moved = {key: value.to(device) for key, value in batch.items()}
            parts.append(moved if self.stored else self._predicted(moved["image"])[0])
        return {name: torch.cat([part[name] for part in parts]) for name in model.tasks}

    @torch.no_grad()
    def measured(self, model: SimoModel, data: DenseDataset) -> dict[str, float]:
        """Mean distances over a dataset, without units, by task and, for the heads' first layers, ``TASK/features``.

        Under torchrun, the processes share the batches.
        """
        device, sums = next(model.parameters()).device, dict[str, Tensor]()
        with evaluating(model):
            for batch, counts in ordered_batches_of_all(data, self.batch_size):
                moved = {key: value.to(device) for key, value in batch.items()}
                with autocast(device):
                    distances = self._distances(model, moved)
                for name, value in distances.items():
                    share = value.cpu().double() * (len(moved["image"]) if counts else 0)
                    sums[name] = sums.get(name, 0) + share
        distributed.add_up(*sums.values())
        return {name: float(value) / len(data) for name, value in sums.items()}

    def _distances(self, model: SimoModel, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        if self.stored:
            logits = model(batch["image"])
            return {name: task.distance(logits[name], batch[name]) for name, task in model.tasks.items()}
        features = model.encode(batch["image"])
        logits = model.decode(features)
        targets, layers = self._predicted(batch["image"], model)
        found = {name: task.distance(logits[name], targets[name]) for name, task in model.tasks.items()}
        for name, wanted in layers.items():
            given = [projection(features.of(name)) for projection in _projections(model, name)]
            found[f"{name}/features"] = torch.stack(list(map(_relative_error, given, wanted))).mean()
        return found

    @torch.no_grad()
    def _predicted(
        self, images: Tensor, model: SimoModel | None = None
    ) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
        """The experts' logits and, with ``features`` and a model, the outputs of the heads' first layers."""
        logits: dict[str, Tensor] = {}
        layers: dict[str, list[Tensor]] = {}
        for task, expert in self.experts.items():
            features = expert.encode(images)
            logits |= expert.decode(features, [task])
            if self.features and model is not None and _foldable(model, expert, task):
                layers[task] = [projection(features) for projection in _projections(expert, task)]
        return logits, layers


def _foldable(model: SimoModel, expert: SimoModel, task: str) -> bool:
    """Whether both heads declare their first layers."""
    return is_foldable(model.heads[task]) and is_foldable(expert.heads[task])


def _projections(model: SimoModel, task: str) -> list[Projection]:
    head: Any = model.heads[task]
    projections: list[Projection] = head.projections()
    return projections


def _relative_error(given: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error relative to the variance of the target."""
    error = (given.float() - wanted.float()).square().mean()
    return error / wanted.float().var().clamp(min=1e-12)


@dataclass(frozen=True)
class Distilling:
    """How a model is distilled.

    Args:
        settings: Of the training.
        hold_out: Share of the images that is held out to keep the best weights.
        retry: See `train_and_keep_best`.
        stored: Keep the experts' predictions on disk, instead of computing them for every batch.
        features: See `ExpertDistances`.
        augmentation, checkpointing: See `TuneOptions`.
    """

    settings: TrainSettings
    hold_out: float
    retry: bool = False
    stored: bool = True
    features: float = 0.0
    augmentation: str = "flip"
    checkpointing: bool = False

    def train(self, model: SimoModel, inputs: Inputs, label: str) -> dict[str, Any]:
        """Train the parameters of a model that require a gradient; what was measured, for the provenance.

        Warns:
            UserWarning: A task is further from its expert than at the start, the weights at the start are kept, or the
                training diverged or was stopped.
        """
        data: DenseDataset
        if self.stored:
            data = TeacherPredictions(inputs.images, inputs.experts, inputs.work_folder / "predictions")
        else:
            data = UnlabelledImages(inputs.images, inputs.experts)
        train, held_out = split_off(data, self.hold_out)
        if len(train) < FEW_IMAGES:
            warn(f"{label}: {len(train)} images are few, and the model may come to fit them alone; give some hundreds.")
        home = next(model.parameters()).device
        with evaluating(*inputs.experts.values()):
            at_once = min(32, self.settings.batch_size)
            distances = ExpertDistances(inputs.experts, self.stored, self.features, batch_size=at_once)
            distances = distances.in_units_of(model, train)
            before = distances.measured(model, held_out) if held_out else {}
            try:
                cost = self._train(model, distances, (train, held_out), inputs, label)
            finally:
                for expert in inputs.experts.values():
                    expert.to(home)
            changes = distances.ratios(model, held_out, before) if held_out else {}
        if worse := {task: ratio for task, ratio in changes.items() if ratio > 1}:
            shown = ", ".join(f"{task} by {100 * (ratio - 1):.1f} %" for task, ratio in worse.items())
            warn(f"{label}: on held-out images these tasks are now further from their experts: {shown}.")
        return {"distance_ratio": changes, **cost}

    def _train(
        self, model: SimoModel, distances: ExpertDistances, data: tuple[Any, Any], inputs: Inputs, label: str
    ) -> dict[str, Any]:
        # Stored predictions need no expert while the model is trained; others are made where it is trained.
        place = torch.device("cpu") if self.stored else training_device()
        for expert in inputs.experts.values():
            expert.to(place)
        state_file = inputs.work_folder / "state.safetensors"
        options = TuneOptions(augmentation=self.augmentation, checkpointing=self.checkpointing)
        return train_and_keep_best(model, data, self.settings, state_file, label, distances, options, self.retry)
