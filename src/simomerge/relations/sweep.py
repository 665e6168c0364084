"""How every task performs along every task vector: the encoder theta_0 + lambda tau_t with the heads of all experts.

Source: "Single-Input Multi-Output Model Merging" (arXiv 2504.11268), task relationships, Figures 3, 5 and 6.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from simomerge.assembly.judging import Judge, JudgedBatch
from simomerge.checkpoints import canonicalise
from simomerge.checkpoints.names import is_running_statistic
from simomerge.core.errors import InputError
from simomerge.core.machine import autocast
from simomerge.core.modes import evaluating
from simomerge.core.progress import progress
from simomerge.merging import TaskArithmetic, check_models
from simomerge.models.model import SimoModel
from simomerge.training.metrics import TaskMetrics

LAMBDAS: tuple[float, ...] = tuple(round(0.1 * step, 1) for step in range(16))
"""The paper's sixteen values from 0 (the base) to 1.5; 1 is the expert."""

KEPT = 0.9
"""The share of its performance at 1 that a task keeps within its width, see `Sweeps.width`."""

Point = tuple[str, float]
"""A task vector and a lambda; ("", 0.0) is the base, where all task vectors start."""


@dataclass(frozen=True)
class Sweeps:
    """Every task's performance along every task vector; see `Judge` for the meaning of performance.

    Attributes:
        tasks: the tasks in order.
        lambdas: where performance was measured, ascending.
        labelled: compared with labels, otherwise with the experts' own predictions.
        images: number of images.
        performance: ``performance[primary][task]`` has one value per lambda: the encoder is the base plus lambda times
            the primary task's vector, and the head is the task's expert's.
        metrics: the same in the task's own metric.
    """

    tasks: list[str]
    lambdas: list[float]
    labelled: bool
    images: int
    performance: dict[str, dict[str, list[float]]]
    metrics: dict[str, dict[str, list[float]]]

    def peak(self, task: str) -> float:
        """The lambda of a task's best performance along its own task vector."""
        curve = np.array(self.performance[task][task])
        return self.lambdas[int(np.nanargmax(curve))] if np.isfinite(curve).any() else float("nan")

    def width(self, task: str) -> float:
        """Length of the interval of lambda around 1 in which a task keeps `KEPT` of its performance at 1.

        It is small for a task that is sensitive to changes of its encoder. It ends where the sweep ends.
        """
        curve = np.array(self.performance[task][task])
        at = np.array(self.lambdas)
        level = KEPT * float(np.interp(1.0, at, curve))
        return _reach(at, curve, level, 1) + _reach(at, curve, level, -1)

    def effect(self, primary: str, task: str) -> float:
        """The mean gain of a task over the base along another task's vector, for lambda in (0, 1].

        Positive if the primary task's fine-tuning helps the other task, negative if it hurts.
        """
        curve = self.performance[primary][task]
        inside = [value for at, value in zip(self.lambdas, curve, strict=True) if 0 < at <= 1]
        return sum(inside) / len(inside) - curve[0]

    def to_dict(self) -> dict[str, Any]:
        """All attributes, and what is read off the curves."""
        return {
            **asdict(self),
            "kept": KEPT,
            "peaks": {task: self.peak(task) for task in self.tasks},
            "widths": {task: self.width(task) for task in self.tasks},
            "effects": {a: {b: self.effect(a, b) for b in self.tasks if b != a} for a in self.tasks},
        }


def _reach(at: np.ndarray, curve: np.ndarray, level: float, side: int) -> float:
    """How far from 1 towards one side a curve stays at or above a level."""
    if not np.isfinite(level):
        return float("nan")
    chosen = at > 1 if side > 0 else at < 1
    x = np.concatenate([[1.0], at[chosen][::side]])
    y = np.concatenate([[np.interp(1.0, at, curve)], curve[chosen][::side]])
    for place in range(1, len(x)):
        if not np.isfinite(y[place]):  # the curve is unknown from here on
            return float(abs(x[place - 1] - 1))
        if y[place] < level:
            part = (y[place - 1] - level) / (y[place - 1] - y[place])
            return float(abs(x[place - 1] - 1) + part * abs(x[place] - x[place - 1]))
    return float(abs(x[-1] - 1))


