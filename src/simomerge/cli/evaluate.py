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
    """Measure every task of MODEL; with its EXPERTs, also normalised performance and Delta_MTL."""
    named = parse_pairs(experts)
    from simomerge.assembly.experts import load_experts
    from simomerge.core.distributed import join_processes
    from simomerge.core.machine import compute_device
    from simomerge.datasets import load_data
    from simomerge.models.model import as_expert, load
    from simomerge.training.evaluate import delta_mtl, evaluate, normalised_performance

    join_processes()
    judged = load(model)
    strange = [task for task in named if task not in judged.tasks]
    if strange:
        raise InputError(f"{model} does not predict {strange[0]!r}; it has {', '.join(judged.tasks) or 'no heads'}.")
    judges = {task: as_expert(expert, task) for task, expert in load_experts(**named).items()}
    dataset = load_data(data, split=split, count=count)
    with console():
        where = compute_device()
        scores = evaluate(judged.to(where), dataset)
        baseline = {task: evaluate(expert.to(where), dataset)[task] for task, expert in judges.items()}
    result: dict[str, object] = {"scores": scores}
    lines = [f"{model} on {len(dataset)} images of {data} ({split}):", *score_lines(scores, judged.tasks)]
    if baseline:
        shared = {task: values for task, values in scores.items() if task in baseline}
        ratios = normalised_performance(shared, baseline, judged.tasks)
        delta = delta_mtl(shared, baseline, judged.tasks)
        result |= {"experts": baseline, "normalised_performance": ratios, "delta_mtl": delta}
        lines += ["Experts:", *score_lines(baseline, judged.tasks)]
        lines += [
            "Normalised performance: " + ", ".join(f"{task} {value:.3f}" for task, value in ratios.items()),
            f"Delta_MTL: {delta:+.2f} % (0 equals the experts, higher is better)",
        ]
    say(as_json, result, *lines)
