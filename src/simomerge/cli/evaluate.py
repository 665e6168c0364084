"""simomerge evaluate"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from simomerge.cli import options
from simomerge.cli.output import Table, console, is_first, say, warning
from simomerge.core.errors import InputError


@click.command("evaluate")
@options.first("model", "the model to evaluate")
@options.some_experts
@options.data
@click.option("--split", default="test", show_default=True)
@click.option("--count", type=click.IntRange(1), default=256, show_default=True, help="Number of images.")
@click.option("--record", is_flag=True, help="Enter the figures into MODEL's folder and its model card.")
@options.precision
@options.trust_code
@options.as_json
def command(
    model: str, experts: dict[str, str], data: str, split: str, count: int, record: bool, as_json: bool
) -> None:
    """Compute the metrics of every task of MODEL. With its EXPERTs, also normalised performance and Delta_MTL."""
    from simomerge.assembly.experts import load_experts
    from simomerge.checkpoints.card import learned_rooms
    from simomerge.checkpoints.description import read_description, record_evaluation
    from simomerge.core.distributed import join_processes
    from simomerge.core.machine import compute_device
    from simomerge.datasets.load import data_name, load_data
    from simomerge.models.model import as_expert, load
    from simomerge.training.evaluate import evaluate, evaluation_record, shared_tasks

    if record and not (Path(model) / "simo.json").is_file():
        raise InputError(f"{model}: --record needs a model folder on this disk.")
    join_processes()
    described = read_description(Path(model)) if record else None
    evaluated = load(model)
    tasks = evaluated.tasks
    for task in experts:
        if task not in tasks:
            raise InputError(f"{model} does not predict {task!r}; it has {', '.join(tasks) or 'no heads'}.")
    expert_models = {task: as_expert(expert, task) for task, expert in load_experts(**experts).items()}
    options.note_rooms(learned_rooms(evaluated.provenance))
    with console():
        dataset = load_data(data, split=split, count=count)
    options.note_count(count, len(dataset), f"{data} ({split})")
    judged = shared_tasks(tasks, dataset.tasks)
    for task, expert in expert_models.items():
        if task not in judged:
            raise InputError(f"{data} ({split}) has no labels of {task!r}; leave its expert out, or give other data.")
        shared_tasks(expert.tasks, dataset.tasks)
    with console():
        device = compute_device()
        scores = evaluate(evaluated.to(device), dataset)
        baseline = {task: evaluate(expert.to(device), dataset)[task] for task, expert in expert_models.items()}
    unrecorded = None
    if record and is_first():
        about = {"data": data_name(data), "split": split, "images": len(dataset)}
        try:
            record_evaluation(Path(model), evaluation_record(evaluated, scores, about, baseline), described)
        except InputError as error:  # the figures are shown all the same
            unrecorded = error
    result: dict[str, object] = {"scores": scores}
    shown: list[str | Table] = [f"{model} on {len(dataset)} images of {data} ({split}):", score_table(scores, tasks)]
    if baseline:
        relative, lines = _relative_to(baseline, scores, tasks)
        result |= {"experts": baseline, **relative}
        shown += ["Experts:", score_table(baseline, tasks), *lines]
    recorded = [f"Recorded in {model}."] if record and unrecorded is None else []
    say(as_json, result, *shown, *recorded)
    if unrecorded is not None:
        raise unrecorded


def _relative_to(
    baseline: dict[str, Any], scores: dict[str, Any], tasks: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Figures relative to those of the experts, as plain data and as text; both are empty if an expert has 0."""
    from simomerge.training.evaluate import delta_mtl, normalised_performance

    shared = {task: scores[task] for task in scores if task in baseline}
    try:
        ratios, delta = normalised_performance(shared, baseline, tasks), delta_mtl(shared, baseline, tasks)
    except InputError as error:  # the scores are shown all the same
        warning(f"No Delta_MTL, because {error}")
        return {}, []
    lines = [
        "Normalised performance: " + ", ".join(f"{task} {value:.3f}" for task, value in ratios.items()),
        f"Delta_MTL: {delta:+.2f} % (0 equals the experts, higher is better)" + _partial(baseline, scores),
    ]
    return {"normalised_performance": ratios, "delta_mtl": delta}, lines


def _partial(baseline: dict[str, Any], scores: dict[str, Any]) -> str:
    """What to say about a Delta_MTL over some of the tasks."""
    if len(baseline) == len(scores):
        return ""
    missing = ", ".join(task for task in scores if task not in baseline)
    return f". It is over {', '.join(baseline)} only: give the experts of {missing} too for that of the model."


def score_table(scores: dict[str, dict[str, float]], tasks: dict[str, Any]) -> Table:
    """One row per task: its own metric first, then the other metrics."""
    rows = []
    for name, values in scores.items():
        metric, unit = tasks[name].metric, tasks[name].unit
        others = "  ".join(f"{key} {value:.4g}" for key, value in values.items() if key != metric)
        rows.append((name, metric, f"{values[metric]:.4g}", unit, others))
    return Table(("task", "metric", "value", "unit", "other metrics"), rows)