@torch.no_grad()
def sweep(
    base: SimoModel, experts: Mapping[str, SimoModel], judge: Judge, lambdas: Sequence[float] = LAMBDAS
) -> Sweeps:
    """Measure all tasks along all task vectors. Each batch is encoded once per task vector and lambda, for all heads.

    Args:
        base: the foundation encoder.
        experts: experts by task, as `simomerge.assembly.experts.check_experts` returns them.
        judge: the images, and what predictions are compared with.
        lambdas: where to measure; must contain 0 and 1, the base and the expert.

    Raises:
        InputError: lambdas that are negative, or that do not contain 0 and 1.

    Example:
        >>> found = sweep(base, experts, Judge(experts, "photos/", labelled=False))          # doctest: +SKIP
        >>> found.performance["normals"]["depth"]          # depth along the vector of normals  # doctest: +SKIP
        [0.41, 0.44, ...]
    """
    lambdas = check_lambdas(lambdas)
    lines = {task: _Line(base, expert) for task, expert in experts.items()}
    encoder = copy.deepcopy(next(iter(experts.values())).encoder).eval()
    points: list[Point] = [("", 0.0), *((task, at) for task in experts for at in lambdas if at)]
    metrics = {point: judge.metrics() for point in points}
    images, total = 0, len(judge.source) * len(points)
    for batch in judge:
        for done, (task, at) in enumerate(points, start=1):
            lines[task or next(iter(lines))].move(encoder.backbone, at)
            with autocast(batch.images.device):
                features = encoder(batch.images)
            _update(metrics[task, at], experts, features, batch)
            progress("sweeps", images * len(points) + done * len(batch.images), total, f"{task or 'base'} {at:g}")
        images += len(batch.images)
    scores = {point: {name: metric.compute() for name, metric in of.items()} for point, of in metrics.items()}

    def curves(measure: Any) -> dict[str, dict[str, list[float]]]:
        table = {point: measure(values) for point, values in scores.items()}
        return {
            primary: {task: [table[primary if at else "", at][task] for at in lambdas] for task in experts}
            for primary in experts
        }

    main = curves(lambda values: {name: value[judge.tasks[name].metric] for name, value in values.items()})
    return Sweeps(list(experts), lambdas, judge.labelled, images, curves(judge.performance), main)


def check_lambdas(lambdas: Sequence[float]) -> list[float]:
    """The values in ascending order, without repetitions.

    Raises:
        InputError: negative or infinite values, or 0 or 1 is missing.
    """
    found = sorted({float(value) for value in lambdas})
    if not {0.0, 1.0} <= set(found) or found[0] < 0 or not all(map(math.isfinite, found)):
        raise InputError(f"lambdas {', '.join(f'{v:g}' for v in found)}: give 0 (the base), 1 (the expert) and others.")
    return found


def _update(
    metrics: Mapping[str, TaskMetrics], experts: Mapping[str, SimoModel], features: Any, batch: JudgedBatch
) -> None:
    """Update the metrics with every task's prediction from the features, by its own expert's head."""
    for name, expert in experts.items():
        with evaluating(expert.heads[name]), autocast(features.maps[0].device):
            logits = expert.decode(features, [name])[name]
        metrics[name].update_by_logits(logits, batch.targets[name])


class _Line:
    """The encoders theta_0 + lambda tau through the base (lambda 0) and an expert (lambda 1)."""

    def __init__(self, base: SimoModel, expert: SimoModel) -> None:
        ours, theirs = (model.encoder.backbone.state_dict() for model in (base, expert))
        check_models(TaskArithmetic(), ours, {"expert": theirs})
        own_name = canonicalise(ours)
        self.pairs = {name: (ours[own_name[known]], theirs[name]) for known, name in canonicalise(theirs).items()}

    def move(self, backbone: Any, at: float) -> None:
        """Write the weights at a lambda into an encoder; at 0 and 1 they are exactly the base's and the expert's."""
        for name, tensor in backbone.state_dict().items():
            ours, theirs = self.pairs[name]
            if tensor.is_floating_point():
                # Beyond the expert, a variance could become negative.
                reached = min(at, 1.0) if is_running_statistic(name) else at
                torch.lerp(ours.to(tensor), theirs.to(tensor), reached, out=tensor)
            else:
                tensor.copy_(ours)
