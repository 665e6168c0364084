"""The stages of a run.

A stage's folder holds ``model/`` (a model folder) or ``features/``, and ``log.json``: what it cost and found. Stages
run as jobs in worker processes, so their inputs are paths and plain data.
"""

from __future__ import annotations

import json
import shutil
import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from simomerge.assembly.merge import merge
from simomerge.assembly.realign import Realignment, prepared
from simomerge.assembly.realign.method import TrainedRealignment
from simomerge.assembly.scale import search_scale
from simomerge.core import distributed
from simomerge.core.documents import read_json
from simomerge.core.files import atomic_folder, atomic_write_text
from simomerge.core.machine import compute_device
from simomerge.datasets.load import data_record, load_data
from simomerge.merging import available
from simomerge.models.model import SimoModel, load
from simomerge.recipes.graph import Data, Stage, open_data, read_log
from simomerge.recipes.row import AUTO, LABEL_FREE, LEARNED
from simomerge.relations import relate
from simomerge.training import sharding
from simomerge.training.evaluate import evaluate
from simomerge.training.familiarity import training_images
from simomerge.training.features import CachedFeatures, cache_features
from simomerge.training.lpft import finetune, fresh_head, train_head, trainable_parameters
from simomerge.training.run_folder import LOG
from simomerge.training.settings import TrainSettings, TuneOptions

_LOGGED = ("steps", "trained_parameters", "labelled_images", "unlabelled_images", "r2")

_CLOCK = "clock.json"
"""File in the work folder with the seconds of earlier attempts. It was written when the last attempt began."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LoggedStage(Stage):
    """A stage that fills its folder with the log and the model that `work` returns.

    If the class attribute ``goes_on`` is true, `work` goes on from what a killed attempt saved, and the seconds in the
    log are those of all attempts. Logs with seconds of their own keep these.
    """

    goes_on: ClassVar[bool] = False

    @abstractmethod
    def work(self, folder: Path) -> tuple[Mapping[str, Any], SimoModel | None]:
        """Do the work; ``folder`` keeps what a killed run resumes from."""

    def run(self, output: Path) -> None:
        unfinished = output.parent / f"{output.name}.work"
        began = time.monotonic() - (_earlier_seconds(unfinished) if self.goes_on and distributed.is_first() else 0)
        log, model = self.work(unfinished)
        if distributed.is_first():
            with atomic_folder(output) as folder:
                if model is not None:
                    model.save_pretrained(folder / "model")
                _write_log(folder, began, log)
            shutil.rmtree(unfinished, ignore_errors=True)
        distributed.wait()


def _earlier_seconds(unfinished: Path) -> float:
    """Seconds of a stage's earlier attempts until they last saved something; starts the clock of this attempt."""
    clock, seconds = unfinished / _CLOCK, 0.0
    if clock.is_file():
        before = read_json(clock, "remove the folder, and run the recipe again.", {"seconds": float})["seconds"]
        saved = max(file.stat().st_mtime for file in unfinished.rglob("*") if file.is_file())
        seconds = before + saved - clock.stat().st_mtime
    atomic_write_text(clock, json.dumps({"seconds": seconds}))
    return seconds


def _write_log(folder: Path, began: float, log: Mapping[str, Any]) -> None:
    content = json.dumps({"seconds": time.monotonic() - began, **log}, indent=2)
    (folder / LOG).write_text(content + "\n", encoding="utf-8")


def _models(folders: Mapping[str, Any], device: Any = "cpu") -> dict[str, SimoModel]:
    found = {task: load(folder / "model").to(device) for task, folder in folders.items()}
    for task, model in found.items():
        model.source = folders[task].name  # provenance names the stage, since all models of a run are called "model"
    return found


@dataclass(frozen=True, eq=False, kw_only=True)
class Features(Stage):
    """Features of a model's encoder on a dataset."""

    model: str
    data: Data

    def run(self, output: Path) -> None:
        began = time.monotonic()
        with distributed.folder_together(output) as folder:
            encoder = load(self.model).encoder.to(compute_device())
            cache_features(encoder, load_data(**self.data), folder / "features")
            if distributed.is_first():
                _write_log(folder, began, {})


