"""Evaluation of a model, and its comparison with experts: normalised performance and Delta_MTL.

Source: "Single-Input Multi-Output Model Merging" (arXiv 2504.11268), metrics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from simomerge.core import distributed
from simomerge.core.errors import InputError
from simomerge.core.machine import autocast
from simomerge.core.modes import evaluating
from simomerge.core.progress import progress
from simomerge.core.text import html_table
from simomerge.datasets.batches import images_within, ordered_batches
from simomerge.datasets.comparison import check_same_task
from simomerge.datasets.tasks import Task
from simomerge.models.fingerprints import fingerprint_of
from simomerge.models.model import SimoModel, as_model
from simomerge.training.metrics import TaskMetrics

Scores = dict[str, dict[str, float]]
"""task -> metric -> value."""


class TaskScores(Scores):
    """Scores that a notebook shows as a table: per task its main metric, and then the others.

    Example:
        >>> scores = TaskScores({"depth": Task("depth")}, {"depth": {"abs_err": 0.25, "delta_1": 91.0}})
        >>> scores["depth"]["abs_err"], "0.25 m" in scores._repr_html_()
        (0.25, True)
    """

    def __init__(self, tasks: Mapping[str, Task], scores: Scores) -> None:
        super().__init__(scores)
        self.tasks = {name: tasks[name] for name in scores}

    def __reduce__(self) -> tuple[type[TaskScores], tuple[dict[str, Task], Scores]]:
        return TaskScores, (self.tasks, dict(self))

    def _repr_html_(self) -> str:
        rows = [["task", "main metric", "", "better", "others"]]
        for name, values in self.items():
            task = self.tasks[name]
            others = ", ".join(f"{key} {value:.4g}" for key, value in values.items() if key != task.metric)
            better = "higher" if task.higher_is_better else "lower"
            rows.append([name, task.metric, f"{values[task.metric]:.4g} {task.unit}".rstrip(), better, others])
        return html_table(rows)


@torch.no_grad()
def evaluate(model: SimoModel | str | Path, dataset: Any, batch_size: int = 64, label: str = "evaluate") -> Scores:
    """Metrics of all tasks that both the model and the dataset have.

    Under torchrun each process evaluates its share of the batches, and all return the same scores.

    Args:
        model: An expert or a model with several heads, or its folder.
        dataset: Samples with ``image`` and targets; the images of a batch have one size.
        batch_size: Images per batch, at most. Large images have smaller batches, of at most `BATCH_PIXELS` pixels of
            `simomerge.datasets.batches`, unless it is a single image.

    Raises:
        InputError: ``batch_size`` is below 1, or model and dataset have no task in common, or tasks of one name that
            differ in kind or classes.

    Example:
        >>> scores = evaluate(model, load_data("rooms", split="test"))       # doctest: +SKIP
        >>> scores["depth"]["abs_err"]                                       # doctest: +SKIP
        0.41
    """
    model = as_model(model)
    if isinstance(dataset, (str, Path)):
        raise InputError(f"dataset is the text {str(dataset)!r}: give sm.data({str(dataset)!r}, split='test').")
    shared = shared_tasks(model.tasks, dataset.tasks)
    device = next(model.parameters()).device
    metrics = {name: TaskMetrics(model.tasks[name]).to(device) for name in shared}
    done, judges = 0, dataset.select(shared)
    if len(judges):
        batch_size = images_within(batch_size, judges[0]["image"])
    with evaluating(model):
        for batch in ordered_batches(judges, batch_size, shared=True):
            with autocast(device):
                logits = model(batch["image"].to(device), shared)
            for name in shared:
                metrics[name].update_by_logits(logits[name], batch[name].to(device))
            done += len(batch["image"]) * distributed.processes()
            progress(label, min(done, len(dataset)), len(dataset))
    return TaskScores(model.tasks, {name: metric.compute() for name, metric in metrics.items()})


def shared_tasks(predicted: Mapping[str, Task], labelled: Mapping[str, Task]) -> list[str]:
    """The tasks that a model predicts and a dataset has labels of.

    Raises:
        InputError: There is none, or tasks of one name differ in kind, channels or classes.
    """
    shared = [name for name in predicted if name in labelled]
    if not shared:
        raise InputError(
            f"the model predicts {', '.join(predicted) or 'nothing'}, the dataset has {', '.join(labelled)}:"
            " no task in common."
        )
    for name in shared:
        check_same_task(predicted[name], labelled[name], "model", "data")
    return shared


def normalised_performance(scores: Scores, baseline: Scores, tasks: Mapping[str, Task]) -> dict[str, float]:
    """M / b by task, or b / M for metrics where lower is better: 1 equals the baseline, higher is better.

    Raises:
        InputError: The baseline has no score for a task, or ``tasks`` has no such task.

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

    ``Delta_MTL = 100 / T * sum_t (-1)^{l_t} (M_t - b_t) / b_t``, with l_t = 1 if lower is better.

    Args:
        scores: Scores of the model.
        baseline: Scores of its experts.
        tasks: The tasks, which define the main metric and its direction.

    Raises:
        InputError: The baseline has no score for a task, or ``tasks`` has no such task.

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


def evaluation_record(
    model: SimoModel, scores: Scores, about: Mapping[str, Any], baseline: Scores | None = None
) -> dict[str, Any]:
    """What a model folder records as its ``evaluation``: the main metric of every task, with the expert's if known.

    Args:
        model: The model that was measured. The record holds the fingerprint of all its weights, so that it is dropped
            from the folder of a model that changed afterwards.
        scores: Scores of the model.
        about: ``data`` and ``split``, names, and ``images``, their number.
        baseline: Scores of experts of some or all tasks. Delta_MTL needs those of all.

    Example:
        >>> model.evaluation = evaluation_record(model, scores, {"data": "rooms", "split": "test", "images": 256}
        ... )                                                                # doctest: +SKIP
        >>> model.save_pretrained("runs/scene")                              # doctest: +SKIP
    """
    rows, known = [], baseline or {}
    for name, values in scores.items():
        task = model.tasks[name]
        row: dict[str, Any] = {"task": name, "metric": task.metric, "unit": task.unit, "value": values[task.metric]}
        row |= {"higher_is_better": task.higher_is_better}
        row |= {"expert": known[name][task.metric]} if name in known else {}
        if all(math.isfinite(number) for number in (values[task.metric], row.get("expert", 0.0))):
            rows.append(row)
    complete = 0 < len(rows) == len(scores) and all(row.get("expert", 0.0) > 0 for row in rows)
    delta = {"delta_mtl": delta_mtl(scores, known, model.tasks)} if complete else {}
    return {**about, "metrics": rows, **delta, "weights": fingerprint_of(model)}


def _pairs(scores: Scores, baseline: Scores, tasks: Mapping[str, Task]) -> dict[str, tuple[float, float]]:
    """Main metric of the model and of the baseline, by task."""
    if not scores:
        raise InputError("no scores to compare.")
    pairs = {}
    for name, values in scores.items():
        if name not in tasks:
            raise InputError(f"there are scores of {name!r}, and tasks has no such task; give all that were scored.")
        if name not in baseline:
            raise InputError(f"the baseline has no score for task {name!r}.")
        metric = tasks[name].metric
        pairs[name] = (values[metric], baseline[name][metric])
        if not pairs[name][1] > 0:
            raise InputError(
                f"task {name!r}: the baseline's {metric} is {pairs[name][1]}; nothing can be relative to it."
            )
    return pairs
