"""Jobs for one process or for several that torchrun starts. The tests compare the files that the jobs write."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from simomerge.assembly import budget
from simomerge.assembly.realign import realign
from simomerge.core import distributed
from simomerge.core.machine import PRECISION
from simomerge.datasets import load_data
from simomerge.datasets.pictures import as_images
from simomerge.models.encoders import load_encoder
from simomerge.models.model import SimoModel
from simomerge.training.evaluate import evaluate
from simomerge.training.features import cache_features
from simomerge.training.lpft import finetune, fresh_head, lpft
from simomerge.training.settings import TrainSettings, TuneOptions
from simomerge.training.sharding import sharded
from simomerge.training.state import TrainingState, TrainLog

SETTINGS = TrainSettings(steps=5, batch_size=7, lr=1e-3, encoder_lr=1e-3, validate_every=2)
HEAD_SETTINGS = replace(SETTINGS, encoder_lr=None)
HEADS = {"linear": {}, "dpt": {"fusion_channels": 8}}


def in_float32() -> None:
    """Use float32: in bfloat16 a share of a batch is rounded differently from the full batch."""
    os.environ[PRECISION] = "fp32"


def model_of(base: Path, data: Any, kinds: dict[str, str]) -> SimoModel:
    """A model whose heads start at the mean target.

    If all predictions are too low, an L1 loss under a batch norm has a gradient of rounding only, and AdamW makes full
    steps of it.
    """
    encoder = load_encoder(base)
    heads = {name: fresh_head(encoder, data.tasks[name], data, kind, **HEADS[kind]) for name, kind in kinds.items()}
    return SimoModel(encoder, {name: data.tasks[name] for name in kinds}, heads)


def moved_experts(base: Path, data: Any, kinds: dict[str, str]) -> dict[str, SimoModel]:
    """Experts whose encoders differ from the base."""
    experts = {task: model_of(base, data, {task: kind}) for task, kind in kinds.items()}
    with torch.no_grad():
        for task, expert in experts.items():
            torch.manual_seed(len(task))
            for weight in expert.encoder.parameters():
                weight.mul_(1 + 0.1 * torch.randn(()))
    return experts


def save(output: Path, name: str, value: Any) -> None:
    """Save the result of this process, so that the test can compare the processes."""
    torch.save(value, output / f"{name}-{distributed.rank()}.pt")


def train(base: Path, output: Path, weightings: tuple[str, ...] = ("uncertainty", "nash")) -> None:
    data = load_data("rooms", "train", 16, ("depth", "segmentation", "normals"))
    kinds = {"depth": "linear", "segmentation": "dpt", "normals": "linear"}
    validation = load_data("rooms", "val", 9, tuple(data.tasks))
    for weighting in weightings:
        model = model_of(base, data, kinds).requires_grad_(True)
        options = TuneOptions(weighting=weighting, checkpointing=weighting == "nash")
        log = finetune(model, data, SETTINGS, validation, output / f"{weighting}.safetensors", options=options)
        save(output, f"train-{weighting}", {"model": model.state_dict(), "log": asdict(log)})


def weightings(base: Path, output: Path) -> None:
    """The other ways to weight the tasks by their gradients."""
    train(base, output, ("pcgrad", "cagrad", "gradnorm"))


def realigned(base: Path, output: Path) -> None:
    data = load_data("rooms", "val", 11, ("depth", "edges"))
    kinds = {"depth": "linear", "edges": "dpt"}
    model = model_of(base, data, kinds)
    cache_features(model.encoder, data, output / "features", batch_size=4)
    heads = realign(model, data=data, method="heads", training=HEAD_SETTINGS).heads.state_dict()
    experts = moved_experts(base, data, kinds)
    folded = realign(model, experts, data, images_at_once=2)
    mapped = realign(model, experts, data, method="react", images_at_once=2)
    surgery = realign(model, experts, data, method="surgery", rank=2, training=HEAD_SETTINGS)
    others = {"mapped": mapped.heads.state_dict(), "surgery": surgery.heads.state_dict()}
    save(output, "realigned", {"heads": heads, "folded": folded.heads.state_dict(), **others})


def distilled(base: Path, output: Path) -> None:
    """The encoder with stored and with live predictions, and what fits into a few seconds."""
    data = load_data("rooms", "val", 11, ("depth", "edges"))
    kinds = {"depth": "linear", "edges": "dpt"}
    model = model_of(base, data, kinds)
    experts = moved_experts(base, data, kinds)
    model.provenance = {"realign": {"method": "fold"}}  # a fold would add rounding of its own
    for predictions in ("stored", "live"):
        settings = {"training": SETTINGS, "hold_out": 0.3, "predictions": predictions}
        result = realign(model, experts, data, method="distill-encoder", **settings)
        record = result.provenance["realign"]
        kept = {key: record[key] for key in ("best_step", "distance_ratio")}
        save(output, f"distilled-{predictions}", {"model": result.state_dict(), "record": kept})
    budget.LEAST_STEPS = 1
    within = budget.distil_until(time.monotonic() + 8, model, model, experts, as_images(data))
    save(output, "within", {"model": within.state_dict(), "steps": within.provenance["auto"].get("steps", 0)})


def judge(base: Path, output: Path) -> None:
    data = load_data("rooms", "val", 11)
    model = model_of(base, data, dict.fromkeys(data.tasks, "linear"))
    scores = evaluate(model, data, batch_size=4)
    save(output, "judge", {"scores": scores, "one image": evaluate(model, data.take(1))})


def probe_and_tune(base: Path, output: Path) -> None:
    """LP-FT in a temporary folder, which all processes must find."""
    data = load_data("rooms", "train", 8, ("depth",))
    model = model_of(base, data, {"depth": "dpt"})
    lpft(model, data, SETTINGS, SETTINGS)
    save(output, "lpft", model.state_dict())


def recipe(base: Path, output: Path) -> None:
    from simomerge.recipes.recipe import Recipe
    from simomerge.recipes.run import run_recipe

    short = TrainSettings(steps=4, batch_size=4, lr=5e-3)
    steps = {"steps": 4, "batch_size": 4, "lr": 5e-3}
    small = Recipe(
        tasks=("depth", "normals"),
        head="dpt",
        head_settings=HEADS["dpt"],
        base=str(base),
        **{"train_images": 16, "val_images": 16, "test_images": 5},
        **dict.fromkeys(("probe", "tune", "joint"), short),
        realign={"heads": steps, "adapters": {**steps, "rank": 2}, "distill": {**steps, "count": 6}},
        merges=("average", "task-arithmetic"),
        realigned=("task-arithmetic+heads", "average+adapters", "task-arithmetic+fold", "average+distill", "auto"),
        relate=True,
    )
    folder = output / "run" if distributed.processes() < 2 else f"file://{output}/run"  # two processes, and at a URL
    results = run_recipe(small, folder, workers=1)  # others would not be in float32
    save(output, "recipe", {row["method"]: row["all_metrics"] for row in results["rows"]})


def divided(offload: bool = False) -> AbstractContextManager[None]:
    """Divide models among the processes, if there are several."""
    several = distributed.processes() > 1
    return sharded(several, offload and several)


def shard(base: Path, output: Path) -> None:
    """Trainings of a divided model: plain, on the CPU's memory with checkpointing, and one that is killed."""
    data = load_data("rooms", "train", 16, ("depth", "normals"))
    validation = load_data("rooms", "val", 9, tuple(data.tasks))
    kinds = {"depth": "dpt", "normals": "linear"}
    for name, options in {"plain": TuneOptions("uncertainty"), "offload": TuneOptions(checkpointing=True)}.items():
        model = model_of(base, data, kinds).requires_grad_(True)
        with divided(offload=name == "offload"):
            log = finetune(model, data, SETTINGS, validation, output / f"{name}.safetensors", options=options)
        save(output, f"shard-{name}", {"model": model.state_dict(), "log": asdict(log)})
    resume(base, output, stop=3)


