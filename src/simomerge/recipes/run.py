"""A recipe carried out in a run folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from simomerge.core import distributed
from simomerge.core.errors import InputError
from simomerge.core.files import atomic_write_text
from simomerge.core.machine import mixed_precision
from simomerge.core.version import __version__
from simomerge.datasets import DenseDataset, load_data
from simomerge.datasets.base import check_size
from simomerge.datasets.rooms import RENDER_VERSION
from simomerge.datasets.rooms.dataset import TASKS
from simomerge.datasets.tasks import select_tasks
from simomerge.models.model import load
from simomerge.recipes.file import SEEN
from simomerge.recipes.graph import Run
from simomerge.recipes.plan import Plan
from simomerge.recipes.recipe import Recipe
from simomerge.recipes.results import gallery, summarise
from simomerge.training.evaluate import delta_mtl
from simomerge.training.pool import WorkerPool


def run_recipe(
    recipe: Recipe,
    base: str | Path,
    folder: str | Path,
    workers: int | None = None,
    dataset: str = "rooms",
    title: str = "simomerge demo",
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
        for data in plan.splits.values() if dataset == "rooms" else ():
            load_data(**data, workers=workers)
    test = _opened(plan.splits, recipe, deeply=any(not done for _, done in _stages(plan, run)))["test"]
    with WorkerPool(workers) as pool:
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
    """Delta_MTL of one row, in percent per seed, on ``images`` of the validation images.

    Only what the row needs is done. These images are no part of D_val here, and the test split is not looked at.
    """
    options = data_options or {}
    there = recipe.val_images
    if dataset != "rooms":  # which are as many as are asked for
        there = len(load_data(dataset, "val", recipe.val_images, **options))
    if images >= there:
        raise InputError(f"{dataset}: {images} images are to judge, and the validation split has {there}; use fewer.")
    kept = replace(recipe, val_images=there - images)
    held = {"split": "val", "count": images, "skip": kept.val_images}
    plan, run = _planned(kept, base, folder.resolve(), dataset, options, held)
    tasks = _opened(plan.splits, kept, deeply=True)["test"].tasks
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
    return _stages(plan, run)


def _stages(plan: Plan, run: Run) -> list[tuple[str, bool]]:
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
    if dataset == "rooms":
        _check_rooms(recipe, data_options)
    else:
        _opened(splits, recipe)
    _check_batches(recipe)
    fingerprint = load(base).encoder_fingerprint()  # a wrong base is told before any rendering
    salt = f"{__version__} {RENDER_VERSION} {mixed_precision()} {fingerprint}"
    return Plan(recipe, base, splits), Run(folder, str(base), salt, _contents(recipe.tasks))


def _contents(tasks: Sequence[str]) -> Callable[[Mapping[str, Any]], str]:
    """What tells a dataset from others by the same name: rooms' name says all, but files may have changed."""
    found: dict[str, str] = {}

    def contents(data: Mapping[str, Any]) -> str:
        said = json.dumps(data, sort_keys=True, default=str)
        if data["spec"] != "rooms" and said not in found:
            found[said] = load_data(**{"tasks": tasks, **data}).fingerprint()
        return found.get(said, "")

    return contents


SAMPLES = 4
"""Of each split, read before any work: what is wrong with every label is wrong with these."""


def _opened(splits: Mapping[str, Mapping[str, Any]], recipe: Recipe, deeply: bool = False) -> dict[str, DenseDataset]:
    """The three splits, with all their files there; what cannot be is told before any work.

    Args:
        deeply: also see to it that no file was cut off, and read some samples.
    """
    opened = {}
    for split, data in splits.items():
        try:
            opened[split] = load_data(**data).select(list(recipe.tasks))
            opened[split].check_files(deeply)
            count = len(opened[split]) if deeply else 0
            for index in sorted({place * count // SAMPLES for place in range(SAMPLES)} if count else ()):
                opened[split][index]
        except InputError as error:
            raise InputError(f"{data['spec']}, split {data['split']!r}: {error}") from error
        except (TypeError, ValueError) as error:  # of data_options
            raise InputError(f"data_options of {data['spec']}: {error}.") from error
    return opened


def _check_rooms(recipe: Recipe, options: Mapping[str, Any]) -> None:
    """What can be told before any is rendered."""
    select_tasks(TASKS, recipe.tasks)
    if strange := options.keys() - {"size", "seed"}:
        raise InputError(f"data_options of rooms: unknown key {min(map(str, strange))!r}; it takes size and seed.")
    check_size(options.get("size", (64, 80)))
    if not isinstance(options.get("seed", 0), int):
        raise InputError(f"data_options of rooms: seed {options['seed']!r}; give a whole number.")


def _check_batches(recipe: Recipe) -> None:
    """Processes share every batch."""
    for name in SEEN:
        if (size := getattr(recipe, name).batch_size) < distributed.processes():
            raise InputError(
                f"recipe: {name}.batch_size={size} is too small for {distributed.processes()} processes; every one"
                " takes a share of each batch."
            )
