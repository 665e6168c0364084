"""simomerge train"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from simomerge.cli import options
from simomerge.cli.next_step import next_step
from simomerge.cli.output import console, is_first, say
from simomerge.training.choices import AUGMENTATIONS, WEIGHTINGS
from simomerge.training.settings import TrainSettings, TuneOptions

if TYPE_CHECKING:
    from simomerge.models.model import SimoModel


@click.command("train")
@click.option("--task", "tasks", multiple=True, required=True, help="Task to train; repeat it for a joint model.")
@click.option(
    "--base", type=options.place, default="rooms-base", show_default=True, help="Folder, hub id or rooms-base."
)
@options.data
@click.option("--count", type=click.IntRange(1), help="Training images. [default: 1000 rooms; else all]")
@click.option("--val-count", type=click.IntRange(1), help="Images for early stopping. [default: 256; else all]")
@click.option("--head", type=options.Name(["linear", "dpt"]), default="linear", show_default=True)
@click.option("--probe-steps", type=click.IntRange(1), default=200, show_default=True, help="Steps of the heads alone.")
@options.training(steps=200, batch_size=32, lr=1e-3, encoder_lr=3e-4, seed=0)
@click.option(
    "--weighting",
    type=options.Name(list(WEIGHTINGS)),
    default="equal",
    show_default=True,
    help="How a joint model's losses are combined.",
)
@click.option(
    "--augmentation",
    type=options.Name(list(AUGMENTATIONS)),
    default="flip",
    show_default=True,
    help="Augmentation while encoder and heads are tuned; the paper uses the last one.",
)
@options.size_in_bytes("--cache-budget", "Maximum disk space for cached features, such as 20GB.")
@click.option(
    "--gradient-checkpointing", is_flag=True, help="Recompute blocks in the backward pass: less memory, slower."
)
@options.shard
@options.track
@options.precision
@options.trust_code
@options.output()
def command(output: Path, overwrite: bool, as_json: bool, **given: Any) -> None:
    """LP-FT: train the heads on the frozen encoder first, then both together. An interrupted run resumes."""
    from simomerge.core.distributed import join_processes
    from simomerge.core.files import check_apart
    from simomerge.datasets import load_data
    from simomerge.training.sharding import sharded
    from simomerge.training.tracking import track

    check_apart(output, [given["base"]], inside=False)
    join_processes()
    tasks, data = given["tasks"], given["data"]
    work = output.parent / f"{output.name}.work"
    with sharded(given["shard"], given["offload"]), track(given["trackers"], options.logs_of(output)), console():
        train = load_data(data, split="train", count=given["count"], tasks=tasks)
        validation = load_data(data, split="val", count=given["val_count"], tasks=tasks)
        model, log = _trained(given, train, validation, work)
    if is_first():  # Under torchrun, all processes have the same model.
        model.save_pretrained(output, overwrite)
        shutil.rmtree(work, ignore_errors=True)
    done = {"steps": log.steps, "losses": log.losses, "seconds": log.seconds}
    say(
        as_json,
        {"output": str(output), "tasks": list(tasks), **done},
        f"Trained {', '.join(tasks)}: {log.steps} steps in {log.seconds:.0f} s, losses "
        + ", ".join(f"{name} {value:.4f}" for name, value in log.losses.items()),
        f"Model: {output}",
        next_step("evaluate", output, "--data", data),
    )


def _trained(given: dict[str, Any], train: Any, validation: Any, work: Path) -> tuple[SimoModel, Any]:
    """The trained model with its provenance, and the log of the second phase."""
    from simomerge.datasets.load import data_record
    from simomerge.models.fingerprints import encoder_identity
    from simomerge.models.model import SimoModel, load
    from simomerge.recipes.demo import ROOMS_HEADS
    from simomerge.training.familiarity import training_images
    from simomerge.training.lpft import fresh_head, lpft

    seed, data = given["seed"], given["data"]
    base = load(given["base"])
    origin, encoder = base.origin(), base.encoder
    head_settings = ROOMS_HEADS[given["head"]] if data == "rooms" else {}
    heads = {
        name: fresh_head(encoder, task, train, given["head"], seed, **head_settings)
        for name, task in train.tasks.items()
    }
    model = SimoModel(encoder, train.tasks, heads)
    common = {"batch_size": given["batch_size"], "seed": seed}
    probe = TrainSettings(steps=given["probe_steps"], lr=2 * given["lr"], **common)
    tune = TrainSettings(given["steps"], lr=given["lr"], encoder_lr=given["encoder_lr"], validate_every=50, **common)
    names = {"weighting": given["weighting"], "augmentation": given["augmentation"]}
    how = {"probe": asdict(probe), "tune": asdict(tune), **names}
    # Only the same command resumes an interrupted run; other settings use another folder.
    contents = [len(train), train.fingerprint(), len(validation), validation.fingerprint()]
    key = json.dumps([encoder_identity(encoder), data, contents, given["tasks"], given["head"], how])
    folder = work / hashlib.sha256(key.encode()).hexdigest()[:12]
    tuning = TuneOptions(**names, checkpointing=given["gradient_checkpointing"])
    logs = lpft(model, train, probe, tune, validation, folder, given["cache_budget"], tuning)
    model.provenance = {
        "base": origin,
        "training": {"method": "lp-ft", **data_record(data), **training_images(model, train), **how},
    }
    return model, logs["tune"]