def resume(base: Path, output: Path, stop: int = 0) -> None:
    """Continue a training of a divided model, which is killed at step ``stop``."""
    data = load_data("rooms", "train", 16, ("depth", "normals"))
    validation = load_data("rooms", "val", 9, tuple(data.tasks))
    model = model_of(base, data, {"depth": "dpt", "normals": "linear"}).requires_grad_(True)

    def save_and_die(state: TrainingState, log: TrainLog, seconds: float = 0) -> None:
        if log.steps == stop:
            state.save(log)
            raise KeyboardInterrupt

    usual = TrainingState.save_once_in_a_while
    TrainingState.save_once_in_a_while = save_and_die  # type: ignore[method-assign]
    try:
        with divided():
            options = TuneOptions("uncertainty")
            log = finetune(model, data, SETTINGS, validation, output / "killed.safetensors", options=options)
        save(output, "resumed", {"model": model.state_dict(), "log": asdict(log)})
    except KeyboardInterrupt:
        assert stop
    finally:
        TrainingState.save_once_in_a_while = usual  # type: ignore[method-assign]


def shard_realigned(base: Path, output: Path) -> None:
    """Re-alignments that train inside the encoder, with a divided model."""
    data = load_data("rooms", "val", 11, ("depth", "edges"))
    kinds = {"depth": "linear", "edges": "dpt"}
    model = model_of(base, data, kinds)
    experts = moved_experts(base, data, kinds)
    found = {}
    for method in ("adapters", "lora"):
        given = {"data": data, "method": method, "training": HEAD_SETTINGS, "rank": 2}
        found[f"whole {method}"] = realign(model, **given).state_dict()
        with divided():
            found[method] = realign(model, **given).state_dict()
    with divided():
        found["fold"] = realign(model, experts, data, images_at_once=2).heads.state_dict()
        found["start"] = evaluate(model, data, batch_size=4)
        model.provenance = {"realign": {"method": "fold"}}
        for predictions in ("stored", "live"):
            given = {"training": SETTINGS, "hold_out": 0.3, "predictions": predictions}
            trained = realign(model, experts, data, method="distill-encoder", **given)
            found[predictions] = trained.state_dict()
    found["scores"] = evaluate(trained, data)
    save(output, "shard-realigned", found)


if __name__ == "__main__":
    folder, encoder, *jobs = sys.argv[1:]
    in_float32()
    torch.set_num_threads(1)
    distributed.join_processes()
    for job in jobs:
        globals()[job](Path(encoder), Path(folder))
    print(json.dumps({"processes": distributed.processes()}))
