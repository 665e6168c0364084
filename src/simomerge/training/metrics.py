"""Streaming metrics of dense tasks, computed by torchmetrics. Invalid pixels do not count.

Metrics and conventions are those of "Single-Input Multi-Output Model Merging" (arXiv 2504.11268): mIoU for
segmentation, mean angular distance in degrees for normals, F1 for edges, and the absolute error for all its others. Own
additions: the IoU of binary masks, the end-point error of optical flow, and the root mean squared error of regressions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simomerge.core import distributed
from simomerge.datasets.losses import IGNORE_LABEL, unit_vectors
from simomerge.datasets.tasks import Task

_FRACTIONS = ("pixel_accuracy", "precision", "recall", "f1", "within_11", "within_3", "rel_err", "delta_1")
"""Secondary metrics that are fractions. They are shown in percent, whatever the unit of the main metric is."""


_BINARY = {
    "edges": {"f1": "BinaryF1Score", "precision": "BinaryPrecision", "recall": "BinaryRecall"},
    "binary": {
        "iou": "BinaryJaccardIndex",
        "f1": "BinaryF1Score",
        "precision": "BinaryPrecision",
        "recall": "BinaryRecall",
    },
}
"""Metrics of torchmetrics for kinds whose targets are 0 or 1, by name."""

_MEANS = {
    "normals": ("mean_angle", "within_11"),
    "depth": ("abs_err", "rel_err", "delta_1"),
    "flow": ("epe", "within_3"),
}
"""Metrics that are means over the valid pixels; for other kinds it is the absolute error."""


class TaskMetrics(nn.Module):
    """All metrics of one task over a stream of batches; ``task.metric`` is the main one.

    Example:
        >>> metrics = TaskMetrics(Task("depth"))
        >>> metrics.update(torch.full((1, 1, 2, 2), 3.0), torch.tensor([[[[2.0, 4.0], [0.0, 3.0]]]]))
        >>> round(metrics.compute()["abs_err"], 4)          # the pixel of depth 0 is invalid
        0.6667
    """

    def __init__(self, task: Task) -> None:
        from torchmetrics import MetricCollection  # slow to import, so only for evaluation

        super().__init__()
        self.task = task
        self.metrics = MetricCollection(_metrics(task), compute_groups=False)
        self._has_values = self._has_nan = False

    def update_by_logits(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch of logits (B, C, H, W), which are activated first, and targets."""
        self._look_for_nan(logits, target)  # a class can be chosen among NaN, too
        self.update(self.task.activate(logits.float()), target)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch of activated predictions and targets; see `simomerge.datasets.tasks.KINDS`."""
        valid = self.task.valid(target)
        if not valid.any():
            return
        self._has_values = True
        if prediction.is_floating_point():
            self._look_for_nan(prediction, target)
        if self.task.kind == "segmentation":
            self.metrics.update(prediction, target)
        elif self.task.kind in _BINARY:
            self.metrics.update(prediction[valid], (target[valid] > 0.5).long())
        else:
            for name, values in _errors(self.task, prediction, target, valid).items():
                self.metrics[name].update(*values)

    def _look_for_nan(self, values: Tensor, target: Tensor) -> None:
        """Note a NaN at a valid pixel. torchmetrics would count it as a class, or take all logits for probabilities."""
        valid = self.task.valid(target)
        self._has_nan |= bool((values.isnan().any(1) & (valid.any(1) if valid.ndim == 4 else valid)).any())

    def compute(self) -> dict[str, float]:
        """Metrics of everything added so far, by all processes together.

        They are NaN if no pixel was valid, or if the prediction of a valid pixel was NaN.
        """
        counted = torch.tensor([float(self._has_values), float(self._has_nan)])
        distributed.add_up(counted)  # a process without valid pixels takes part too
        if not counted[0] or counted[1]:
            return dict.fromkeys(self.metrics.keys(), math.nan)
        factors = {**dict.fromkeys(_FRACTIONS, 100.0), self.task.metric: self.task.behaviour.factor}
        values: dict[str, Any] = self.metrics.compute()
        return {name: float(value) * factors.get(name, 1.0) for name, value in values.items()}


def batched(task: Task, values: np.ndarray) -> Tensor:
    """A prediction for one image as `TaskMetrics` takes it: labels (1, H, W) or a map (1, C, H, W)."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))[None]
    return tensor[:, None] if tensor.ndim == 3 and task.kind != "segmentation" else tensor


def _metrics(task: Task) -> dict[str, Any]:
    from torchmetrics import MeanMetric, MeanSquaredError, classification

    if task.kind == "segmentation":
        # The checks of torchmetrics sort the labels of every batch, which takes a tenth of an evaluation.
        options = {"num_classes": len(task.classes), "ignore_index": IGNORE_LABEL, "validate_args": False}
        return {
            "miou": classification.MulticlassJaccardIndex(**options),
            "pixel_accuracy": classification.MulticlassAccuracy(average="micro", **options),
        }
    if task.kind in _BINARY:
        return {name: getattr(classification, metric)() for name, metric in _BINARY[task.kind].items()}
    # By default NaN values are dropped, and a model that predicts NaN would be scored on its other pixels only.
    found: dict[str, Any] = {name: MeanMetric(nan_strategy=math.nan) for name in _MEANS.get(task.kind, ("abs_err",))}
    return {**found, "rmse": MeanSquaredError(squared=False)} if task.kind == "regression" else found


def _errors(task: Task, prediction: Tensor, target: Tensor, valid: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """What the metrics are updated with: values to average over the valid pixels, or predictions and targets."""
    prediction = prediction.float()
    if task.kind == "normals":
        dot = (unit_vectors(prediction) * target).sum(1)[valid]
        angle = torch.rad2deg(torch.acos(dot.clamp(-1, 1)))
        return {"mean_angle": (angle,), "within_11": ((angle < 11.25).float(),)}
    if task.kind == "flow":
        length = (prediction - target).square().sum(1).sqrt()[valid]
        return {"epe": (length,), "within_3": ((length < 3).float(),)}
    prediction, target = prediction[valid], target[valid]
    error = (prediction - target).abs()
    if task.kind == "regression":
        return {"abs_err": (error,), "rmse": (prediction, target)}
    if task.kind != "depth":
        return {"abs_err": (error,)}
    positive = prediction.clamp(min=1e-6)
    ratio = torch.maximum(target / positive, positive / target)
    return {"abs_err": (error,), "rel_err": (error / target,), "delta_1": ((ratio < 1.25).float(),)}
