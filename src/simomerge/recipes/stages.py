"""The stages of a run. Each is a function that fills one folder, from folders that earlier stages filled.

A stage's folder holds ``model/`` (a model folder) or ``features/``, and ``log.json``: what it cost and found.
They run as jobs in worker processes, so they take and give paths and plain data only.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from simomerge.assembly.merge import merge
from simomerge.assembly.realign import REALIGNMENTS, realign_distill, realign_fold
from simomerge.assembly.scale import search_scale
from simomerge.core import distributed
from simomerge.core.files import atomic_folder
from simomerge.core.machine import compute_device
from simomerge.datasets import load_data
from simomerge.merging import available
from simomerge.models.model import SimoModel, load
from simomerge.relations import relate
from simomerge.training.evaluate import evaluate
from simomerge.training.features import CachedFeatures, cache_features
from simomerge.training.lpft import finetune, fresh_head, train_head, trainable_parameters
from simomerge.training.settings import TrainSettings, TuneOptions

Data = Mapping[str, Any]
"""A dataset as plain data: the keyword arguments of `load_data`."""


def work_folder(output: Path) -> Path:
    """Where a stage keeps what a killed run goes on from; removed when the stage is done."""
    return output.parent / f"{output.name}.work"


def read_log(output: Path) -> dict[str, Any]:
    """What a finished stage cost and found."""
    return json.loads((output / "log.json").read_text(encoding="utf-8"))


def _finish(output: Path, log: Mapping[str, Any], model: SimoModel | None = None) -> None:
    if distributed.is_first():
        with atomic_folder(output) as folder:
            if model is not None:
                model.save_pretrained(folder / "model")
            (folder / "log.json").write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(work_folder(output), ignore_errors=True)
    distributed.wait()


def features(output: Path, model: str, data: Data, label: str) -> None:
    """Features of a model's encoder on a dataset."""
    began = time.monotonic()
    with distributed.folder_together(output) as folder:
        encoder = load(model).encoder.to(compute_device())
        cache_features(encoder, load_data(**data), folder / "features", label=label)
        if distributed.is_first():
            log = {"seconds": time.monotonic() - began}
            (folder / "log.json").write_text(json.dumps(log) + "\n", encoding="utf-8")


def probe(
    output: Path,
    base: str,
    cached: str,
    data: Data,
    task: str,
    head: str,
    head_settings: dict[str, Any],
    settings: dict[str, Any],
    label: str,
) -> None:
    """A fresh head for one task, trained on the frozen base's features (LP-FT, first phase)."""
    train = load_data(**data).select([task])
    model = load(base)
    chosen = train.tasks[task]
    fresh = fresh_head(model.encoder, chosen, train, head, settings["seed"], **head_settings)
    state = work_folder(output) / "state.pt"
    log = train_head(
        fresh,
        chosen,
        CachedFeatures(Path(cached) / "features", train, [task]),
        TrainSettings(**settings),
        state_file=state,
        label=label,
    )
    _finish(output, asdict(log), SimoModel(model.encoder, {task: chosen}, {task: fresh}))


def tune(
    output: Path,
    base: str,
    base_name: str,
    probes: dict[str, str],
    train: Data,
    validation: Data,
    settings: dict[str, Any],
    label: str,
    weighting: str = "equal",
    augmentation: str = "flip",
) -> None:
    """Encoder and heads together (LP-FT, second phase): one task makes an expert, several the joint model."""
    model = load(base)
    fingerprint = model.encoder_fingerprint()
    probed = {task: load(Path(folder) / "model") for task, folder in probes.items()}
    tasks = {task: probed[task].tasks[task] for task in probes}
    model = SimoModel(model.encoder, tasks, {task: probed[task].heads[task] for task in probes})
    model.requires_grad_(True)
    images = load_data(**train).select(list(tasks))
    log = finetune(
        model,
        images,
        TrainSettings(**settings),
        load_data(**validation).select(list(tasks)),
        work_folder(output) / "state.pt",
        label,
        options=TuneOptions(weighting, augmentation),
    )
    how = {"weighting": weighting, "augmentation": augmentation}
    model.provenance = {
        "base": {"source": base_name, "fingerprint": fingerprint},
        "training": {"method": "lp-ft", **settings, **how, "images": len(images)},
    }
    cost = {"trained_parameters": trainable_parameters(model), "labelled_images": len(images)}
    _finish(output, {**asdict(log), **cost}, model)


