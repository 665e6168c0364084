"""simomerge evaluate"""

from __future__ import annotations

import click

from simomerge.cli.options import console, data_option, json_option, parse_pairs, say, score_lines
from simomerge.core.errors import InputError


@click.command("evaluate")
@click.argument("model")
@click.argument("experts", nargs=-1, metavar="[TASK=EXPERT]...")
@data_option
@click.option("--split", default="test", show_default=True)
@click.option("--count", type=click.IntRange(1), default=256, show_default=True, help="Images.")
@json_option
def command(model: str, experts: tuple[str, ...], data: str, split: str, count: int, as_json: bool) -> None:
    """Compute the metrics of every task of MODEL. With its EXPERTs, also normalised performance and Delta_MTL."""
    named = parse_pairs(experts)
    from simomerge.assembly.experts import load_experts
    from simomerge.core.distributed import join_processes
    from simomerge.core.machine import compute_device
    from simomerge.datasets import load_data
    from simomerge.models.model import as_expert, load
    from simomerge.training.evaluate import delta_mtl, evaluate, normalised_performance

    join_processes()
    evaluated = load(model)
    tasks = evaluated.tasks
    for task in named:
        if task not in tasks:
            raise InputError(f"{model} does not predict {task!r}; it has {', '.join(tasks) or 'no heads'}.")
    expert_models = {task: as_expert(expert, task) for task, expert in load_experts(**named).items()}
    dataset = load_data(data, split=split, count=count)
    with console():
        device = compute_device()
        scores = evaluate(evaluated.to(device), dataset)
        baseline = {task: evaluate(expert.to(device), dataset)[task] for task, expert in expert_models.items()}
    result: dict[str, object] = {"scores": scores}
    lines = [f"{model} on {len(dataset)} images of {data} ({split}):", *score_lines(scores, tasks)]
    if baseline:
        shared = {task: scores[task] for task in scores if task in baseline}
        ratios = normalised_performance(shared, baseline, tasks)
        delta = delta_mtl(shared, baseline, tasks)
        result |= {"experts": baseline, "normalised_performance": ratios, "delta_mtl": delta}
        lines += ["Experts:", *score_lines(baseline, tasks)]
        lines += [
            "Normalised performance: " + ", ".join(f"{task} {value:.3f}" for task, value in ratios.items()),
            f"Delta_MTL: {delta:+.2f} % (0 equals the experts, higher is better)",
        ]
    say(as_json, result, *lines)
