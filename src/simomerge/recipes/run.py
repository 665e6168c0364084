"""Run a recipe in a run folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from simomerge.assembly.realign import realignments
from simomerge.core import distributed
from simomerge.core.assets import resolve_source
from simomerge.core.caution import warn
from simomerge.core.errors import InputError
from simomerge.core.files import atomic_write_text
from simomerge.core.machine import mixed_precision
from simomerge.core.version import __version__
from simomerge.datasets.base import DenseDataset, check_size
from simomerge.datasets.load import load_data
from simomerge.datasets.rooms import RENDER_VERSION
from simomerge.datasets.rooms.dataset import TASKS
from simomerge.datasets.tasks import select_tasks
from simomerge.models.fingerprints import encoder_identity
from simomerge.models.model import load
from simomerge.recipes.fitting import check_base
from simomerge.recipes.graph import Data, Graph, open_data
from simomerge.recipes.plan import Plan, splits_of
from simomerge.recipes.recipe import REALIGN, Recipe
from simomerge.recipes.results import gallery, summarise
from simomerge.recipes.shipping import MODEL, check_place, choose, expert_folders, ship
from simomerge.training.cluster import pool_of
from simomerge.training.evaluate import delta_mtl
from simomerge.training.pool import WorkerPool
from simomerge.training.run_folder import RunFolder

SAMPLES = 4
"""Samples of each split that are read before any work, to find mistakes that all labels have."""


def run_recipe(
    recipe: Recipe, folder: str | Path | RunFolder | None = None, workers: int | None = None, ray: str | None = None
) -> dict[str, Any]:
    """Run a recipe: experts, joint MTL, merges, re-alignments, evaluation on the test split.

    Args:
        recipe: What to do.
        folder: The run folder, or its URL (see `RunFolder`), by default the recipe's ``output``; a second run with the
            same recipe reuses every stage in it.
        workers: Number of processes; one per core by default.
        ray: Address of a Ray cluster that does the stages, see `RayPool`; by default this machine does them.

    Returns:
        The results: what ``results.json`` in the folder holds (docs/formats.md), and under ``gallery`` the pictures of
        the report. The folder ``model`` in the run folder is the model that the run recommends.
    """
    began = time.monotonic()
    folder = RunFolder.of(folder or recipe.output)
    folder.check()
    check_place(folder.path)
    folder.check_replaceable()
    plan, graph = _planned(recipe, folder)
    with pool_of(folder, workers, ray) as pool:
        with distributed.first_before_others():
            for data in plan.splits.values() if recipe.data == "rooms" else ():
                load_data(**data, workers=None if ray is not None else workers)
        test = _opened(plan.splits, recipe, deeply=any(not done for _, done in _stages(plan, graph)))["test"]
        graph.build(plan.wanted(), pool)
    results = summarise(plan, graph, test.tasks, len(test))
    choice = choose(plan, graph, test.tasks)
    results["experts"] = expert_folders(plan, graph, choice)
    if choice is not None and distributed.is_first():
        results["model"] = ship(plan, graph, choice, test)
    results["seconds_of_this_call"] = round(time.monotonic() - began, 1)
    if distributed.is_first():
        atomic_write_text(folder.path / "results.json", json.dumps(results, indent=2) + "\n")
        folder.send(MODEL, "results.json")
    return {**results, "gallery": gallery(plan, graph, test)}


def held_out_delta(
    recipe: Recipe, row: str, images: int, folder: str | Path | RunFolder, pool: WorkerPool
) -> list[float]:
    """Delta_MTL of one row, in percent per seed, on ``images`` of the validation images.

    Only the stages that the row needs are run. These images are not part of D_val, and the test split is not used.
    """
    available = recipe.val_images
    if recipe.data != "rooms":  # rooms has as many images as are asked for
        available = len(load_data(recipe.data, "val", recipe.val_images, **recipe.data_options))
    if images >= available:
        raise InputError(
            f"{recipe.data}: search.images is {images}, but the validation split has {available} images; use fewer."
        )
    kept = replace(recipe, val_images=available - images)
    held_out = {"split": "val", "count": images, "skip": kept.val_images}
    plan, graph = _planned(kept, RunFolder.of(folder), held_out)
    tasks = _opened(plan.splits, kept, deeply=True)["test"].tasks
    scores = [plan.scores[seed, row] for seed in kept.seeds]
    graph.build([*scores, *(stage for seed in kept.seeds for stage in plan.expert_scores[seed].values())], pool)
    return [
        delta_mtl(
            graph.log(stage)["scores"],
            {task: graph.log(expert)["scores"][task] for task, expert in plan.expert_scores[seed].items()},
            tasks,
        )
        for seed, stage in zip(kept.seeds, scores, strict=True)
    ]


def inputs_of(recipe: Recipe, folder: str | Path | RunFolder) -> dict[str, Any]:
    """What the results of trials depend on besides the recipe: the base and the content of all data but the test split.

    It depends on no path, so machines that have the files in other places agree.
    """
    plan, graph = _planned(recipe, RunFolder.of(folder), {"split": "val", "count": recipe.val_images})
    data = {name: plan.splits[name] for name in ("train", "val")} | {"align": plan.unlabelled(None)}
    return {"salt": graph.salt, "data": graph.key_of(data)}


def plan_of(recipe: Recipe, folder: str | Path | RunFolder | None = None) -> list[tuple[str, bool]]:
    """The stages of a recipe in an order in which they can be done, and for each whether it is done in the folder."""
    return _stages(*_planned(recipe, RunFolder.of(folder or recipe.output)))


def _stages(plan: Plan, graph: Graph) -> list[tuple[str, bool]]:
    stages = graph.in_order(plan.wanted())
    done = graph.run_folder.done(stages)
    return [(stage.name, path in done) for path, stage in stages.items()]


def _planned(recipe: Recipe, folder: RunFolder, test: Mapping[str, Any] | None = None) -> tuple[Plan, Graph]:
    """Plan and graph; ``test`` replaces settings of the test split."""
    base = resolve_source(recipe.base)
    base = str(Path(base).resolve()) if Path(base).exists() else base  # else a hub id
    splits = splits_of(recipe)
    splits["test"] |= test or {}
    if recipe.data == "rooms":
        _check_rooms(recipe)
    else:
        opened = _opened(splits, recipe)
        unlabelled = load_data(recipe.data, recipe.align_split, tasks=[], **recipe.data_options)  # or an unknown split
        _note_counts(recipe, opened, len(unlabelled))
    if recipe.align_images is not None:
        open_data({"spec": recipe.align_images, "count": None, "unlabelled": True})  # raises if it is missing
    _check_batches(recipe)
    foundation = load(base)  # fail on a wrong base before rendering
    check_base(recipe, foundation)
    salt = f"{__version__} {RENDER_VERSION} {mixed_precision()} {encoder_identity(foundation.encoder)}"
    weights = sum(value.numel() * value.element_size() for value in foundation.parameters())
    return Plan(recipe, base, splits), Graph(folder, base, salt, _contents(recipe.tasks), weights)


def _note_counts(recipe: Recipe, opened: Mapping[str, DenseDataset], unlabelled: int) -> None:
    """Say it if a recipe asks for more images than there are, other than by its defaults."""
    wanted = {f"{split}_images": (getattr(recipe, f"{split}_images"), len(data)) for split, data in opened.items()}
    defaults = {name: getattr(Recipe, name) for name in wanted}
    for name, parameters in recipe.realign.items():
        count = parameters.get("count")
        if isinstance(count, int) and (recipe.align_images is None or realignments()[name].teacher == "labels"):
            there = unlabelled if realignments()[name].teacher == "experts" else len(opened["val"])
            wanted[f"realign.{name}.count"] = count, there
            defaults[f"realign.{name}.count"] = REALIGN.get(name, {}).get("count")
    for key, (asked, there) in wanted.items():
        if asked > there and asked != defaults[key]:
            warn(f"recipe: {key} is {asked}, and there are {there} images; all are used.")


def _contents(tasks: Sequence[str]) -> Callable[[Data], str]:
    """What distinguishes a dataset from others of the same name: for rooms nothing, for others the files' content."""
    found: dict[str, str] = {}

    def contents(data: Data) -> str:
        key = json.dumps(data, sort_keys=True, default=str)
        if data["spec"] != "rooms" and key not in found:
            found[key] = open_data(data, tasks=tasks).fingerprint()
        return found.get(key, "")

    return contents


