"""The results of a finished run: the table, the curves and the pictures of its report."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.assembly.realign.method import realignment_rows
from simomerge.core.machine import available_cores
from simomerge.core.registry import summary
from simomerge.datasets.colours import colourise
from simomerge.datasets.legend import legend_of
from simomerge.datasets.tasks import Task
from simomerge.models.model import load
from simomerge.recipes.graph import Graph
from simomerge.recipes.plan import Plan
from simomerge.recipes.recipe import Recipe
from simomerge.recipes.row import AUTO, CONTROL, Row
from simomerge.recipes.stages import searches_scale
from simomerge.training.evaluate import delta_mtl, normalised_performance


def summarise(plan: Plan, graph: Graph, tasks: Mapping[str, Task], test_images: int) -> dict[str, Any]:
    """The results of a run whose stages are done: the content of ``results.json`` (docs/formats.md).

    Args:
        test_images: Number of images of the test split that there really are.
    """
    return {
        "format": 1,
        "title": plan.recipe.title,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "machine": machine(),
        "recipe": plan.recipe.to_dict(),
        "tasks": [
            {"name": t.name, "metric": t.metric, "unit": t.unit, "higher_is_better": t.higher_is_better}
            for t in tasks.values()
        ],
        "test_images": test_images,
        "rows": [_row(plan, graph, tasks, row) for row in ("experts", *plan.rows)],
        "realignments": _realignments(plan),
        "scale_curves": _curves(plan, graph),
        **({"relations": _relations(plan, graph)} if plan.relations else {}),
        "notes": _notes(plan),
    }


def _row(plan: Plan, graph: Graph, tasks: Mapping[str, Task], row: str) -> dict[str, Any]:
    seeds = plan.recipe.seeds
    baselines = [
        {task: graph.log(stage)["scores"][task] for task, stage in plan.expert_scores[seed].items()} for seed in seeds
    ]
    scores = baselines if row == "experts" else [graph.log(plan.scores[seed, row])["scores"] for seed in seeds]
    ratios = [normalised_performance(s, b, tasks) for s, b in zip(scores, baselines, strict=True)]
    costs = [_cost(plan, graph, seed, row) for seed in seeds]
    scales = [cost.pop("scale") for cost in costs]
    return {
        "method": row,
        **_kind(plan, row),
        "delta_mtl": spread([delta_mtl(s, b, tasks) for s, b in zip(scores, baselines, strict=True)]),
        "metrics": {name: spread([s[name][task.metric] for s in scores]) for name, task in tasks.items()},
        "normalised": {name: spread([r[name] for r in ratios]) for name in tasks},
        "all_metrics": {name: [s[name] for s in scores] for name in tasks},
        **{key: statistics.mean(cost[key] for cost in costs) for key in costs[0]},
        "encoders": len(tasks) if row == "experts" else 1,
        "parameters": {"scale": scales} if scales[0] is not None else {},
    }


def _kind(plan: Plan, row: str) -> dict[str, Any]:
    """What a row is, for the report: its family, its merge, and its steps in words."""
    if row in plan.references:
        return {"family": "reference", "merge": None, "realignment": []}
    parsed = Row.parse(row)
    made = [(prefix.steps[-1].name, plan.recipe.method(prefix)) for prefix in parsed.prefixes()]
    steps = [{"name": name, "phrase": method.phrase, "labels": method.teacher == "labels"} for name, method in made]
    family = "re-aligned" if steps or parsed.merge == AUTO else "merge"
    return {"family": "control" if parsed.merge == CONTROL else family, "merge": parsed.merge, "realignment": steps}


def _realignments(plan: Plan) -> list[dict[str, Any]]:
    """The re-alignments that occur in the rows, explained."""
    found = {}
    in_table = {row["name"]: row["summary"] for row in realignment_rows()}
    for row in plan.recipe.rows:
        for prefix in row.prefixes():
            name, method = prefix.steps[-1].name, plan.recipe.method(prefix)
            # The table says what a preset is short for; the method's own summary says what it does.
            texts = dict.fromkeys((in_table[name], summary(type(method))))
            found[name] = {"summary": " ".join(texts), "labels": method.teacher == "labels"}
    return [{"name": name, **about} for name, about in found.items()]


def _cost(plan: Plan, graph: Graph, seed: int, row: str) -> dict[str, Any]:
    """What a row costs in addition to the experts: seconds, steps, trained parameters, images."""
    if row in plan.references:
        tuned = plan.experts[seed].values() if row == "experts" else [plan.models[seed, row]]
        logs = [graph.log(stage) for stage in (*tuned, *plan.probes[seed].values())]
    else:
        logs = [graph.log(stage) for stage in plan.chain(seed, Row.parse(row))]
    return {
        "seconds": sum(log["seconds"] for log in logs),
        "steps": sum(log.get("steps", 0) for log in logs),
        "trained_parameters": sum(log.get("trained_parameters", 0) for log in logs),
        "labelled_images": max(log.get("labelled_images", 0) for log in logs),
        "unlabelled_images": max(log.get("unlabelled_images", 0) for log in logs),
        "scale": next((log["scale"] for log in logs if "scale" in log), None),
    }


def _curves(plan: Plan, graph: Graph) -> dict[str, Any]:
    """Delta_MTL on the validation split over the scales of every merge that has one."""
    curves = {}
    for method in plan.recipe.merges:
        logs = [graph.log(plan.models[seed, method]) for seed in plan.recipe.seeds]
        if "curve" not in logs[0]:
            continue
        found = [log["curve"] for log in logs]
        points = [spread(list(values)) for values in zip(*(c["delta_mtl"] for c in found), strict=True)]
        curves[method] = {
            "scales": found[0]["scales"],
            "delta_mtl": {key: [point[key] for point in points] for key in ("mean", "std")},
            "normalised": {
                task: [statistics.mean(v) for v in zip(*(c["normalised"][task] for c in found), strict=True)]
                for task in plan.recipe.tasks
            },
            "chosen": [log["scale"] for log in logs],
        }
    return curves


def _relations(plan: Plan, graph: Graph) -> dict[str, Any]:
    """What `simomerge.relations.relate` found, by seed."""
    return {str(seed): graph.log(stage)["relations"] for seed, stage in plan.relations.items()}


def gallery(plan: Plan, graph: Graph, data: Any, images: int = 4) -> list[dict[str, Any]]:
    """Some test images, with the ground truth and the predictions of the gallery's rows in colours."""
    seed = plan.recipe.seeds[0]
    rows = [row for row in plan.recipe.gallery if row == "experts" or (seed, row) in plan.models]
    models = {row: load(graph.fetched(plan.models[seed, row]) / "model") for row in rows if row != "experts"}
    experts = {task: load(graph.fetched(stage) / "model") for task, stage in plan.experts[seed].items()}
    shown = []
    for index in range(0, len(data), max(1, len(data) // images)):
        sample = data[index]
        predicted = {row: model.predict(sample["image"]) for row, model in models.items()}
        predicted["experts"] = {task: expert.predict(sample["image"])[task] for task, expert in experts.items()}
        predictions, legends = {}, {}
        for name, task in data.tasks.items():
            truth = sample[name].numpy()
            limits = _limits(task, truth)
            maps = {"truth": truth, **{row: predicted[row][name] for row in rows}}
            predictions[name] = {row: colourise(task, values, limits) for row, values in maps.items()}
            legends[name] = _legend(task, truth, limits)
        image = (sample["image"].permute(1, 2, 0).numpy() * 255).astype("uint8")
        shown.append({"image": image, "predictions": predictions, "legends": legends})
    return shown[:images]


def _limits(task: Task, truth: Any) -> tuple[float, float]:
    """The colour range of a task in one row of the gallery: that of the ground truth, if the task has one."""
    own = task.kind in ("depth", "disparity", "log_depth", "texture", "keypoints", "regression")
    known = truth[truth == truth]  # NaN marks pixels without a value
    if task.kind == "flow":
        own, known = True, np.hypot(*truth)[np.isfinite(truth).all(0)]
    return (float(known.min()), float(known.max())) if own and known.size else (0.0, 1.0)


def _legend(task: Task, truth: Any, limits: tuple[float, float]) -> dict[str, Any] | None:
    """What the colours mean, as the report takes it."""
    found = legend_of(task, truth, limits)
    return {"entries": found.entries, "bar": found.bar, "low": found.low, "high": found.high} if found else None


def _split_name(split: str) -> str:
    return {"val": "validation", "train": "training"}.get(split, split)


def _notes(plan: Plan) -> list[str]:
    """What a reader has to know to judge the figures of this run."""
    recipe = plan.recipe
    images = (
        recipe.align_images or f"{' and '.join(map(_split_name, recipe.align_splits))} images, without their labels"
    )
    searched = any(searches_scale(name, recipe.merge_settings.get(name, {})) for name in recipe.merges)
    notes = {
        "Delta_MTL is the mean relative gain over the experts' own metrics on the test split: 0 equals the experts,"
        " higher is better. The test split chose no model, no scale and no setting; the headline names the row that"
        " came out best.": True,
        "The validation split chose the scales of the merges without a re-alignment.": searched,
        "Where training validates, the validation split chose the checkpoint of experts and joint model. It is the"
        " labelled data of every re-alignment with labels.": True,
        "Rows with 0 labelled images use no label in the merge either: their scale is the one whose folded model"
        " agrees best with the experts on held-out images."
        f" They use {images}.": bool(recipe.realigned),
        "Rows that start with zero-shot are the controls: the unmerged base, re-aligned in the same way. The value of a"
        " merge is the difference to its control.": any(row.merge == CONTROL for row in recipe.rows),
        "The embedded base was pretrained on other rooms with masked RGB, gradient magnitude and relative depth as"
        " targets; the last two overlap the tasks texture and depth.": recipe.base == Recipe.base,
        "The costs of the experts and of joint MTL are those of their training; the costs of all other rows come on top"
        " of the experts. Seconds are those of one process, with as many processes at the same time as there are"
        " cores.": True,
    }
    return [text for text, applies in notes.items() if applies]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one seed) and the values."""
    return {
        "mean": statistics.mean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "per_seed": list(values),
    }


def machine() -> dict[str, Any]:
    """The machine that the figures come from."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9 if hasattr(os, "sysconf") else None
    return {
        "cpu": names[0].strip() if names else platform.processor() or platform.machine(),
        "cores": available_cores(),
        "memory_gb": round(memory) if memory else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
