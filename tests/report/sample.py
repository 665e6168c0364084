"""A small run with simple numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

TASKS = {
    "segmentation": ("miou", "%", True, 80.0),
    "depth": ("abs_err", "m", False, 0.2),
    "normals": ("mean_angle", "deg", False, 20.0),
    "edges": ("f1", "%", True, 60.0),
    "keypoints": ("abs_err", "% of range", False, 2.0),
}
RATIOS = {
    "experts": 1.0,
    "joint-mtl": 0.95,
    "zero-shot": 0.25,
    "average": 0.6,
    "task-arithmetic": 0.75,
    "ties": 0.7,
    "zero-shot+heads": 0.85,
    "task-arithmetic+heads": 0.92,
    "ties+heads": 0.9,
    "task-arithmetic+adapters": 0.93,
}


STEPS = {
    "heads": {"phrase": "re-aligning its heads", "labels": True},
    "adapters": {"phrase": "re-aligning it with adapters", "labels": True},
    "fold": {"phrase": "folding its heads", "labels": False},
    "distill": {"phrase": "distilling its heads from the experts", "labels": False},
}


def identity(method: str) -> dict[str, Any]:
    """What a row says of its method: family, merge and re-alignment, for a name such as ``ties+fold+heads``."""
    merge, *steps = method.split("+")
    family = "re-aligned" if steps or merge == "auto" else "merge"
    if merge in ("experts", "joint-mtl"):
        family = "reference"
    elif merge == "zero-shot":
        family = "control"
    return {
        "method": method,
        "family": family,
        "merge": None if family == "reference" else merge,
        "realignment": [{"name": step, **STEPS[step]} for step in steps],
    }


def spread(mean: float, step: float, seeds: int) -> dict[str, Any]:
    per_seed = [mean + step * (seed - (seeds - 1) / 2) for seed in range(seeds)]
    return {"mean": mean, "std": step if seeds > 1 else None, "per_seed": per_seed}


def row(method: str, ratio: float, tasks: list[str], seeds: int = 1) -> dict[str, Any]:
    """A row with the normalised performance ``ratio`` on every task."""
    raw = {task: TASKS[task][3] * (ratio if TASKS[task][2] else 1 / ratio) for task in tasks}
    gains = [(raw[task] / TASKS[task][3] - 1) * (1 if TASKS[task][2] else -1) for task in tasks]
    trained = "+" in method or method in ("experts", "joint-mtl")
    return {
        **identity(method),
        "delta_mtl": spread(100 * sum(gains) / len(gains), 0.4, seeds),
        "metrics": {task: spread(raw[task], raw[task] / 100, seeds) for task in tasks},
        "normalised": {task: spread(ratio, 0.01, seeds) for task in tasks},
        "seconds": 12.3 if trained else 0.42,
        "steps": 1400 if trained else 0,
        "trained_parameters": 312_000 if trained else 0,
        "labelled_images": 256 if trained else 0,
        "encoders": len(tasks) if method == "experts" else 1,
    }


def curve(tasks: list[str], peak: float, seeds: int = 1) -> dict[str, Any]:
    scales = [step / 10 for step in range(11)]
    loss = [10 + 300 * (scale - peak) ** 2 for scale in scales]
    std = [1 + 6 * abs(scale - peak) if seeds > 1 else None for scale in scales]
    return {
        "scales": scales,
        "delta_mtl": {"mean": [-number for number in loss], "std": std},
        "normalised": {
            task: [1 / (1 + number / 100 * (1 + place)) for number in loss] for place, task in enumerate(tasks)
        },
        "chosen": [peak + 0.1 * (seed % 2) for seed in range(seeds)],
    }


def make_results(seeds: int = 1, task_count: int = 3) -> dict[str, Any]:
    """Results as in ``results.json``, with every kind of row."""
    tasks = list(TASKS)[:task_count]
    return {
        "format": 1,
        "title": "Rooms: three experts, one encoder",
        "created": "2026-01-02T15:00:00",
        "machine": {"cpu": "a small one", "cores": 2, "memory_gb": 24, "python": "3.11.2", "torch": "2.9.0"},
        "recipe": {
            "tasks": tasks,
            "head": "linear",
            "seeds": list(range(seeds)),
            "training": {"steps": 400, "lr": 1e-4},
        },
        "tasks": [
            {
                "name": name,
                "metric": TASKS[name][0],
                "unit": TASKS[name][1],
                "higher_is_better": TASKS[name][2],
            }
            for name in tasks
        ],
        "rows": [row(method, ratio, tasks, seeds) for method, ratio in RATIOS.items()],
        "scale_curves": {"task-arithmetic": curve(tasks, 0.4, seeds), "ties": curve(tasks, 0.5, seeds)},
        "realignments": [
            {"name": "heads", "summary": "the heads are tuned", "labels": True},
            {"name": "adapters", "summary": "low-rank adapters and the heads are tuned", "labels": True},
        ],
        "notes": ["Small images, short training: a demonstration, not a benchmark."],
    }


def make_gallery(tasks: list[str], images: int = 2) -> list[dict[str, Any]]:
    """Random pictures, uint8 (24, 32, 3)."""
    rng = np.random.default_rng(0)

    def picture() -> np.ndarray:
        blocks = rng.integers(0, 256, (6, 8, 3), np.uint8)
        return blocks.repeat(4, 0).repeat(4, 1)

    columns = ("truth", "experts", "task-arithmetic", "task-arithmetic+heads")
    return [
        {"image": picture(), "predictions": {task: {name: picture() for name in columns} for task in tasks}}
        for _ in range(images)
    ]
