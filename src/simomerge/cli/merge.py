"""simomerge merge"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from simomerge.cli.options import (
    check_output,
    console,
    data_option,
    images_option,
    json_option,
    output_option,
    overwrite_option,
    parse_pairs,
    parse_parameters,
    parse_value,
    say,
    size_option,
)
from simomerge.core.errors import InputError

_FILES = (".safetensors", ".pt", ".pth", ".bin")


@click.command("merge")
@click.argument("base")
@click.argument("experts", nargs=-1, required=True, metavar="TASK=EXPERT...")
@click.option(
    "--method",
    default="task-arithmetic",
    show_default=True,
    help="See `simomerge methods`; 'auto' tries some on --images and folds the best.",
)
@click.option("-p", "--parameter", "parameters", multiple=True, metavar="KEY=VALUE", help="Parameter of the method.")
@click.option(
    "--scale",
    help="Of the merged task vector: a number, TASK:NUMBER,... or, chosen on images, 'auto' or 'learned' (one per"
    " expert and block).",
)
@click.option("--schedule", help="Factors over the depth: 0.2,0.5,1 or lines or lines:beta=0.3.")
@click.option("--dtype", help="Storage: float32, float16 or bfloat16; as the base's by default.")
@click.option("--max-shard-size", metavar="S", help="Split larger weights, such as 2GB; one file by default.")
@images_option
@size_option
@data_option
@click.option(
    "--count", type=click.IntRange(1), help="Images to choose on: 256 labelled ones, or 64 without labels, by default."
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
    images: str | None,
    size: str | None,
    data: str,
    count: int | None,
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
    simomerge merge rooms-base depth=runs/depth normals=runs/normals --method auto --images photos/ -o runs/scene
    simomerge merge base.safetensors a=a.safetensors b=b.safetensors -o merged.safetensors
    """
    check_output(output, overwrite)
    named, chosen = parse_pairs(experts), parse_parameters(parameters)
    from simomerge.checkpoints import parse_size
    from simomerge.core.assets import resolve_source
    from simomerge.merging import as_schedule, available, get_method

    limit = parse_size(max_shard_size) if max_shard_size else None
    searched = scale in ("auto", "learned")
    if scale is not None and not searched:
        chosen["scale"] = parse_value(scale)
        if isinstance(chosen["scale"], str):
            raise InputError(f"--scale {scale}: give a number, TASK:NUMBER,..., 'auto' or 'learned'.")
    if (method == "auto" or scale == "learned") and images is None:
        what = "--method auto" if method == "auto" else "--scale learned"
        raise InputError(f"{what} looks at images without labels: give --images FOLDER.")
    # A misspelt name or parameter is told before anything is read.
    if method != "auto":
        get_method(method, **{**chosen, "scale": 1.0} if searched else chosen)
    as_schedule(schedule)
    on_images = searched or method == "auto" or available()[method].needs_data or available()[method].needs_labels
    if on_images and (bare := [path for path in (base, *named.values()) if Path(path).suffix in _FILES]):
        what = f"--scale {scale}" if searched else method
        raise InputError(f"{bare[0]} is a weight file, and {what} computes with images: give folders with config.json.")
    # What is neither here nor named as a file may be on a hub.
    if on_images or not (Path(resolve_source(base)).exists() or Path(base).suffix in _FILES):
        if schedule or dtype or limit or output.suffix == ".safetensors":
            raise InputError(
                "a weight file as OUT, --schedule, --dtype and --max-shard-size go with a plain merge: no images, and"
                " a base on disk."
            )
        source = _Images(images, size, data, count) if on_images else None
        made, tasks = _merge_models(base, named, method, scale if searched else None, chosen, source, output, overwrite)
    else:
        made, tasks = _merge_files(base, named, method, chosen, schedule, dtype, limit, output, overwrite)
    details = ", ".join(f"{key} {value}" for key, value in made.items() if key not in ("method", "tried"))
    tried = [f"  tried {_trial(trial)}" for trial in made.get("tried", [])]
    folded = method == "auto"
    next_step = f"simomerge realign {output} {' '.join(experts)} --images FOLDER -o {output}-folded"
    after = f"Next: {next_step}   (the heads no longer fit)"
    say(
        as_json,
        {"output": str(output), "tasks": list(tasks), "merge": made},
        *tried,
        f"Merged {', '.join(named)} by {made['method']}" + (f" ({details})." if details else "."),
        *(["Its heads are folded: they fit."] if folded else []),
        f"{'Model' if tasks else 'Weights'}: {output}",
        (f"Next: simomerge evaluate {output} --data {data}" if folded else after)
        if tasks
        else f"Next: simomerge diff {base} {output}   (how far it is from the base)",
    )


def _trial(trial: dict[str, Any]) -> str:
    """One merge that was tried, in a line."""
    scale = trial.get("scale")
    shown = " scale learned" if isinstance(scale, dict) else f" scale {scale:g}" if scale is not None else ""
    schedule = f" {trial['schedule']}" if trial.get("schedule") else ""
    return f"{trial['method']}{schedule}{shown}: alignment {trial['alignment']:.3f}"


@dataclass(frozen=True)
class _Images:
    """What a choice looks at: a folder without labels, or else a dataset."""

    folder: str | None
    size: str | None
    data: str
    count: int | None

    def arguments(self, tasks: list[str]) -> dict[str, Any]:
        """Of `simomerge.merge`."""
        if self.folder is not None:
            from simomerge.datasets.pictures import as_images

            return {"images": as_images(self.folder, None, self.size), "count": self.count}
        from simomerge.datasets import load_data

        return {"validation": load_data(self.data, split="val", count=self.count or 256, tasks=tasks)}


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
    from simomerge.merging.disk.merge import merge_on_disk
    from simomerge.merging.disk.output import Output

    with console():
        target = Output(output, dtype, limit, overwrite)
        result = merge_on_disk(base, experts, target, method, schedule, **parameters)
    return result.merge, result.tasks


def _merge_models(
    base: str,
    experts: dict[str, str],
    method: str,
    scale: str | None,
    parameters: dict[str, Any],
    source: _Images | None,
    output: Path,
    overwrite: bool,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """With the models in memory, where images take part or the base is on a hub."""
    from simomerge.assembly.experts import load_experts
    from simomerge.assembly.merge import merge
    from simomerge.models.model import load

    foundation, loaded = load(base), load_experts(**experts)
    given = source.arguments(list(experts)) if source else {}
    with console():
        model = merge(
            foundation,
            loaded,
            method,
            scale=scale if scale is not None else parameters.pop("scale", None),
            **given,
            **parameters,
        )
    model.save_pretrained(output, overwrite)
    return model.provenance["merge"], tuple(model.tasks)
