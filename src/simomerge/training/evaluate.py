"""Evaluate a model, and compare it with its experts: normalised performance and Delta_MTL.

Source: "Single-Input Multi-Output Model Merging" (arXiv 2504.11268), metrics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from simomerge.core import distributed
from simomerge.core.errors import InputError
from simomerge.core.machine import autocast
from simomerge.core.progress import progress
from simomerge.datasets.batches import ordered_batches
from simomerge.datasets.tasks import Task
from simomerge.models.model import SimoModel
from simomerge.training.metrics import TaskMetrics

Scores = dict[str, dict[str, float]]
"""task -> metric -> value."""


@torch.no_grad()
def evaluate(model: SimoModel, dataset: Any, batch_size: int = 64, label: str = "evaluate") -> Scores:
    """Metrics of every task that both the model and the dataset have.

    Under torchrun each process takes its share of the batches, and all return the same scores.

    Args:
        model: any model, an expert or one with many heads.
        dataset: samples with ``image`` and targets, one size per batch.
        batch_size: images encoded at once.

    Raises:
        InputError: model and dataset have no task in common, or one of another kind by the same name.

    Example:
        >>> scores = evaluate(model, load_data("rooms", split="test"))       # doctest: +SKIP
        >>> scores["depth"]["abs_err"]                                       # doctest: +SKIP
        0.41
    """
    shared = [name for name in model.tasks if name in dataset.tasks]
    if not shared:
        raise InputError(
            f"the model predicts {', '.join(model.tasks) or 'nothing'}, the dataset has {', '.join(dataset.tasks)}:"
            " no task in common."
        )
    for name in shared:
        ours, theirs = model.tasks[name], dataset.tasks[name]
        if (ours.kind, ours.channels) != (theirs.kind, theirs.channels):
            raise InputError(
                f"task {name!r} is {ours.kind} of {ours.channels} channels in the model, {theirs.kind} of"
                f" {theirs.channels} in the data; give a model or an expert of that task."
            )
    device = next(model.parameters()).device
    metrics = {name: TaskMetrics(model.tasks[name]).to(device) for name in shared}
    dataset = dataset.select(shared)
    training = model.training
    model.eval()
    done = 0
    for batch in ordered_batches(dataset, batch_size, shared=True):
        with autocast(device):
            logits = model.decode(model.encode(batch["image"].to(device)), shared)
        for name in shared:
            metrics[name].update(model.tasks[name].activate(logits[name].float()), batch[name].to(device))
        done += len(batch["image"]) * distributed.processes()
        progress(label, min(done, len(dataset)), len(dataset), "")
    model.train(training)
    return {name: metric.compute() for name, metric in metrics.items()}


def normalised_performance(scores: Scores, baseline: Scores, tasks: Mapping[str, Task]) -> dict[str, float]:
    """Per task M / b, or b / M where lower is better: 1 equals the baseline, higher is better.

    Raises:
        InputError: the baseline lacks a task.

    Example:
        >>> depth = {"depth": Task("depth")}
        >>> normalised_performance({"depth": {"abs_err": 0.5}}, {"depth": {"abs_err": 0.4}}, depth)
        {'depth': 0.8}
    """
    ratios = {}
    for name, (value, base) in _pairs(scores, baseline, tasks).items():
        if tasks[name].higher_is_better:
            ratios[name] = value / base
        else:
            ratios[name] = base / value if value else math.inf
    return ratios


def delta_mtl(scores: Scores, baseline: Scores, tasks: Mapping[str, Task]) -> float:
    """Mean relative gain over the baseline in percent: 0 equals the experts, higher is better.

    ``Delta_MTL = 100 / T * sum_t (-1)^{l_t} (M_t - b_t) / b_t``, l_t = 1 where lower is better.

    Args:
        scores: of the model.
        baseline: of its experts.
        tasks: what says which metric speaks and which sign is better.

    Raises:
        InputError: the baseline lacks a task.

    Example:
        >>> depth = {"depth": Task("depth")}
        >>> round(delta_mtl({"depth": {"abs_err": 0.5}}, {"depth": {"abs_err": 0.4}}, depth), 6)
        -25.0
    """
    gains = []
    for name, (value, base) in _pairs(scores, baseline, tasks).items():
        sign = 1 if tasks[name].higher_is_better else -1
        gains.append(sign * (value - base) / base)
    return 100 * sum(gains) / len(gains)


def _pairs(scores: Scores, baseline: Scores, tasks: Mapping[str, Task]) -> dict[str, tuple[float, float]]:
    missing = [name for name in scores if name not in baseline]
    if missing or not scores:
        raise InputError(f"the baseline has no score for task {missing[0]!r}." if missing else "no scores to compare.")
    pairs = {}
    for name, values in scores.items():
        metric = tasks[name].metric
        pairs[name] = (values[metric], baseline[name][metric])
        if not pairs[name][1] > 0:
            raise InputError(
                f"task {name!r}: the baseline's {metric} is {pairs[name][1]}; nothing can be relative to it."
            )
    return pairs
