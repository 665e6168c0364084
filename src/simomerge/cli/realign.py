"""simomerge realign"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from simomerge.cli.options import (
    cache_budget_option,
    check_output,
    checkpointing_option,
    console,
    data_option,
    images_option,
    is_first,
    json_option,
    logs_of,
    output_option,
    overwrite_option,
    parse_pairs,
    say,
    size_option,
    track_option,
    workers_option,
)
from simomerge.core.errors import InputError

_LABELLED = ("heads", "adapters", "lora")
"""Methods that learn from labels: the keys of `simomerge.assembly.realign.WITH_LABELS`, which imports torch."""


@click.command("realign")
@click.argument("model")
@click.argument("experts", nargs=-1, metavar="[TASK=EXPERT]...")
@click.option("--method", type=click.Choice(["fold", "distill", *_LABELLED]), default="fold", show_default=True)
@images_option
@size_option
@click.option("--count", type=click.IntRange(1), help="Images: 64 to fold, 256 by default for all else.")
@click.option(
    "--variant",
    type=click.Choice(["per-tap", "cross-tap"]),
    help="Of the fold: the same shapes, or every tap repaired from all. [default: per-tap; cross-tap under distill]",
)
@click.option("--ridge", type=float, help="Of the fold, in units of the mean variance; chosen by default.")
@click.option("--with-adapters", is_flag=True, help="distill: train adapters in the encoder as well.")
@click.option("--with-lora", is_flag=True, help="distill: train LoRA in the encoder as well, and fold it.")
@data_option
@click.option("--split", default="val", show_default=True, help="Of the data.")
@click.option("--steps", type=click.IntRange(1), help="Optimiser steps (of each head).")
@click.option("--lr", type=float, help="Peak learning rate.")
@click.option("--rank", type=click.IntRange(1), default=16, show_default=True, help="Of the adapters or LoRA.")
@click.option("--alpha", type=float, help="Of lora: its change is scaled by alpha / rank. [default: the rank]")
@click.option(
    "--activation", type=click.Choice(["none", "relu"]), default="none", show_default=True, help="Inside the adapters."
)
@click.option("--last-blocks", type=click.IntRange(1), help="Adapters beside the last so many blocks only.")
@click.option("--seed", type=int, default=0, show_default=True)
@cache_budget_option
@checkpointing_option
@output_option()
@overwrite_option
@workers_option
@track_option
@json_option
def command(
    model: str,
    experts: tuple[str, ...],
    method: str,
    images: str | None,
    size: str | None,
    count: int | None,
    variant: str | None,
    ridge: float | None,
    with_adapters: bool,
    with_lora: bool,
    data: str,
    split: str,
    steps: int | None,
    lr: float | None,
    rank: int,
    alpha: float | None,
    activation: str,
    last_blocks: int | None,
    seed: int,
    cache_budget: str | None,
    gradient_checkpointing: bool,
    output: Path,
    overwrite: bool,
    workers: int | None,
    trackers: tuple[str, ...],
    as_json: bool,
) -> None:
    """Re-align the heads of a merged MODEL.

    \b
    Without labels, from its EXPERTs' behaviour on a folder of images:
      fold       in closed form, in seconds; nothing is trained, no parameter added
      distill    heads (and adapters or LoRA) trained to predict what the experts predict, from the fold
    With labels of every task (--data):
      heads      the paper's first re-alignment
      adapters   the paper's second: low-rank adapters in the encoder, with the heads
      lora       LoRA in the encoder's linear layers, with the heads; folded, so the encoder stays plain

    \b
    simomerge realign runs/scene depth=runs/depth normals=runs/normals --images photos/ -o runs/folded
    """
    check_output(output, overwrite)
    named = parse_pairs(experts)
    labelled = method in _LABELLED
    _check_given(method, named, images, labelled)
    _check_options(method, with_adapters, with_lora)
    from simomerge.assembly.experts import load_experts
    from simomerge.assembly.realign import realign
    from simomerge.core.distributed import join_processes
    from simomerge.models.model import load
    from simomerge.training.tracking import track

    join_processes()
    count = count or (64 if method == "fold" else 256)
    merged = load(model)
    given: dict[str, Any] = {}
    if labelled:
        from simomerge.datasets import load_data

        given["data"] = load_data(data, split=split, count=count, tasks=list(merged.tasks))
    else:
        from simomerge.datasets.pictures import as_images

        given |= {"experts": load_experts(**named), "images": as_images(images, count, size)}
    inside: Any = "lora" if with_lora else with_adapters
    options = _options(method, steps, lr, seed, rank, alpha, activation, inside, variant, ridge, workers)
    options |= _memory_options(method, last_blocks, cache_budget, gradient_checkpointing)
    with track(trackers, logs_of(output)), console():
        result = realign(merged, method=method, **given, **options)
    if is_first():  # under torchrun all have the same model
        result.save_pretrained(output, overwrite)
    record = result.provenance["realign"]
    say(
        as_json,
        {"output": str(output), "realign": record},
        *_lines(record, list(result.tasks)),
        f"Model: {output}",
        f"Next: simomerge evaluate {output} --data {data} --split test",
    )


def _check_given(method: str, experts: dict[str, str], images: str | None, labelled: bool) -> None:
    if labelled and (experts or images):
        raise InputError(f"--method {method} learns from the labels of --data; leave the experts and --images out.")
    if not labelled and images is None:
        raise InputError(f"--method {method} looks at images without labels: give --images FOLDER.")
    if not labelled and not experts:
        raise InputError(f"--method {method} learns from the experts: give each as TASK=EXPERT.")


_ONLY_FOR = {
    "variant": ("fold", "distill"),
    "ridge": ("fold",),
    "with_adapters": ("distill",),
    "with_lora": ("distill",),
    "size": ("fold", "distill"),
    "data": _LABELLED,
    "split": _LABELLED,
    "steps": ("distill", *_LABELLED),
    "lr": ("distill", *_LABELLED),
    "seed": ("distill", *_LABELLED),
    "workers": ("distill", "heads"),
    "rank": ("distill", "adapters", "lora"),
    "alpha": ("lora",),
    "activation": ("distill", "adapters"),
    "last_blocks": ("adapters",),
    "cache_budget": ("heads",),
    "gradient_checkpointing": ("adapters", "lora"),
    "trackers": ("distill", *_LABELLED),
}
"""Options that some methods have no use for."""


def _memory_options(
    method: str, last_blocks: int | None, cache_budget: str | None, gradient_checkpointing: bool
) -> dict[str, Any]:
    """Keyword arguments by which large encoders fit."""
    from simomerge.checkpoints import parse_size

    options: dict[str, Any] = {"last_blocks": last_blocks} if last_blocks else {}
    options |= {"cache_budget": parse_size(cache_budget)} if cache_budget else {}
    return options | ({"checkpointing": True} if gradient_checkpointing else {})


def _check_options(method: str, with_adapters: bool, with_lora: bool) -> None:
    """An option that would be ignored is refused."""
    context = click.get_current_context()
    if with_adapters and with_lora:
        raise InputError("--with-adapters and --with-lora exclude each other; give one of them.")
    for name, methods in _ONLY_FOR.items():
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE and method not in methods:
            option = "track" if name == "trackers" else name.replace("_", "-")
            raise InputError(f"--{option} does nothing under --method {method}; leave it out.")
    useless = {} if with_adapters else {"activation": "adapters: give --with-adapters"}
    if not with_adapters and not with_lora:
        useless["rank"] = "adapters or LoRA: give --with-adapters or --with-lora"
    for name, mend in useless.items() if method == "distill" else ():
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            raise InputError(f"--{name} is of {mend}, or leave it out.")


def _options(
    method: str,
    steps: int | None,
    lr: float | None,
    seed: int,
    rank: int,
    alpha: float | None,
    activation: str,
    inside: bool | str,
    variant: str | None,
    ridge: float | None,
    workers: int | None,
) -> dict[str, Any]:
    """The keyword arguments of one re-alignment; ``inside``: what distillation trains in the encoder."""
    from simomerge.assembly.realign import ADAPTER_SETTINGS, DISTILL_SETTINGS, HEAD_SETTINGS, LORA_SETTINGS
    from simomerge.core.machine import available_cores

    options: dict[str, Any] = {"variant": variant} if variant else {}
    if method == "fold":
        return options | ({} if ridge is None else {"ridge": ridge})
    defaults = {
        "heads": HEAD_SETTINGS,
        "adapters": ADAPTER_SETTINGS,
        "lora": LORA_SETTINGS,
        "distill": DISTILL_SETTINGS,
    }
    settings = defaults[method]
    settings = replace(settings, seed=seed, steps=steps or settings.steps, lr=settings.lr if lr is None else lr)
    options = options if method == "distill" else {}
    options["settings"] = settings
    if method == "adapters" or inside:
        options |= {"rank": rank, "activation": activation}
    if method == "lora":
        options |= {"rank": rank, "alpha": alpha}
    if method == "distill":
        options["adapters"] = inside
    if method in ("heads", "distill"):
        options["workers"] = workers or available_cores()
    return options


def _lines(record: dict[str, Any], tasks: list[str]) -> list[str]:
    """What was done, for people."""
    unlabelled = record.get("unlabelled_images", 0)
    seen = f"{unlabelled} unlabelled" if unlabelled else f"{record['labelled_images']} labelled"
    lines = [
        f"Re-aligned {', '.join(tasks)} by {record['method']} on {seen} images: {record['steps']} steps,"
        f" {record['seconds']:.1f} s, {record['trained_parameters']:,} parameters trained."
    ]
    for task, after in record.get("r2", {}).items():
        before, ridge = record["r2_before"][task], record["ridge"][task]
        if after is not None:
            lines.append(
                f"  {task:<14} R2 of the head's input on held-out images {before:.3f} -> {after:.3f}, ridge {ridge:g}"
                if ridge != "none"
                else f"  {task:<14} left as it was: no map did better on held-out images"
            )
    return lines
