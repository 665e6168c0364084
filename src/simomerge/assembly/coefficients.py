"""One coefficient per expert and block, learned by matching the experts' predictions on unlabelled images.

AdaMerging (arXiv 2310.02575) learns such coefficients by minimising the entropy of a classifier's predictions. Dense
regression has no such entropy, so the experts are the teachers. Their predictions are matched rather than their
features, because matching the features of several experts pulls towards their mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from simomerge.assembly.experts import check_experts, with_merged_encoder
from simomerge.assembly.realign.blend import EncoderBlend, task_vectors
from simomerge.assembly.realign.predictions import TeacherPredictions
from simomerge.assembly.realign.sums import fold_heads, head_targets
from simomerge.assembly.realign.training import match_predictions
from simomerge.core import distributed
from simomerge.datasets.pictures import as_images
from simomerge.merging import TaskArithmetic
from simomerge.models.model import SimoModel
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
            seeded = replace(settings, seed=settings.seed + turn)
            match_predictions(blend, predictions, seeded, f"coefficients {turn + 1}/{rounds}")
            method = blend.method()
            model = with_merged_encoder(base, experts, method)
    return method


class _Blend(nn.Module):
    """A merge by task arithmetic with folded heads, as a function of the coefficients; only these are trained."""

    def __init__(
        self, folded: SimoModel, base: SimoModel, experts: Mapping[str, SimoModel], start: TaskArithmetic
    ) -> None:
        super().__init__()
        self.tasks = folded.tasks
        self.experts = sorted(experts)
        self.model = folded.requires_grad_(False)
        theta = dict(base.encoder.backbone.named_parameters())
        folded.encoder.backbone.load_state_dict(theta, strict=False)  # all but buffers, such as those of batch norms
        blend = EncoderBlend(folded, task_vectors(base, {task: experts[task] for task in self.experts}), least=0)
        blocks = blend.coefficients.shape[1]
        blend.coefficients.data.copy_(torch.tensor([_per_block(start, task, blocks) for task in self.experts]))
        folded.add_module("encoder", blend)

    def train(self, mode: bool = True) -> _Blend:
        """Keep the model in evaluation mode, so that the batch norms of the frozen heads do not change."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        logits: dict[str, Tensor] = self.model(images)
        return logits

    @property
    def blend(self) -> EncoderBlend:
        return cast(EncoderBlend, self.model.encoder)

    def method(self) -> TaskArithmetic:
        learned = self.blend.scales.detach().cpu()
        return TaskArithmetic(
            scale={
                task: [round(float(value), 4) for value in row] for task, row in zip(self.experts, learned, strict=True)
            }
        )


def _per_block(method: TaskArithmetic, task: str, blocks: int) -> list[float]:
    scale = method.scale[task] if isinstance(method.scale, Mapping) else method.scale
    return [float(scale)] * blocks if isinstance(scale, (int, float)) else [float(value) for value in scale]
