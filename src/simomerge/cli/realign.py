"""simomerge realign"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from simomerge.assembly.realign import Realignment, get_realignment, methods, realignments
from simomerge.assembly.realign.method import TRAINING, TrainedRealignment
from simomerge.cli.options import (
    check_output,
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
from simomerge.core.registry import settings
from simomerge.training.settings import TrainSettings

_FOR_EXPERTS = ("images", "size")
_FOR_LABELS = ("data", "split")
_FOR_TRAINING = ("trackers",)
_TRAINING_SHOWN = ("steps", "batch_size", "lr", "encoder_lr", "seed")


def _parameters() -> dict[str, tuple[Field[Any], list[str]]]:
    """Every parameter of any re-alignment, with the methods that have it; ``count`` has an option of its own."""
    found: dict[str, tuple[Field[Any], list[str]]] = {}
    for name, method in methods().items():
        for spec in settings(method):
            if spec.name != "count":
                found.setdefault(spec.name, (spec, []))[1].append(name)
    return found


def _type(spec: Field[Any]) -> Any:
    limits = spec.metadata
    if limits["choices"]:
        return click.Choice(limits["choices"])
    if limits["kind"] is float and limits["words"]:
        return str  # a number or a word: checked by the registry
    if limits["kind"] is int and limits["low"] is not None:
        return click.IntRange(int(limits["low"]))
    return limits["kind"]


def _realignment_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add one option per parameter of the registered re-alignments, and the settings of their training."""
    for name in reversed(_TRAINING_SHOWN):
        spec = next(each for each in fields(TrainSettings) if each.name == name)
        command = click.option(f"--{name.replace('_', '-')}", type=_type(spec), help=spec.metadata["help"])(command)
    for name, (spec, having) in reversed(_parameters().items()):
        text = f"{spec.metadata['help'].rstrip('.')} ({', '.join(having)})."
        flag = {"is_flag": True, "default": None} if spec.metadata["kind"] is bool else {"type": _type(spec)}
        command = click.option(f"--{name.replace('_', '-')}", name, help=text, **flag)(command)
    return command


def _help() -> str:
    lines = ["Re-align the heads of a merged MODEL.", ""]
    for teacher, title in (
        ("experts", "Without labels, from the behaviour of its EXPERTs on a folder of images:"),
        ("labels", "With labels of every task (--data):"),
    ):
        lines += ["\b", title]
        named = [(name, method) for name, method in realignments().items() if method.teacher == teacher]
        lines += [f"  {name:<17} {method.phrase}" for name, method in named] + [""]
    example = "simomerge realign runs/scene depth=runs/depth normals=runs/normals --images photos/ -o runs/folded"
    return "\n".join([*lines, "\b", example])


@click.command("realign", help=_help())
@click.argument("model")
@click.argument("experts", nargs=-1, metavar="[TASK=EXPERT]...")
@click.option("--method", type=click.Choice(list(realignments())), default="fold", show_default=True)
@images_option
@size_option
@data_option
@click.option("--split", default="val", show_default=True, help="Split of the data.")
@click.option("--count", type=click.IntRange(1), help="Images to use. [default: 64 to fold, 256 otherwise]")
@_realignment_options
@output_option()
@overwrite_option
@workers_option
@track_option
@json_option
def command(
    model: str, experts: tuple[str, ...], method: str, output: Path, overwrite: bool, as_json: bool, **options: Any
) -> None:
    check_output(output, overwrite)
    named = parse_pairs(experts)
    chosen = get_realignment(method, **_given_parameters(method))
    _check_inputs(method, chosen, named, options)
    from simomerge.assembly.realign import realign
    from simomerge.core.distributed import join_processes
    from simomerge.core.machine import available_cores
    from simomerge.models.model import load
    from simomerge.training.tracking import track

    join_processes()
    merged = load(model)
    inputs = _inputs(chosen, named, list(merged.tasks), options)
    with track(options["trackers"], logs_of(output)), console():
        result = realign(merged, **inputs, method=chosen, workers=options["workers"] or available_cores())
    if is_first():  # under torchrun all processes have the same model
        result.save_pretrained(output, overwrite)
    record = result.provenance["realign"]
    say(
        as_json,
        {"output": str(output), "realign": record},
        *_lines(record, list(result.tasks)),
        f"Model: {output}",
        f"Next: simomerge evaluate {output} --data {options['data']} --split test",
    )


def _given(name: str) -> bool:
    return click.get_current_context().get_parameter_source(name) == ParameterSource.COMMANDLINE


def _given_parameters(method: str) -> dict[str, Any]:
    """The parameters that were given on the command line; one that the method does not have is refused."""
    kind = realignments()[method]
    known = {spec.name for spec in settings(kind)} | set(TRAINING if isinstance(kind, TrainedRealignment) else ())
    given: dict[str, Any] = {}
    for name in (*_parameters(), *_TRAINING_SHOWN):
        if not _given(name):
            continue
        if name not in known:
            raise InputError(f"--{name.replace('_', '-')} does nothing under --method {method}; leave it out.")
        value = click.get_current_context().params[name]
        given[name] = _parsed(name, value)
    return given


def _parsed(name: str, value: Any) -> Any:
    """Text of the command line as the registry takes it: numbers where a word would also do, lists with commas."""
    spec = _parameters().get(name, (None, []))[0]
    if spec is None or not isinstance(value, str):
        return value
    if spec.metadata["many"] and "," in value:
        return [each.strip() for each in value.split(",")]
    if spec.metadata["kind"] is float and value not in spec.metadata["words"]:
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _check_inputs(method: str, chosen: Realignment, experts: dict[str, str], options: dict[str, Any]) -> None:
    """Refuse inputs that the method does not use, and ask for those that it needs."""
    labelled = chosen.teacher == "labels"
    unused: tuple[str, ...] = _FOR_EXPERTS if labelled else _FOR_LABELS
    unused += () if isinstance(chosen, TrainedRealignment) else _FOR_TRAINING
    unused += () if chosen.trains_heads_apart else ("workers",)
    if labelled and (experts or options["images"]):
        raise InputError(f"--method {method} learns from the labels of --data; leave the experts and --images out.")
    for name in unused:
        if _given(name):
            option = "track" if name == "trackers" else name
            raise InputError(f"--{option} does nothing under --method {method}; leave it out.")
    if not labelled and options["images"] is None:
        raise InputError(f"--method {method} uses images without labels: give --images FOLDER.")
    if not labelled and not experts:
        raise InputError(f"--method {method} learns from the experts: give each as TASK=EXPERT.")


def _inputs(chosen: Realignment, experts: dict[str, str], tasks: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `simomerge.realign` that say what to learn from."""
    count = options["count"] or chosen.default_count
    if chosen.teacher == "labels":
        from simomerge.datasets.load import load_data

        return {"data": load_data(options["data"], split=options["split"], count=count, tasks=tasks)}
    from simomerge.assembly.experts import load_experts
    from simomerge.datasets.pictures import as_images

    return {"experts": load_experts(**experts), "images": as_images(options["images"], count, options["size"])}


def _lines(record: dict[str, Any], tasks: list[str]) -> list[str]:
    """What was done, for people."""
    unlabelled = record.get("unlabelled_images", 0)
    images = f"{unlabelled} unlabelled" if unlabelled else f"{record['labelled_images']} labelled"
    lines = [
        f"Re-aligned {', '.join(tasks)} by {record['method']} on {images} images: {record['steps']} steps,"
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
