"""A recipe carried out in a run folder."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import simomerge
from simomerge import distributed
from simomerge.checkpoints import atomic_write_text
from simomerge.datasets import DenseDataset, load_data
from simomerge.datasets.rooms import RENDER_VERSION
from simomerge.devices import mixed_precision
from simomerge.errors import InputError
from simomerge.evaluation import delta_mtl
from simomerge.model import load
from simomerge.progress import Progress, silent
from simomerge.recipes.graph import Run
from simomerge.recipes.plan import Plan
from simomerge.recipes.recipe import Recipe
from simomerge.recipes.results import gallery, summarise
from simomerge.training import WorkerPool


def run_recipe(
    recipe: Recipe,
    base: str | Path,
    folder: str | Path,
    workers: int | None = None,
    dataset: str = "rooms",
    title: str = "simomerge demo",
    progress: Progress = silent,
    data_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Carry out a recipe: experts, joint MTL, merges, re-alignments, evaluation on the test split.

    Args:
        recipe: what to do.
        base: folder of the foundation encoder.
        folder: the run folder; a second run with the same recipe reuses every stage in it.
        workers: processes side by side; one per core by default.
        dataset, data_options: as `load_data` takes them.

    Returns:
        The results: what ``results.json`` in the folder holds (see docs/formats.md), and under ``gallery`` the
        pictures of the report.
    """
    began = time.monotonic()
    folder = Path(folder).resolve()
    plan, run = _planned(recipe, base, folder, dataset, data_options or {})
    with distributed.first_before_others():
        for split, data in plan.splits.items() if dataset == "rooms" else ():
            load_data(**data, workers=workers, progress=lambda d, t, split=split: progress(f"render {split}", d, t, ""))
    test = _check_data(plan, recipe)
    with WorkerPool(workers, progress) as pool:
        run.build(plan.wanted(), pool)
    results = summarise(plan, run, test.tasks, title)
    results["seconds_of_this_call"] = round(time.monotonic() - began, 1)
    if distributed.is_first():
        atomic_write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    return {**results, "gallery": gallery(plan, run, test)}


def held_out_delta(
    recipe: Recipe,
    row: str,
    images: int,
    base: str | Path,
    folder: Path,
    pool: WorkerPool,
    dataset: str = "rooms",
    data_options: Mapping[str, Any] | None = None,
) -> list[float]:
    """Delta_MTL of one row, in percent per seed, on the last ``images`` of the validation images.

    Only what the row needs is done. These images are no part of D_val here, and the test split is not looked at.
    """
    kept = replace(recipe, val_images=recipe.val_images - images)
    held = {"split": "val", "count": images, "skip": kept.val_images}
    plan, run = _planned(kept, base, folder.resolve(), dataset, data_options or {}, held)
    tasks = _check_data(plan, kept).tasks
    scores = [plan.scores[seed, row] for seed in kept.seeds]
    run.build([*scores, *(stage for seed in kept.seeds for stage in plan.expert_scores[seed].values())], pool)
    return [
        delta_mtl(
            run.log(stage)["scores"],
            {task: run.log(expert)["scores"][task] for task, expert in plan.expert_scores[seed].items()},
            tasks,
        )
        for seed, stage in zip(kept.seeds, scores, strict=True)
    ]


def plan_of(
    recipe: Recipe, base: str | Path, folder: str | Path, dataset: str, data_options: Mapping[str, Any]
) -> list[tuple[str, bool]]:
    """The stages of a recipe in an order in which they can be done, each with whether it is done in the folder."""
    plan, run = _planned(recipe, base, Path(folder).resolve(), dataset, data_options)
    return [(stage.name, path.exists()) for path, stage in run.in_order(plan.wanted()).items()]


def _planned(
    recipe: Recipe,
    base: str | Path,
    folder: Path,
    dataset: str,
    data_options: Mapping[str, Any],
    test: Mapping[str, Any] | None = None,
) -> tuple[Plan, Run]:
    """Plan and run; ``test`` is what scores are taken on in place of the test split."""
    base = Path(base).resolve() if Path(base).exists() else base  # else a hub id
    counts = {"train": recipe.train_images, "val": recipe.val_images, "test": recipe.test_images}
    splits: dict[str, dict[str, Any]] = {
        split: {"spec": dataset, "split": split, "count": count, **data_options} for split, count in counts.items()
    }
    splits["test"] |= test or {}
    fingerprint = load(base).encoder_fingerprint()  # a wrong base is told before any rendering
    salt = f"{simomerge.__version__} {RENDER_VERSION} {mixed_precision()} {fingerprint}"
    if dataset != "rooms":  # whose name says all: files may have changed
        salt += "".join(f" {load_data(**data).fingerprint()}" for data in splits.values())
    return Plan(recipe, base, splits), Run(folder, str(base), salt)


def _check_data(plan: Plan, recipe: Recipe) -> DenseDataset:
    """The test split, after a look at all three: what cannot be is told before the training."""
    chosen = {}
    for split, data in plan.splits.items():
        try:
            chosen[split] = load_data(**data).select(list(recipe.tasks))
        except InputError as error:
            raise InputError(f"{data['spec']}, split {data['split']!r}: {error}") from error
    return chosen["test"]