@dataclass(frozen=True, eq=False, kw_only=True)
class Probe(LoggedStage):
    """A fresh head for one task, trained on the frozen base's features (LP-FT, first phase)."""

    base: str
    features: Any
    data: Data
    task: str
    head: str
    head_settings: dict[str, Any]
    settings: TrainSettings

    def work(self, folder: Path) -> tuple[Mapping[str, Any], SimoModel]:
        train = load_data(**self.data).select([self.task])
        encoder, task = load(self.base).encoder, train.tasks[self.task]
        head = fresh_head(encoder, task, train, self.head, self.settings.seed, **self.head_settings)
        cached = CachedFeatures(self.features / "features", train, [self.task])
        log = train_head(head, task, cached, self.settings, state_file=folder / "state.safetensors")
        return {**asdict(log), "labelled_images": len(train)}, SimoModel(encoder, {self.task: task}, {self.task: head})


@dataclass(frozen=True, eq=False, kw_only=True)
class Tune(LoggedStage):
    """Encoder and heads together (LP-FT, second phase): one task makes an expert, several the joint model."""

    base: str
    base_name: str = field(metadata={"resource": True})  # it enters the provenance only
    probes: Mapping[str, Any]
    train: Data
    validation: Data
    settings: TrainSettings
    weighting: str = "equal"
    augmentation: str = "flip"

    @property
    def cost(self) -> float:
        return self.settings.steps * (1 + 0.1 * (len(self.probes) - 1))

    @property
    def models(self) -> float:
        return 6.0 + len(self.probes)

    def work(self, folder: Path) -> tuple[Mapping[str, Any], SimoModel]:
        base = load(self.base)
        origin = base.origin()  # before the encoder is trained
        probes = _models(self.probes)
        tasks = {task: probe.tasks[task] for task, probe in probes.items()}
        model = SimoModel(base.encoder, tasks, {task: probe.heads[task] for task, probe in probes.items()})
        model.requires_grad_(True)
        images, validation = (load_data(**data).select(list(tasks)) for data in (self.train, self.validation))
        how = {"weighting": self.weighting, "augmentation": self.augmentation}
        log = finetune(
            model,
            images,
            self.settings,
            validation,
            folder / "state.safetensors",
            options=TuneOptions(self.weighting, self.augmentation),
        )
        record = {"method": "lp-ft", **data_record(self.train["spec"]), **asdict(self.settings), **how}
        model.provenance = {
            "base": {**origin, "source": self.base_name},
            "training": {**record, **training_images(model, images)},
        }
        cost = {"trained_parameters": trainable_parameters(model), "labelled_images": len(images)}
        return {**asdict(log), **cost}, model


@dataclass(frozen=True, eq=False, kw_only=True)
class Score(LoggedStage):
    """Metrics of a model on a dataset."""

    model: Any
    data: Data

    @property
    def cost(self) -> float:
        return 5.0

    def work(self, folder: Path) -> tuple[Mapping[str, Any], None]:
        model = load(self.model / "model").to(compute_device())
        return {"scores": evaluate(model, load_data(**self.data))}, None


@dataclass(frozen=True, eq=False, kw_only=True)
class MergingStage(LoggedStage):
    """Experts merged into one model."""

    base: str
    experts: Mapping[str, Any]
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def models(self) -> float:
        return 3.0 + len(self.experts)


@dataclass(frozen=True, eq=False, kw_only=True)
class Merge(MergingStage):
    """Experts merged into one model; a scale that is not given is the best one on the labels of ``validation``."""

    validation: Data
    baseline: Mapping[str, Any]

    @property
    def cost(self) -> float:
        return 40.0

    def work(self, folder: Path) -> tuple[Mapping[str, Any], SimoModel]:
        base, experts = load(self.base).to(compute_device()), _models(self.experts, compute_device())
        if not searches_scale(self.method, self.parameters):
            model = merge(base, experts, self.method, **self.parameters)
            return {"labelled_images": 0, **_scale(model)}, model
        data = load_data(**self.validation).select(list(experts))
        baseline = {task: read_log(output)["scores"][task] for task, output in self.baseline.items()}
        found = search_scale(base, experts, self.method, data, baseline=baseline, align=False, **self.parameters)
        curve = {"scales": found.scales, "delta_mtl": found.delta_mtl, "normalised": found.normalised}
        return {"scale": found.scale, "curve": curve, "labelled_images": len(data)}, found.model


