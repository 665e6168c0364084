"""One coefficient per expert and block, learned by matching the experts' predictions on unlabelled images.

AdaMerging (arXiv 2310.02575) learns such coefficients by minimising the entropy of a classifier's predictions. Dense
regression has no such entropy, so the experts are the teachers. Their predictions are matched rather than their
features, because matching the features of several experts pulls towards their mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from simomerge.assembly.experts import check_experts, with_merged_encoder
from simomerge.assembly.realign.predictions import TeacherPredictions
from simomerge.assembly.realign.sums import fold_heads, head_targets
from simomerge.assembly.realign.training import prediction_distances
from simomerge.core import distributed
from simomerge.datasets import random_flip
from simomerge.datasets.pictures import as_images
from simomerge.merging import TaskArithmetic
from simomerge.merging.engine.depth import Depth
from simomerge.models.model import SimoModel
from simomerge.training.loop import fit
from simomerge.training.settings import TrainSettings

COEFFICIENT_SETTINGS = TrainSettings(steps=40, batch_size=16, lr=0.03, weight_decay=0.0)


def learn_coefficients(
    base: SimoModel,
    experts: Mapping[str, SimoModel],
    images: Any,
    start: float | Mapping[str, Any] = 0.3,
    settings: TrainSettings = COEFFICIENT_SETTINGS,
    rounds: int = 2,
    count: int | None = 256,
) -> TaskArithmetic:
    """Task arithmetic with a scale per expert and block, learned without labels.

    In each round the heads are folded to the merge so far. The coefficients are then trained, with frozen heads, so
    that the predictions match the experts'.

    Args:
        base: The foundation encoder.
        experts: By task; their heads must declare their projections.
        images: A folder of pictures, a sequence of images, or a dataset whose labels are not read; all of one size.
        start: The scale to start from, as `TaskArithmetic` takes it.
        settings: How each round trains.
        rounds: How often the fold and the training alternate.
        count: Number of images to use.

    Returns:
        The merge method with the learned coefficients as its ``scale``.

    Raises:
        InputError: The experts or their heads do not fit, or the images have several sizes.

    Example:
        >>> method = learn_coefficients(base, experts, "photos/")              # doctest: +SKIP
        >>> model = merge(base, experts, method)                               # doctest: +SKIP
    """
    experts = check_experts(base, experts)
    source = as_images(images, count).readable(one_size=True)
    method = TaskArithmetic(scale=dict(start) if isinstance(start, Mapping) else start)
    model = with_merged_encoder(base, experts, method)
    targets = list(head_targets(model, experts, source))
    with distributed.temporary_folder() as temporary:
        predictions = TeacherPredictions(source, experts, Path(temporary) / "predictions")
        for turn in range(rounds):
            folded = fold_heads(model, targets).model
            blend = _Blend(folded, base, experts, method)
            fit(
                blend,
                partial(_relative_distances, blend, blend.initial_distances(predictions)),
                predictions,
                replace(settings, seed=settings.seed + turn),
                transform=partial(random_flip, model.tasks),
                label=f"coefficients {turn + 1}/{rounds}",
            )
            method = blend.method()
            model = with_merged_encoder(base, experts, method)
    return method


class _Blend(nn.Module):
    """A model whose encoder weights are a function of the coefficients; only the coefficients are trained."""

    def __init__(
        self, folded: SimoModel, base: SimoModel, experts: Mapping[str, SimoModel], start: TaskArithmetic
    ) -> None:
        super().__init__()
        self.model = folded.requires_grad_(False)
        self.tasks = folded.tasks
        self.names = [name for name, value in base.encoder.backbone.named_parameters() if value.is_floating_point()]
        self.experts = sorted(experts)
        theta = dict(base.encoder.backbone.named_parameters())
        self.base = {name: theta[name].detach() for name in self.names}
        weights = {task: dict(expert.encoder.backbone.named_parameters()) for task, expert in experts.items()}
        self.vectors = {
            name: torch.stack([weights[task][name].detach() - self.base[name] for task in self.experts])
            for name in self.names
        }
        self.depth = Depth(self.names)
        blocks = max(self.depth.blocks, 1)
        initial = torch.tensor([_per_block(start, task, blocks) for task in self.experts])
        self.coefficients = nn.Parameter(initial)

    def train(self, mode: bool = True) -> _Blend:
        """Keep the model in evaluation mode, so that the batch norms of the frozen heads do not change."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        scales = self.coefficients.clamp(min=0)
        merged = {}
        for name in self.names:
            device = scales.device
            vector = self.vectors[name].to(device)
            merged[f"backbone.{name}"] = self.base[name].to(device) + torch.tensordot(
                scales[:, self.depth.position(name)], vector, 1
            )
        features = functional_call(self.model.encoder, merged, (images,))
        return self.model.decode(features)

    @torch.no_grad()
    def initial_distances(self, predictions: TeacherPredictions) -> dict[str, float]:
        """The distance of each task from its teacher at the start. Later distances are divided by it."""
        samples = [predictions[index] for index in range(min(16, len(predictions)))]
        batch = {key: torch.stack([each[key] for each in samples]).to(self.coefficients.device) for key in samples[0]}
        return {name: max(float(value), 1e-6) for name, value in prediction_distances(self, batch).items()}

    def method(self) -> TaskArithmetic:
        learned = self.coefficients.detach().clamp(min=0).cpu()
        return TaskArithmetic(
            scale={
                task: [round(float(value), 4) for value in row] for task, row in zip(self.experts, learned, strict=True)
            }
        )


def _per_block(method: TaskArithmetic, task: str, blocks: int) -> list[float]:
    scale = method.scale[task] if isinstance(method.scale, Mapping) else method.scale
    return [float(scale)] * blocks if isinstance(scale, (int, float)) else [float(value) for value in scale]


def _relative_distances(blend: _Blend, units: Mapping[str, float], batch: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: distance / units[name] for name, distance in prediction_distances(blend, batch).items()}
