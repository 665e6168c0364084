"""simomerge merge"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from simomerge.cli.options import (
    check_output,
    console,
    data_option,
    json_option,
    output_option,
    overwrite_option,
    parse_pairs,
    parse_parameters,
    parse_value,
    say,
)
from simomerge.errors import InputError

_FILES = (".safetensors", ".pt", ".pth", ".bin")


@click.command("merge")
@click.argument("base")
@click.argument("experts", nargs=-1, required=True, metavar="TASK=EXPERT...")
@click.option("--method", default="task-arithmetic", show_default=True, help="See `simomerge methods`.")
@click.option("-p", "--parameter", "parameters", multiple=True, metavar="KEY=VALUE", help="Parameter of the method.")
@click.option(
    "--scale",
    help="Of the merged task vector: a number, TASK:NUMBER,... or 'auto' (needs labelled validation data).",
)
@click.option("--schedule", help="Factors over the depth: 0.2,0.5,1 or lines or lines:beta=0.3.")
@click.option("--dtype", help="Storage: float32, float16 or bfloat16; as the base's by default.")
@click.option("--max-shard-size", metavar="S", help="Split larger weights, such as 2GB; one file by default.")
@data_option
@click.option(
    "--count", type=click.IntRange(1), default=256, show_default=True, help="Images for --scale auto, regmean, fisher."
)
@output_option()
@overwrite_option
@json_option
def command(
    base: str,
    experts: tuple[str, ...],
    method: str,
    parameters: tuple[str, ...],
    scale: str | None,
    schedule: str | None,
    dtype: str | None,
    max_shard_size: str | None,
    data: str,
    count: int,
    output: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Merge the EXPERTs' encoders, fine-tuned from BASE, into one model with all their heads.

    BASE and EXPERTs are model folders, transformers folders, weight files (.safetensors, .pt, .bin) or, experts
    only, peft LoRA adapters. Where not every EXPERT is a model folder, or OUT ends in .safetensors, only weights
    are merged.

    \b
    simomerge merge rooms-base depth=runs/depth normals=runs/normals --method ties --scale 0.4 -o runs/scene
    simomerge merge base.safetensors a=a.safetensors b=b.safetensors -o merged.safetensors
    """
    check_output(output, overwrite)
    named, chosen = parse_pairs(experts), parse_parameters(parameters)
    from simomerge.assets import resolve_source
    from simomerge.checkpoints import parse_size
    from simomerge.merging import as_schedule, available, get_method

    limit = parse_size(max_shard_size) if max_shard_size else None
    if scale not in (None, "auto"):
        chosen["scale"] = parse_value(scale or "")
        if isinstance(chosen["scale"], str):
            raise InputError(f"--scale {scale}: give a number, TASK:NUMBER,... or 'auto'.")
    # A misspelt name or parameter is told before anything is read.
    get_method(method, **{**chosen, "scale": 1.0} if scale == "auto" else chosen)
    as_schedule(schedule)
    on_models = scale == "auto" or available()[method].needs_data or available()[method].needs_labels
    if on_models and (bare := [path for path in (base, *named.values()) if Path(path).suffix in _FILES]):
        what = "--scale auto" if scale == "auto" else method
        raise InputError(f"{bare[0]} is a weight file, and {what} computes with images: give folders with config.json.")
    # What is neither here nor named as a file may be on a hub.
    if on_models or not (Path(resolve_source(base)).exists() or Path(base).suffix in _FILES):
        if schedule or dtype or limit or output.suffix == ".safetensors":
            raise InputError(
                "a weight file as OUT, --schedule, --dtype and --max-shard-size go with a plain merge: no images, and"
                " a base on disk."
            )
        needed = (data, count) if on_models else None
        made, tasks = _merge_models(base, named, method, scale, chosen, needed, output, overwrite)
    else:
        made, tasks = _merge_files(base, named, method, chosen, schedule, dtype, limit, output, overwrite)
    details = ", ".join(f"{key} {value}" for key, value in made.items() if key != "method")
    next_step = f"simomerge realign {output} --data {data} -o {output}-realigned   (the heads no longer fit)"
    say(
        as_json,
        {"output": str(output), "tasks": list(tasks), "merge": made},
        f"Merged {', '.join(named)} by {made['method']}" + (f" ({details})." if details else "."),
        f"{'Model' if tasks else 'Weights'}: {output}",
        f"Next: {next_step}" if tasks else f"Next: simomerge diff {base} {output}   (how far it is from the base)",
    )


def _merge_files(
    base: str,
    experts: dict[str, str],
    method: str,
    parameters: dict[str, Any],
    schedule: str | None,
    dtype: str | None,
    limit: int | None,
    output: Path,
    overwrite: bool,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """From disk to disk, without torch."""
    from simomerge.ondisk.merge import merge_on_disk

    with console() as progress:
        result = merge_on_disk(
            base,
            experts,
            output,
            method,
            schedule=schedule,
            dtype=dtype,
            max_shard_size=limit,
            overwrite=overwrite,
            progress=progress,
            **parameters,
        )
    return result.merge, result.tasks


def _merge_models(
    base: str,
    experts: dict[str, str],
    method: str,
    scale: str | None,
    parameters: dict[str, Any],
    data: tuple[str, int] | None,
    output: Path,
    overwrite: bool,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """With the models in memory, where images take part (``data``: their name and number) or the base is on a hub."""
    from simomerge.assemble import load_experts, merge
    from simomerge.datasets import load_data
    from simomerge.model import load

    foundation, loaded = load(base), load_experts(**experts)
    images = load_data(data[0], split="val", count=data[1], tasks=list(experts)) if data else None
    with console() as progress:
        model = merge(
            foundation,
            loaded,
            method,
            scale="auto" if scale == "auto" else parameters.pop("scale", None),
            validation=images,
            progress=progress,
            **parameters,
        )
    model.save_pretrained(output, overwrite)
    return model.provenance["merge"], tuple(model.tasks)
