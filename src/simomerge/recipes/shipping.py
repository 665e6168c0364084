"""The model that a run recommends, under a stable name in the run folder. The test split has no part in the choice."""

from __future__ import annotations

import math
import os
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simomerge.checkpoints.card import PICTURE
from simomerge.checkpoints.description import FILE, check_output, model_folder, write_description
from simomerge.core.errors import InputError
from simomerge.core.machine import compute_device
from simomerge.datasets.load import data_name
from simomerge.datasets.tasks import Task
from simomerge.models.model import SimoModel, load
from simomerge.models.strip import save_strip
from simomerge.recipes.graph import Graph
from simomerge.recipes.plan import Plan
from simomerge.training.evaluate import delta_mtl, evaluation_record
from simomerge.training.run_folder import MODEL

_RUNS = 7
_SECONDS = 5.0
"""Timed runs of one image, and when they end at the latest; two runs before them do not count."""


@dataclass(frozen=True)
class Choice:
    """The recommended model.

    Attributes:
        row, seed: The row of the table and the seed of the model.
        deltas: Mean Delta_MTL of the candidates on the validation images, by row; empty if there was one candidate.
    """

    row: str
    seed: int
    deltas: Mapping[str, float]


def check_place(folder: Path) -> None:
    """Raise InputError if the run folder is a model, or holds one where the recommended model goes that must stay."""
    if (folder / FILE).is_file() or (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is the folder of a model; give a run a folder of its own with -o, such as runs/mine."
        )
    check_output(folder / MODEL, overwrite=True)


def choose(plan: Plan, graph: Graph, tasks: Mapping[str, Task]) -> Choice | None:
    """The candidate with the best mean Delta_MTL on validation images, and its best seed; None without candidates."""
    seeds = plan.recipe.seeds
    if len(plan.candidates) < 2:
        return Choice(plan.candidates[0], seeds[0], {}) if plan.candidates else None
    baselines = {s: {t: graph.log(e)["scores"][t] for t, e in plan.choosing_experts[s].items()} for s in seeds}
    found = {
        row: [delta_mtl(graph.log(plan.choosing[s, row])["scores"], baselines[s], tasks) for s in seeds]
        for row in plan.candidates
    }
    deltas = {row: statistics.mean(values) for row, values in found.items()}
    row = max(deltas, key=lambda each: _comparable(deltas[each]))
    comparable = list(map(_comparable, found[row]))
    return Choice(row, seeds[comparable.index(max(comparable))], deltas)


def _comparable(delta: float) -> float:
    """A Delta_MTL by which rows and seeds are ordered; what cannot be measured comes last."""
    return -math.inf if math.isnan(delta) else delta


def expert_folders(plan: Plan, graph: Graph, choice: Choice | None) -> dict[str, str]:
    """The folders of the recommended model's experts by task, relative to the run folder.

    Without a recommended model they are those of the first seed. This is the entry ``experts`` of ``results.json``:
    `stages/` can also hold experts of earlier recipes.
    """
    seed = plan.recipe.seeds[0] if choice is None else choice.seed
    experts = plan.experts[seed]
    return {task: (graph.output(stage) / MODEL).relative_to(graph.folder).as_posix() for task, stage in experts.items()}


def ship(plan: Plan, graph: Graph, choice: Choice, data: Any) -> dict[str, Any]:
    """Put the chosen model into the run folder, and describe it: the entry ``model`` of ``results.json``.

    Its weights are hard links to those of its stage where the disk has them, so they need no space of their own.
    """
    row, seed = choice.row, choice.seed
    source = graph.fetched(plan.models[seed, row]) / "model"
    experts = {task: graph.fetched(stage) / "model" for task, stage in plan.experts[seed].items()}
    model, image = load(source), data[0]["image"]
    scores = graph.log(plan.scores[seed, row])["scores"]
    baseline = {task: graph.log(stage)["scores"][task] for task, stage in plan.expert_scores[seed].items()}
    about = {"data": data_name(plan.recipe.data), "split": "test", "images": len(data)}
    model.evaluation = evaluation_record(model, scores, about, baseline)
    # Pictures of other datasets are not ours to publish with a model.
    picture = image if plan.recipe.data == "rooms" else None
    _link_model(source, graph.folder / MODEL, model, picture)
    return {
        "folder": MODEL,
        "row": row,
        "seed": seed,
        "candidates": dict(choice.deltas),
        "validation_images": plan.choosing_images,
        "bytes": _size(source),
        "experts_bytes": sum(map(_size, experts.values())),
        "image": list(image.shape[-2:]),
        "device": _device_name(),
        "milliseconds": _milliseconds([model], image),
        "experts_milliseconds": _milliseconds([load(expert) for expert in experts.values()], image),
    }


def _link_model(source: Path, target: Path, model: SimoModel, picture: Tensor | None) -> None:
    with model_folder(target, model.description(), overwrite=True) as folder:
        for file in source.rglob("*"):
            place = folder / file.relative_to(source)
            if file.is_dir():
                place.mkdir(exist_ok=True)
            elif file.name not in (FILE, "README.md"):
                _link(file, place)
        if picture is not None:
            save_strip(model, picture, folder / PICTURE)
            write_description(folder, model.description())  # the card shows the picture


def _link(file: Path, place: Path) -> None:
    try:
        os.link(file, place)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(file, place)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def _milliseconds(models: Sequence[SimoModel], image: Tensor) -> float:
    """Median time in which all models predict one image (3, H, W), one after the other."""
    device, seconds = compute_device(), list[float]()
    models = [model.to(device) for model in models]
    start = time.perf_counter()
    while len(seconds) < 3 or (len(seconds) < _RUNS + 2 and time.perf_counter() - start < _SECONDS):
        began = time.perf_counter()
        for model in models:
            for values in model.predict_batch(image[None]).values():
                values.cpu()
        seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds[2:])


def _device_name() -> str:
    if compute_device().type == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"
