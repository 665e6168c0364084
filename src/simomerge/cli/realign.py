"""simomerge realign"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from simomerge.cli.options import (
    check_output,
    console,
    data_option,
    json_option,
    output_option,
    overwrite_option,
    say,
    workers_option,
)


@click.command("realign")
@click.argument("model")
@click.option("--method", type=click.Choice(["heads", "adapters"]), default="heads", show_default=True)
@data_option
@click.option("--split", default="val", show_default=True)
@click.option("--count", type=click.IntRange(1), default=256, show_default=True, help="Labelled images.")
@click.option("--steps", type=click.IntRange(1), help="Optimiser steps (of each head).")
@click.option("--lr", type=float, help="Peak learning rate.")
@click.option("--rank", type=click.IntRange(1), default=16, show_default=True, help="Of the adapters.")
@click.option(
    "--activation", type=click.Choice(["none", "relu"]), default="none", show_default=True, help="Inside the adapters."
)
@click.option("--seed", type=int, default=0, show_default=True)
@output_option()
@overwrite_option
@workers_option
@json_option
def command(
    model: str,
    method: str,
    data: str,
    split: str,
    count: int,
    steps: int | None,
    lr: float | None,
    rank: int,
    activation: str,
    seed: int,
    output: Path,
    overwrite: bool,
    workers: int | None,
    as_json: bool,
) -> None:
    """Re-align the heads of a merged MODEL, alone (heads) or with low-rank adapters in the encoder (adapters).

    Needs labels of every task for a few hundred images: the paper's validation set.
    """
    check_output(output, overwrite)
    from simomerge.datasets import load_data
    from simomerge.devices import available_cores
    from simomerge.model import load
    from simomerge.realignment import ADAPTER_SETTINGS, HEAD_SETTINGS, realign

    settings = replace(HEAD_SETTINGS if method == "heads" else ADAPTER_SETTINGS, seed=seed)
    settings = replace(settings, steps=steps or settings.steps, lr=settings.lr if lr is None else lr)
    merged = load(model)
    labelled = load_data(data, split=split, count=count, tasks=list(merged.tasks))
    options = {"rank": rank, "activation": activation} if method == "adapters" else {}
    if method == "heads":
        options = {"workers": workers or available_cores()}
    with console() as progress:
        result = realign(merged, labelled, method, settings=settings, progress=progress, **options)
    result.save_pretrained(output, overwrite)
    cost = result.provenance["realign"]
    say(
        as_json,
        {"output": str(output), "realign": cost},
        f"Re-aligned {', '.join(result.tasks)} with {method} on {count} labelled images:"
        f" {cost['steps']} steps, {cost['seconds']:.0f} s, {cost['trained_parameters']:,} parameters trained.",
        f"Model: {output}",
        f"Next: simomerge evaluate {output} --data {data} --split test",
    )
