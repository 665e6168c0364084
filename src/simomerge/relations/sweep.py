"""How every task fares along every task vector: theta_0 + lambda tau_t, all heads attached.

Source: "Single-Input Multi-Output Model Merging" (arXiv 2504.11268), task relationships, Figures 3, 5 and 6.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simomerge.assembly.realign.teacher import evaluating
from simomerge.checkpoints import canonicalise
from simomerge.core.errors import InputError
from simomerge.core.machine import autocast
from simomerge.core.progress import progress
from simomerge.merging import TaskArithmetic, check_models
from simomerge.models.model import SimoModel
from simomerge.relations.judging import Judge
from simomerge.training.metrics import TaskMetrics

LAMBDAS: tuple[float, ...] = tuple(round(0.1 * step, 1) for step in range(16))
"""The paper's: 0 (the base) to 1.5 in sixteen values; 1 is the expert."""

KEPT = 0.9
"""A task's width is how far lambda may be from 1, in all, until less than this of the expert's performance is left."""


@dataclass(frozen=True)
class Sweeps:
    """Every task's performance along every task vector; see `Judge` for what performance is.

    Attributes:
        tasks: in order.
        lambdas: where it was measured, ascending.
        labelled: judged by labels, else by the experts' own predictions.
        images: how many were looked at.
        performance: primary task -> task -> one value per lambda: the encoder is the base plus lambda times the primary
            task's vector, the heads are all the experts'.
        metrics: the same, in the task's own metric.
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

        Small for a task whose encoder may not be disturbed. It ends where the sweep ends.
        """
        curve = np.array(self.performance[task][task])
        at = np.array(self.lambdas)
        level = KEPT * float(np.interp(1.0, at, curve))
        return _reach(at, curve, level, 1) + _reach(at, curve, level, -1)

    def effect(self, primary: str, task: str) -> float:
        """What going along a task vector does to another task: the mean gain over the base, for lambda in (0, 1].

        Positive where the primary task's fine-tuning helps the other, negative where it hurts.
        """
        curve = self.performance[primary][task]
        inside = [value for at, value in zip(self.lambdas, curve, strict=True) if 0 < at <= 1]
        return sum(inside) / len(inside) - curve[0]


def _reach(at: np.ndarray, curve: np.ndarray, level: float, side: int) -> float:
    """How far from 1 to one side a curve stays at or above a level."""
    chosen = at > 1 if side > 0 else at < 1
    x = np.concatenate([[1.0], at[chosen][::side]])
    y = np.concatenate([[np.interp(1.0, at, curve)], curve[chosen][::side]])
    if not np.isfinite(level):
        return float("nan")
    for place in range(1, len(x)):
        if not np.isfinite(y[place]):  # nothing is known from here on
            return float(abs(x[place - 1] - 1))
        if y[place] < level:
            part = (y[place - 1] - level) / (y[place - 1] - y[place])
            return float(abs(x[place - 1] - 1) + part * abs(x[place] - x[place - 1]))
    return float(abs(x[-1] - 1))


@torch.no_grad()
def sweep(
    base: SimoModel,
    experts: Mapping[str, SimoModel],
    judge: Judge,
    lambdas: Sequence[float] = LAMBDAS,
) -> Sweeps:
    """Measure all tasks along all task vectors. Each batch is encoded once per task vector and lambda, for all heads.

    Args:
        base: the foundation encoder.
        experts: by task, as `simomerge.assembly.experts.check_experts` gives.
        judge: what is true of which images.
        lambdas: where to measure; 0 and 1 must be among them, the base and the expert.

    Raises:
        InputError: lambdas that are negative or lack 0 or 1.

    Example:
        >>> found = sweep(base, experts, Judge(experts, "photos/", labelled=False))          # doctest: +SKIP
        >>> found.performance["normals"]["depth"]          # depth along the vector of normals  # doctest: +SKIP
        [0.41, 0.44, ...]
    """
    lambdas = check_lambdas(lambdas)
    line = {task: _Line(base, expert) for task, expert in experts.items()}
    encoder = copy.deepcopy(next(iter(experts.values())).encoder).eval()
    points = [("", 0.0), *((task, at) for task in experts for at in lambdas if at)]  # all begin at the base
    metrics = {point: judge.metrics() for point in points}
    seen = 0
    for look in judge:
        for done, (task, at) in enumerate(points, start=1):
            (line[task] if task else next(iter(line.values()))).put(at, encoder.backbone)
            with autocast(look.images.device):
                features = encoder(look.images)
            _count(metrics[task, at], experts, features, look.truth)
            step, steps = seen * len(points) + done * len(look.images), len(judge.source) * len(points)
            progress("sweeps", step, steps, f"{task or 'base'} {at:g}")
        seen += len(look.images)
    scores = {point: {name: metric.compute() for name, metric in of.items()} for point, of in metrics.items()}
    ratios = {point: judge.performance(values) for point, values in scores.items()}
    main = {
        point: {name: values[judge.tasks[name].metric] for name, values in of.items()} for point, of in scores.items()
    }

    def curves(table: Mapping[tuple[str, float], Mapping[str, float]]) -> dict[str, dict[str, list[float]]]:
        return {
            primary: {task: [table[primary if at else "", at][task] for at in lambdas] for task in experts}
            for primary in experts
        }

    return Sweeps(list(experts), lambdas, judge.labelled, seen, curves(ratios), curves(main))


def check_lambdas(lambdas: Sequence[float]) -> list[float]:
    """Ascending, without repetitions. Raises InputError."""
    found = sorted({float(value) for value in lambdas})
    if not {0.0, 1.0} <= set(found) or found[0] < 0 or not all(map(math.isfinite, found)):
        raise InputError(f"lambdas {', '.join(f'{v:g}' for v in found)}: give 0 (the base), 1 (the expert) and others.")
    return found


def _count(
    metrics: Mapping[str, TaskMetrics], experts: Mapping[str, SimoModel], features: Any, truth: Mapping[str, Tensor]
) -> None:
    """Every task's prediction from some features; each by its own expert's head."""
    for name, expert in experts.items():
        with evaluating(expert.heads[name]), autocast(features.maps[0].device):
            logits = expert.decode(features, [name])[name]
        metrics[name].update(expert.tasks[name].activate(logits.float()), truth[name])


class _Line:
    """The encoders theta_0 + lambda tau between the base (0) and an expert (1), and beyond it."""

    def __init__(self, base: SimoModel, expert: SimoModel) -> None:
        ours, theirs = (model.encoder.backbone.state_dict() for model in (base, expert))
        check_models(TaskArithmetic(), ours, {"expert": theirs})
        own_name = canonicalise(ours)
        self.pairs = {name: (ours[own_name[known]], theirs[name]) for known, name in canonicalise(theirs).items()}

    def put(self, at: float, backbone: Any) -> None:
        """Write the weights at lambda into an encoder; at 0 and 1 they are exactly the base's and the expert's."""
        for name, tensor in backbone.state_dict().items():
            ours, theirs = self.pairs[name]
            if tensor.is_floating_point():
                torch.lerp(ours.to(tensor), theirs.to(tensor), at, out=tensor)
            else:
                tensor.copy_(ours)
