"""simomerge train"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

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


@click.command("train")
@click.option("--task", "tasks", multiple=True, required=True, help="Task to train; repeat it for a joint model.")
@click.option("--base", default="rooms-base", show_default=True, help="Folder, hub id or rooms-base.")
@data_option
@click.option("--images", type=click.IntRange(1), help="Training images. [default: 1000 rooms; else all]")
@click.option("--val-images", type=click.IntRange(1), help="Images that stop the training. [default: 256; else all]")
@click.option("--head", type=click.Choice(["linear", "dpt"]), default="linear", show_default=True)
@click.option("--probe-steps", type=click.IntRange(1), default=200, show_default=True, help="Steps of the heads alone.")
@click.option("--steps", type=click.IntRange(1), default=200, show_default=True, help="Steps of encoder and heads.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Peak learning rate of the heads.")
@click.option("--encoder-lr", type=float, default=3e-4, show_default=True, help="Peak learning rate of the encoder.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--weighting",
    type=click.Choice(["equal", "uncertainty", "dwa", "random", "gradnorm", "pcgrad", "cagrad", "nash"]),
    default="equal",
    show_default=True,
    help="Of a joint model's losses.",
)
@click.option(
    "--augmentation",
    type=click.Choice(["none", "flip", "scale-crop-flip"]),
    default="flip",
    show_default=True,
    help="Of the images that encoder and heads are tuned on; the last is the paper's.",
)
@cache_budget_option
@checkpointing_option
@track_option
@output_option()
@overwrite_option
@json_option
def command(
    tasks: tuple[str, ...],
    base: str,
    data: str,
    images: int | None,
    val_images: int | None,
    head: str,
    probe_steps: int,
    steps: int,
    batch_size: int,
    lr: float,
    encoder_lr: float,
    seed: int,
    weighting: str,
    augmentation: str,
    cache_budget: str | None,
    gradient_checkpointing: bool,
    trackers: tuple[str, ...],
    output: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    """LP-FT: heads on the frozen encoder first, then both together. A killed run goes on where it was."""
    check_output(output, overwrite)
    from simomerge.core.distributed import join_processes

    join_processes()
    import hashlib
    import json
    import shutil

    from simomerge.checkpoints import parse_size
    from simomerge.datasets import load_data
    from simomerge.models.model import SimoModel, load
    from simomerge.recipes.recipe import ROOMS_HEADS
    from simomerge.training.lpft import fresh_head, lpft
    from simomerge.training.settings import TrainSettings
    from simomerge.training.tracking import track

    train = load_data(data, split="train", count=images, tasks=tasks)
    validation = load_data(data, split="val", count=val_images, tasks=tasks)
    foundation = load(base)
    settings = ROOMS_HEADS[head] if data == "rooms" else {}
    heads = {
        name: fresh_head(foundation.encoder, task, train, head, seed, **settings) for name, task in train.tasks.items()
    }
    model = SimoModel(foundation.encoder, train.tasks, heads)
    fingerprint = model.encoder_fingerprint()
    probe = TrainSettings(steps=probe_steps, batch_size=batch_size, lr=2 * lr, seed=seed)
    tune = TrainSettings(steps=steps, batch_size=batch_size, lr=lr, encoder_lr=encoder_lr, seed=seed, validate_every=50)
    budget = parse_size(cache_budget) if cache_budget else None
    work = output.parent / f"{output.name}.work"
    # Only the very same command goes on from a killed one: other settings have a folder of their own.
    read = [len(train), train.fingerprint(), len(validation), validation.fingerprint()]
    everything = [fingerprint, data, read, tasks, head, weighting, augmentation, asdict(probe), asdict(tune)]
    key = hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:12]
    with track(trackers, logs_of(output)), console():
        logs = lpft(
            *(model, train, probe, tune, validation, work / key),
            cache_budget=budget,
            checkpointing=gradient_checkpointing,
            weighting=weighting,
            augmentation=augmentation,
        )
    model.provenance = {
        "base": {"source": base, "fingerprint": fingerprint},
        "training": {
            "method": "lp-ft",
            "data": data,
            "images": len(train),
            "probe": asdict(probe),
            "tune": asdict(tune),
            "weighting": weighting,
            "augmentation": augmentation,
        },
    }
    if is_first():  # under torchrun all have the same model
        model.save_pretrained(output, overwrite)
        shutil.rmtree(work, ignore_errors=True)
    log = logs["tune"]
    say(
        as_json,
        {"output": str(output), "tasks": list(tasks), "steps": log.steps, "losses": log.losses, "seconds": log.seconds},
        f"Trained {', '.join(tasks)}: {log.steps} steps in {log.seconds:.0f} s, losses "
        + ", ".join(f"{name} {value:.4f}" for name, value in log.losses.items()),
        f"Model: {output}",
        f"Next: simomerge evaluate {output} --data {data}",
    )