def _opened(splits: Mapping[str, Data], recipe: Recipe, deeply: bool = False) -> dict[str, DenseDataset]:
    """The three splits, after checking that all their files exist; errors come before any work.

    Args:
        deeply: Also check that no file is truncated, and read some samples.
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
        except (TypeError, ValueError) as error:  # raised by data_options
            raise InputError(f"data_options of {data['spec']}: {error}.") from error
    return opened


def _check_rooms(recipe: Recipe) -> None:
    """Check what can be checked before any room is rendered."""
    options = recipe.data_options
    select_tasks(TASKS, recipe.tasks)
    if unknown := options.keys() - {"size", "seed"}:
        raise InputError(f"data_options of rooms: unknown key {min(map(str, unknown))!r}; it takes size and seed.")
    check_size(options.get("size", (64, 80)))
    if not isinstance(options.get("seed", 0), int):
        raise InputError(f"data_options of rooms: seed {options['seed']!r}; give a whole number.")


def _check_batches(recipe: Recipe) -> None:
    """Check that the processes can share every batch."""
    for name, training in recipe.trainings().items():
        if training.batch_size < distributed.processes():
            raise InputError(
                f"recipe: {name}: batch_size={training.batch_size} is too small for {distributed.processes()}"
                " processes; each of them takes a share of every batch."
            )