def searches_scale(method: str, parameters: Mapping[str, Any]) -> bool:
    """Whether a merge method has a scale that is not given."""
    return "scale" in available()[method].__dataclass_fields__ and "scale" not in parameters


def _scale(model: SimoModel) -> dict[str, float]:
    """The scale of a merge for its log, if it is one number."""
    scale = model.provenance["merge"].get("scale")
    return {"scale": scale} if isinstance(scale, float) else {}


@dataclass(frozen=True, eq=False, kw_only=True)
class MergeWithoutLabels(MergingStage):
    """Experts merged with the scale that can be folded best, or by one of `LABEL_FREE`."""

    images: Data

    @property
    def cost(self) -> float:
        return 120.0 if self.method in LABEL_FREE else 20.0

    def work(self, folder: Path) -> tuple[Mapping[str, Any], SimoModel]:
        images, experts = open_data(self.images), _models(self.experts, compute_device())
        method, scale = {AUTO: (AUTO, None), LEARNED: ("task-arithmetic", LEARNED)}.get(
            self.method, (self.method, "auto")
        )
        given = {"scale": scale, **self.parameters}
        base = load(self.base).to(compute_device())
        model = merge(base, experts, method, images=images, count=len(images), **given)
        chosen = {**model.provenance["merge"]}
        log = {
            "labelled_images": 0,
            "unlabelled_images": len(images),
            "tried": chosen.pop("tried", []),
            "chosen": chosen,
        }
        return {**log, **_scale(model)}, model


@dataclass(frozen=True, eq=False, kw_only=True)
class Realign(LoggedStage):
    """A model re-aligned from the experts' behaviour on images, or from labels."""

    keeps_labels: ClassVar[bool] = True
    goes_on: ClassVar[bool] = True

    model: Any
    method: Realignment
    data: Data
    experts: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""

    @property
    def cost(self) -> float:
        if not isinstance(self.method, TrainedRealignment):
            return 20.0
        return 50.0 if self.method.trains_heads_apart else 50.0 + self.method.training.steps

    @property
    def models(self) -> float:
        return len(self.experts) + (6.0 if self.method.changes_encoder else 3.0)

    def work(self, folder: Path) -> tuple[Mapping[str, Any], SimoModel]:
        device = compute_device() if sharding.current() is None else torch.device("cpu")  # shards alone fit a GPU
        start, data = load(self.model / "model"), open_data(self.data)
        labelled, experts = self.method.teacher == "labels", _models(self.experts, device)
        given = {"data": data} if labelled else {"experts": experts, "images": data}
        base = load(self.base).to(device) if self.base else None
        inputs = prepared(self.method, start.to(device), folder, **given, base=base)
        result = self.method.apply(start, inputs)
        record = result.provenance["realign"]
        return {key: record[key] for key in _LOGGED if key in record}, result


@dataclass(frozen=True, eq=False, kw_only=True)
class Relate(LoggedStage):
    """How the experts relate to each other, measured by labels."""

    keeps_labels: ClassVar[bool] = True

    base: str
    experts: Mapping[str, Any]
    data: Data

    @property
    def cost(self) -> float:
        return 150.0  # pairs of experts are merged, so it takes as long as many merges

    @property
    def models(self) -> float:
        return 3.0 + len(self.experts)

    def work(self, folder: Path) -> tuple[Mapping[str, Any], None]:
        found = relate(load(self.base), _models(self.experts), data=load_data(**self.data), count=None)
        return {"relations": found.to_dict()}, None
