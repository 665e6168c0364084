"""Streaming metrics of dense tasks; invalid pixels never count. torchmetrics does the counting.

Metrics and their conventions: "Single-Input Multi-Output Model Merging" (arXiv 2504.11268): mIoU for
segmentation, mean angular distance in degrees for normals, absolute error for all else.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from simomerge.core import distributed
from simomerge.datasets.tasks import IGNORE_LABEL, Task, unit_vectors


class TaskMetrics(nn.Module):
    """All metrics of one task over a stream of batches.

    Args:
        task: whose metrics; the one that speaks for it is ``task.metric``.

    Example:
        >>> metrics = TaskMetrics(Task("depth"))
        >>> metrics.update(torch.full((1, 1, 2, 2), 3.0), torch.tensor([[[[2.0, 4.0], [0.0, 3.0]]]]))
        >>> round(metrics.compute()["abs_err"], 4)          # the pixel of depth 0 is invalid
        0.6667
    """

    def __init__(self, task: Task) -> None:
        from torchmetrics import MetricCollection  # with its own imports two seconds: only for who evaluates

        super().__init__()
        self.task = task
        self.metrics = MetricCollection(_metrics(task), compute_groups=False)
        self._counted = False

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count a batch: activated predictions and targets as in `simomerge.datasets.tasks.KINDS`."""
        valid = self.task.valid(target)
        if not valid.any():
            return
        self._counted = True
        if self.task.kind == "segmentation":
            self.metrics.update(prediction, target)
        elif self.task.kind == "edges":
            self.metrics.update(prediction[valid], (target[valid] > 0.5).long())
        else:
            for name, values in _errors(self.task, prediction, target, valid).items():
                self.metrics[name].update(values)

    def compute(self) -> dict[str, float]:
        """Metrics of everything counted so far, by all processes where there are several (torchmetrics adds them up).

        Percent where the unit says so, NaN where nothing was valid.
        """
        counted = torch.tensor(float(self._counted))
        distributed.add_up(counted)  # a process that saw nothing takes part all the same
        if not counted:
            return dict.fromkeys(self.metrics.keys(), math.nan)
        percent = set(_FRACTIONS)
        if self.task.unit.startswith("%"):
            percent.add(self.task.metric)
        values: dict[str, Any] = self.metrics.compute()
        return {name: float(value) * (100.0 if name in percent else 1.0) for name, value in values.items()}


_FRACTIONS = ("pixel_accuracy", "precision", "recall", "within_11", "rel_err", "delta_1")
"""Further metrics that are fractions, whatever the unit of the main one; shown in percent."""


def _metrics(task: Task) -> dict[str, Any]:
    from torchmetrics import MeanMetric
    from torchmetrics.classification import (
        BinaryF1Score,
        BinaryPrecision,
        BinaryRecall,
        MulticlassAccuracy,
        MulticlassJaccardIndex,
    )

    if task.kind == "segmentation":
        classes = len(task.classes)
        return {
            # Without its own checks, which sort every batch's labels and take a tenth of an evaluation.
            "miou": MulticlassJaccardIndex(classes, ignore_index=IGNORE_LABEL, validate_args=False),
            "pixel_accuracy": MulticlassAccuracy(
                classes, average="micro", ignore_index=IGNORE_LABEL, validate_args=False
            ),
        }
    if task.kind == "edges":
        return {"f1": BinaryF1Score(), "precision": BinaryPrecision(), "recall": BinaryRecall()}
    names = {"normals": ("mean_angle", "within_11"), "depth": ("abs_err", "rel_err", "delta_1")}
    # Its default drops NaN values: a model that predicts NaN would be scored on the rest of its pixels.
    return {name: MeanMetric(nan_strategy=math.nan) for name in names.get(task.kind, ("abs_err",))}


def _errors(task: Task, prediction: Tensor, target: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Values to average over the valid pixels, by metric."""
    prediction = prediction.float()
    if task.kind == "normals":
        dot = (unit_vectors(prediction) * target).sum(1)[valid]
        angle = torch.rad2deg(torch.acos(dot.clamp(-1, 1)))
        return {"mean_angle": angle, "within_11": (angle < 11.25).float()}
    error = (prediction[valid] - target[valid]).abs()
    if task.kind != "depth":
        return {"abs_err": error}
    truth, guess = target[valid], prediction[valid].clamp(min=1e-6)
    ratio = torch.maximum(truth / guess, guess / truth)
    return {"abs_err": error, "rel_err": error / truth, "delta_1": (ratio < 1.25).float()}
