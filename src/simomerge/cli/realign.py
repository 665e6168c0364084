"""simomerge realign"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field
from operator import attrgetter
from pathlib import Path
from textwrap import wrap
from typing import Any

import click
from click.core import ParameterSource

from simomerge.assembly.realign import Realignment, get_realignment, methods, realignments
from simomerge.assembly.realign.method import TrainedRealignment, realignment_rows
from simomerge.cli import options
from simomerge.cli.next_step import judge_step, realign_step
from simomerge.cli.output import console, is_first, say
from simomerge.core.errors import InputError
from simomerge.core.registry import settings

_EVERY = ("work", "method", "count", "output", "overwrite", "as_json", "model", "experts")
"""Options and arguments that every re-alignment accepts, although some check `experts`."""


def _parameter_options() -> options.Decorator:
    """One option per parameter of the registered re-alignments, with the help text of each method that has it."""
    found: dict[str, dict[str, Field[Any]]] = {}
    for name, method in methods().items():
        for spec in settings(method):
            if spec.name != "count":  # It has its own option.
                found.setdefault(spec.name, {})[name] = spec
    return options.together(
        *(options.from_parameter(next(iter(specs.values())), _text(specs)) for specs in found.values())
    )


def _text(specs: dict[str, Field[Any]]) -> str:
    """What a parameter does in each method that has it: methods with the same text and default share one sentence."""
    methods_of: dict[str, list[str]] = {}
    for name, spec in specs.items():
        default = "" if spec.default is None or spec.default is False else f" (default {spec.default})"
        methods_of.setdefault(f"{spec.metadata['help'].rstrip('.')}{default}.", []).append(name)
    return " ".join(f"{', '.join(names)}: {text[0].lower()}{text[1:]}" for text, names in methods_of.items())


def _help() -> str:
    lines = ["Re-align the heads of a merged MODEL.", ""]
    for needs, title in (
        ("experts", "Without labels, from the behaviour of its EXPERTs on a folder of images:"),
        ("labelled", "With labels of every task (--data):"),
    ):
        lines += ["\b", title]
        for row in realignment_rows():
            if row["needs"].startswith(needs):
                lines += wrap(row["summary"], 78, initial_indent=f"  {row['name']:<17} ", subsequent_indent=" " * 20)
        lines += [""]
    example = "simomerge realign runs/scene depth=runs/depth normals=runs/normals --images photos/ -o runs/folded"
    return "\n".join([*lines, "\b", example])


def _default(value: Callable[[Any], Any], named: Mapping[str, Realignment]) -> str:
    """A default by method: most methods have the same."""
    found: dict[Any, list[str]] = {}
    for name, method in named.items():
        found.setdefault(value(method), []).append(name)
    usual = max(found, key=lambda each: len(found[each]))
    others = [f"{each:g} for {', '.join(names)}" for each, names in sorted(found.items()) if each != usual]
    return f"[default: {'; '.join([*others, 'else ' * bool(others) + f'{usual:g}'])}]"


def _training_defaults() -> dict[str, str]:
    """The defaults of steps, batch size and learning rate, as notes to the help texts."""
    trained = {name: method for name, method in realignments().items() if isinstance(method, TrainedRealignment)}
    return {key: _default(attrgetter(f"training.{key}"), trained) for key in ("steps", "batch_size", "lr")}


@click.command("realign", help=_help())
@options.first("model", "the model that the experts were merged into")
@options.some_experts
@click.option("--method", type=options.Name(list(realignments())), default="fold", show_default=True)
@options.pictures
@click.option("--base", type=options.place, help="The foundation encoder: a folder, a hub id or rooms-base.")
@options.data
@options.split
@click.option(
    "--count",
    type=click.IntRange(1),
    help=f"Number of images. {_default(attrgetter('default_count'), realignments())}",
)
@_parameter_options()
@options.training(_training_defaults())
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Folder for the state of the work. After an interruption, the same command with the same folder goes on.",
)
@options.workers
@options.shard
@options.track
@options.precision
@options.trust_code
@options.output()
def command(model: str, experts: dict[str, str], method: str, output: Path, as_json: bool, **given: Any) -> None:
    chosen = _chosen(method)
    _check_inputs(method, chosen, experts, given)
    import torch

    from simomerge.assembly.realign import realign
    from simomerge.checkpoints.card import learned_rooms
    from simomerge.core.distributed import join_processes
    from simomerge.core.files import check_apart
    from simomerge.core.machine import available_cores, compute_device
    from simomerge.models.model import load
    from simomerge.training.sharding import sharded
    from simomerge.training.tracking import track

    check_apart(output, [*experts.values(), *([given["base"]] if given["base"] else [])])
    if chosen.teacher != "labels":
        options.check_images(given["images"])
    join_processes()
    options.note_images(given["images"], given["count"])
    with sharded(given["shard"], given["offload"]), track(given["trackers"], options.logs_of(output)), console():
        # With --shard, the whole model stays in the memory of the CPU, and each GPU holds its share.
        device = torch.device("cpu") if given["shard"] else compute_device()
        merged = load(model).to(device)
        if chosen.teacher == "labels":
            options.note_rooms(learned_rooms(merged.provenance))
        inputs = _inputs(chosen, experts, list(merged.tasks), given)
        for expert in inputs.get("experts", {}).values():
            expert.to(device)
        inputs |= {"base": load(given["base"]).to(device)} if chosen.needs_base else {}
        workers = given["workers"] or (1 if device.type == "cuda" else available_cores())
        result = realign(merged, **inputs, method=chosen, work_folder=given["work"], workers=workers)
    if is_first():  # Under torchrun, all processes have the same model.
        result.save_pretrained(output, given["overwrite"])
    record = result.provenance["realign"]
    say(
        as_json,
        {"output": str(output), "realign": record},
        *_lines({**record, "method": method}, list(result.tasks), getattr(chosen, "ridge", None)),
        f"Model: {output}",
        judge_step(output, experts, given["data"] if "data" in inputs else given["images"])
        if chosen.changes_heads
        else realign_step(output, experts, "", given["images"]),
    )


def _chosen(method: str) -> Realignment:
    """The re-alignment with the parameters from the command line. Rejects every option that it does not use."""
    context = click.get_current_context()
    from_user = {  # without --quiet, --precision and --trust-code, which every command handles by itself
        str(option.name): option
        for option in context.command.params
        if option.expose_value and context.get_parameter_source(str(option.name)) == ParameterSource.COMMANDLINE
    }
    kind = realignments()[method]
    trained = isinstance(kind, TrainedRealignment)
    parameters = {spec.name for spec in settings(kind)} - {"count"} | set(options.TRAINING if trained else ())
    chosen = get_realignment(method, **{name: context.params[name] for name in from_user if name in parameters})
    used = {*_EVERY, "split", *parameters, *(("data",) if chosen.teacher == "labels" else ("images", "size"))}
    used |= {"base"} if chosen.needs_base else set()
    used |= {"trackers"} if trained else set()
    if "checkpointing" in parameters and not chosen.trains_heads_apart:  # it trains the encoder, or inside it
        used |= {"shard", "offload"}
    used |= {"workers"} if chosen.trains_heads_apart else set()
    for name, option in from_user.items():
        if name not in used:
            raise InputError(f"{option.opts[-1]} does nothing under --method {method}; leave it out.")
    return chosen


def _check_inputs(method: str, chosen: Realignment, experts: dict[str, str], given: dict[str, Any]) -> None:
    """Reject experts for a method that learns from labels, and ask for missing inputs."""
    if chosen.teacher == "labels":
        if experts:
            raise InputError(f"--method {method} learns from the labels of --data; leave the experts out.")
    elif given["images"] is None:
        raise InputError(f"--method {method} uses images without labels: give --images FOLDER.")
    elif not experts:
        raise InputError(f"--method {method} learns from the experts: give each as TASK=EXPERT.")
    elif chosen.needs_base and given["base"] is None:
        raise InputError(f"--method {method} uses task vectors: give --base, the foundation encoder of the experts.")


def _inputs(chosen: Realignment, experts: dict[str, str], tasks: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """The data to learn from, as keyword arguments of `simomerge.realign`."""
    count = given["count"] or chosen.default_count
    if chosen.teacher == "labels":
        from simomerge.datasets.load import load_data

        return {"data": load_data(given["data"], split=given["split"] or "val", count=count, tasks=tasks)}
    from simomerge.assembly.experts import load_experts
    from simomerge.datasets.load import load_images
    from simomerge.datasets.pictures import as_images

    images = as_images(load_images(given["images"], given["split"]), count)
    return {"experts": load_experts(**experts), "images": images, "size": given["size"]}


def _lines(record: dict[str, Any], tasks: list[str], ridge: object) -> list[str]:
    """A summary of what was done, as lines of text; `ridge` is the one of the command line."""
    unlabelled = record.get("unlabelled_images", 0)
    images = f"{unlabelled} unlabelled" if unlabelled else f"{record['labelled_images']} labelled"
    unchanged = "as asked by --ridge none" if ridge == "none" else "no map was better on held-out images"
    trained = (
        f", {record['steps']} steps, {record['trained_parameters']:,} parameters trained" if record["steps"] else ""
    )
    lines = [
        f"Re-aligned {', '.join(tasks)} by {record['method']} on {images} images: {record['seconds']:.1f} s{trained}."
    ]
    if "lr_factor" in record:
        lines.append(
            f"  No step was better than the start; a second training at {record['lr_factor']:g} times the rate."
        )
    for task in record.get("left_out", ()):
        lines.append(f"  {task:<14} shares no block and is its expert: nothing to train")
    for task, ratio in record.get("distance_ratio", {}).items():
        lines.append(f"  {task:<14} distance to the expert on held-out images: {ratio:.2f} times that at the start")
    for task, after in record.get("r2", {}).items():
        before, used = record["r2_before"][task], record["ridge"][task]
        if after is not None:
            lines.append(
                f"  {task:<14} R2 of the head's input on held-out images {before:.3f} -> {after:.3f}, ridge {used:g}"
                if used != "none"
                else f"  {task:<14} unchanged: {unchanged}"
            )
    return lines