def score(output: Path, model: str, data: Data, label: str) -> None:
    """Metrics of a model on a dataset."""
    began = time.monotonic()
    scored = load(Path(model) / "model").to(compute_device())
    scores = evaluate(scored, load_data(**data), label=label)
    _finish(output, {"seconds": time.monotonic() - began, "scores": scores})


def merged(
    output: Path,
    base: str,
    experts: dict[str, str],
    method: str,
    validation: Data,
    baseline: dict[str, str],
    label: str,
    parameters: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Experts merged into one model; a scale that is not given is the best one on the validation split."""
    began = time.monotonic()
    foundation = load(base)
    models = {task: load(Path(folder) / "model") for task, folder in experts.items()}

    if "scale" in available()[method].__dataclass_fields__ and "scale" not in parameters:
        data = load_data(**validation).select(list(experts))
        scores = {task: read_log(Path(folder))["scores"][task] for task, folder in baseline.items()}
        search = search_scale(foundation, models, method, data, baseline=scores, align=False, **parameters)
        model = search.model
        found = {
            "scale": search.scale,
            "curve": {
                "scales": search.scales,
                "delta_mtl": search.delta_mtl,
                "normalised": search.normalised,
            },
            "labelled_images": len(data),
        }
    else:
        model, found = merge(foundation, models, method, **parameters), {"labelled_images": 0}
        if isinstance(parameters.get("scale"), float):
            found["scale"] = parameters["scale"]
    _finish(output, {"seconds": time.monotonic() - began, **found}, model)


def merged_without_labels(
    output: Path,
    base: str,
    experts: dict[str, str],
    method: str,
    images: Data,
    label: str,
    parameters: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Experts merged with the scale that can be folded best, or, with the method "auto", whatever can be."""
    began = time.monotonic()
    models = {task: load(Path(folder) / "model") for task, folder in experts.items()}

    source = load_data(**images)
    model = merge(
        load(base),
        models,
        method,
        scale=None if method == "auto" else "auto",
        images=source,
        count=len(source),
        **parameters,
    )
    chosen = model.provenance["merge"]
    log = {
        "seconds": time.monotonic() - began,
        "labelled_images": 0,
        "unlabelled_images": len(source),
        "tried": chosen["tried"],
        "chosen": {key: value for key, value in chosen.items() if key != "tried"},
    }
    if isinstance(chosen.get("scale"), float):
        log["scale"] = chosen["scale"]
    _finish(output, log, model)


def taught(
    output: Path,
    model: str,
    experts: dict[str, str],
    images: Data,
    how: str,
    settings: dict[str, Any],
    options: dict[str, Any],
    label: str,
) -> None:
    """A model re-aligned on unlabelled images: "fold", "fold-cross", "distill" or "distill-adapters"."""
    began = time.monotonic()
    teachers = {task: load(Path(folder) / "model") for task, folder in experts.items()}

    start, source = load(Path(model) / "model"), load_data(**images)
    if how.startswith("fold"):
        result = realign_fold(start, teachers, source, "cross-tap" if how == "fold-cross" else "per-tap")
    else:
        adapters = how == "distill-adapters"
        result = realign_distill(
            start,
            teachers,
            source,
            TrainSettings(**settings),
            adapters,
            work_folder=work_folder(output),
            **options,
        )
    cost = result.provenance["realign"]
    keys = ("steps", "trained_parameters", "labelled_images", "unlabelled_images")
    log = {"seconds": time.monotonic() - began, **{key: cost[key] for key in keys}}
    _finish(output, {**log, **({"r2": cost["r2"]} if "r2" in cost else {})}, result)


def related(output: Path, base: str, experts: dict[str, str], data: Data, label: str) -> None:
    """How the experts relate to each other, judged by labels."""
    began = time.monotonic()
    models = {task: load(Path(folder) / "model") for task, folder in experts.items()}

    found = relate(load(base), models, data=load_data(**data), count=None)
    _finish(output, {"seconds": time.monotonic() - began, "relations": found.to_dict()})


def realigned(
    output: Path,
    model: str,
    data: Data,
    how: str,
    settings: dict[str, Any],
    options: dict[str, Any],
    label: str,
) -> None:
    """A merged model, re-aligned with heads or adapters."""
    began = time.monotonic()

    result = REALIGNMENTS[how](
        load(Path(model) / "model"),
        load_data(**data),
        TrainSettings(**settings),
        work_folder=work_folder(output),
        **options,
    )
    cost = result.provenance["realign"]
    _finish(
        output,
        {
            "seconds": time.monotonic() - began,
            "steps": cost["steps"],
            "trained_parameters": cost["trained_parameters"],
            "labelled_images": cost["labelled_images"],
        },
        result,
    )
