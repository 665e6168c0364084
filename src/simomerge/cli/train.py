"""simomerge train"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from simomerge.cli.options import (
    cache_budget_option,
    check_output,
    checkpointing_option,
    console,
    data_option,
    is_first,
    json_option,
    logs_of,
    output_option,
    overwrite_option,
    say,
    track_option,
)
from simomerge.training.choices import AUGMENTATIONS, WEIGHTINGS
from simomerge.training.settings import TrainSettings, TuneOptions

if TYPE_CHECKING:
    from simomerge.models.model import SimoModel


@dataclass(frozen=True)
class Options:
    """What the command line gives; the help texts below say what each option means."""

    tasks: tuple[str, ...]
    base: str
    data: str
    images: int | None
    val_images: int | None
    head: str
    probe_steps: int
    steps: int
    batch_size: int
    lr: float
    encoder_lr: float
    seed: int
    weighting: str
    augmentation: str
    cache_budget: str | None
    gradient_checkpointing: bool
    trackers: tuple[str, ...]
    output: Path
    overwrite: bool
    as_json: bool

    def probe(self) -> TrainSettings:
        """Settings of the first phase."""
        return TrainSettings(steps=self.probe_steps, batch_size=self.batch_size, lr=2 * self.lr, seed=self.seed)

    def tune(self) -> TrainSettings:
        """Settings of the second phase."""
        return TrainSettings(self.steps, self.batch_size, self.lr, self.encoder_lr, validate_every=50, seed=self.seed)


@click.command("train")
@click.option("--task", "tasks", multiple=True, required=True, help="Task to train; repeat it for a joint model.")
@click.option("--base", default="rooms-base", show_default=True, help="Folder, hub id or rooms-base.")
@data_option
@click.option("--images", type=click.IntRange(1), help="Training images. [default: 1000 rooms; else all]")
@click.option("--val-images", type=click.IntRange(1), help="Images for early stopping. [default: 256; else all]")
@click.option("--head", type=click.Choice(["linear", "dpt"]), default="linear", show_default=True)
@click.option("--probe-steps", type=click.IntRange(1), default=200, show_default=True, help="Steps of the heads alone.")
@click.option("--steps", type=click.IntRange(1), default=200, show_default=True, help="Steps of encoder and heads.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Peak learning rate of the heads.")
@click.option("--encoder-lr", type=float, default=3e-4, show_default=True, help="Peak learning rate of the encoder.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--weighting",
    type=click.Choice(list(WEIGHTINGS)),
    default="equal",
    show_default=True,
    help="How a joint model's losses are combined.",
)
@click.option(
    "--augmentation",
    type=click.Choice(list(AUGMENTATIONS)),
    default="flip",
    show_default=True,
    help="Augmentation while encoder and heads are tuned; the last is the paper's.",
)
@cache_budget_option
@checkpointing_option
@track_option
@output_option()
@overwrite_option
@json_option
def command(**given: Any) -> None:
    """LP-FT: train the heads on the frozen encoder first, then both together. A killed run resumes."""
    options = Options(**given)
    check_output(options.output, options.overwrite)
    from simomerge.core.distributed import join_processes
    from simomerge.datasets import load_data
    from simomerge.training.tracking import track

    join_processes()
    train = load_data(options.data, split="train", count=options.images, tasks=options.tasks)
    validation = load_data(options.data, split="val", count=options.val_images, tasks=options.tasks)
    work = options.output.parent / f"{options.output.name}.work"
    with track(options.trackers, logs_of(options.output)), console():
        model, log = _trained(options, train, validation, work)
    if is_first():  # under torchrun all processes have the same model
        model.save_pretrained(options.output, options.overwrite)
        shutil.rmtree(work, ignore_errors=True)
    done = {"steps": log.steps, "losses": log.losses, "seconds": log.seconds}
    say(
        options.as_json,
        {"output": str(options.output), "tasks": list(options.tasks), **done},
        f"Trained {', '.join(options.tasks)}: {log.steps} steps in {log.seconds:.0f} s, losses "
        + ", ".join(f"{name} {value:.4f}" for name, value in log.losses.items()),
        f"Model: {options.output}",
        f"Next: simomerge evaluate {options.output} --data {options.data}",
    )


def _trained(options: Options, train: Any, validation: Any, work: Path) -> tuple[SimoModel, Any]:
    """The trained model with its provenance, and the log of the second phase."""
    from simomerge.checkpoints import parse_size
    from simomerge.models.model import SimoModel, load
    from simomerge.recipes.recipe import ROOMS_HEADS
    from simomerge.training.lpft import fresh_head, lpft

    encoder = load(options.base).encoder
    head_settings = ROOMS_HEADS[options.head] if options.data == "rooms" else {}
    heads = {
        name: fresh_head(encoder, task, train, options.head, options.seed, **head_settings)
        for name, task in train.tasks.items()
    }
    model = SimoModel(encoder, train.tasks, heads)
    fingerprint = model.encoder_fingerprint()
    probe, tune = options.probe(), options.tune()
    names = {"weighting": options.weighting, "augmentation": options.augmentation}
    how = {"probe": asdict(probe), "tune": asdict(tune), **names}
    # Only the same command resumes a killed one: other settings use another folder.
    contents = [len(train), train.fingerprint(), len(validation), validation.fingerprint()]
    key = json.dumps([fingerprint, options.data, contents, options.tasks, options.head, how])
    logs = lpft(
        model,
        train,
        probe,
        tune,
        validation,
        work / hashlib.sha256(key.encode()).hexdigest()[:12],
        parse_size(options.cache_budget) if options.cache_budget else None,
        TuneOptions(options.weighting, options.augmentation, options.gradient_checkpointing),
    )
    model.provenance = {
        "base": {"source": options.base, "fingerprint": fingerprint},
        "training": {"method": "lp-ft", "data": options.data, "images": len(train), **how},
    }
    return model, logs["tune"]
