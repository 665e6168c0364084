"""Options and arguments that several commands share, and how their values are parsed."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import click

from simomerge.cli.output import warning
from simomerge.core.classes import trust
from simomerge.core.errors import InputError
from simomerge.core.registry import suggestion
from simomerge.core.remote import is_url
from simomerge.core.schema import plain_value
from simomerge.training.choices import TRACKERS
from simomerge.training.settings import TrainSettings

Decorator = Callable[[Any], Any]


def together(*options: Decorator) -> Decorator:
    """One decorator for several options, in the order of the help page."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


# Parsing ------------------------------------------------------------------------------------------------


def parse_pairs(pairs: Sequence[str], form: str = "TASK=EXPERT") -> dict[str, str]:
    """``["depth=runs/depth"]`` -> ``{"depth": "runs/depth"}``.

    Raises:
        InputError: A pair has no equals sign or an empty side, or a name is given twice.
    """
    parsed: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            examples = {"TASK=EXPERT": "depth=runs/depth", "TASK=KIND": "parts=segmentation"}
            example = examples.get(form, "density=0.2")
            raise InputError(f"{pair!r}: give {form}, such as {example}.")
        if name in parsed:
            what = "experts for task" if form == "TASK=EXPERT" else "values for"
            raise InputError(f"two {what} {name!r}: {parsed[name]} and {value}; give one.")
        parsed[name] = value
    return parsed


def parse_value(text: str) -> Any:
    """A number, a mapping ``NAME:NUMBER,NAME:NUMBER``, or the text itself."""
    items = [item.rpartition(":") for item in text.split(",")]
    if all(name and colon for name, colon, _ in items):
        return {name: _number(value) for name, _, value in items}
    return _number(text)


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class _Pair(click.ParamType):
    """TASK=EXPERT, for the shell's completion; `parse_pairs` reads it."""

    name = "pair"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        task, equals, start = incomplete.partition("=")
        if not equals:  # bash gives what follows the equals sign alone
            return [CompletionItem(incomplete, type="file")]
        folder, _, name = start.rpartition("/")
        found = Path(folder or (start and "/" if start.startswith("/") else ".")).glob(f"{glob.escape(name)}*")
        return [CompletionItem(f"{task}={path.as_posix()}") for path in sorted(found)]


place = click.Path(path_type=str)
"""A file, a folder or a hub id; the shell completes files. What it must be is checked where it is read."""


class _First(click.Path):
    """The model that a command takes before its experts, which is easily forgotten."""

    def __init__(self, what: str) -> None:
        super().__init__(path_type=str)
        self.what = what

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        name, equals, _ = str(value).partition("=")
        if param is not None and ctx is not None and equals and "/" not in name and not Path(value).exists():
            first = param.make_metavar(ctx)
            raise InputError(
                f"the first argument of {ctx.info_name} is {first}, {self.what}; {value!r} looks like an expert."
                f" Give {first} before the experts: simomerge {ctx.info_name} {first} {value} ..."
            )
        return super().convert(value, param, ctx)


def _pairs(context: click.Context, option: Any, given: Sequence[str]) -> dict[str, str]:
    return parse_pairs(given)


def _numbers(context: click.Context, option: Any, given: Sequence[str]) -> dict[str, Any]:
    values = {name: _number(value) for name, value in parse_pairs(given, "TASK=NUMBER").items()}
    for name, value in values.items():
        if isinstance(value, str):
            raise InputError(f"{option.opts[-1]} {name}={value}: give a number.")
    return values


def _bytes(context: click.Context, option: Any, text: str | None) -> int | None:
    from simomerge.checkpoints import parse_size

    return parse_size(text) if text else None


def _size(context: click.Context, option: Any, text: str | None) -> str | None:
    """Reject a size that is none, before any work starts."""
    from simomerge.core.pixels import resize_to

    resize_to(text)
    return text


def _new_path(context: click.Context, option: Any, path: Path | None) -> Path | None:
    """Reject an output that exists, before any work starts."""
    overwrite = context.params["overwrite"]
    if path is not None and path.exists() and path.resolve() != Path.cwd() and not overwrite:
        raise InputError(f"{path} exists; choose another path, or give --overwrite.")
    return path


def _new_model(context: click.Context, option: Any, path: Path | None) -> Path | None:
    """Reject an output that exists, or that must not be replaced by a model."""
    from simomerge.checkpoints.description import check_output

    if _new_path(context, option, path) is not None:
        assert path is not None
        check_output(path, context.params["overwrite"])
    return path


def _trust_code(context: click.Context, option: Any, given: bool) -> None:
    if given:
        trust()


def logs_of(output: Path) -> Path:
    """Where trackers write, for an output folder that appears only when all is done."""
    return output.parent / f"{output.name}-logs"


class Name(click.Choice[str]):
    """One of several names; for a misspelt one, the nearest is suggested."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.choices:
            option = param.opts[-1] if param else "this option"
            raise InputError(f"{option}: there is no '{value}'{suggestion(value, self.choices)}")
        return str(value)


# Arguments and options ----------------------------------------------------------------------------------


def first(name: str, what: str) -> Decorator:
    """The argument before the experts: a folder or a hub id. An expert in its place is named as the mistake."""
    return click.argument(name, type=_First(what))


base = first("base", "the encoder that the experts were fine-tuned from")
some_experts = click.argument("experts", nargs=-1, type=_Pair(), metavar="[TASK=EXPERT]...", callback=_pairs)
experts = click.argument("experts", nargs=-1, type=_Pair(), required=True, metavar="TASK=EXPERT...", callback=_pairs)

as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
changes = click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Replace a value: tune.steps=20.")
data = click.option(
    "--data",
    type=place,
    default="rooms",
    show_default=True,
    help="rooms, nyuv2:FOLDER, cityscapes:FOLDER, taskonomy:FOLDER, or a manifest of your own data; or the URL of one.",
)
pictures = together(
    click.option(
        "--images",
        type=place,
        metavar="FOLDER",
        help="Images without labels: a folder of pictures with its subfolders or its URL, or a dataset as for --data.",
    ),
    click.option(
        "--size",
        callback=_size,
        metavar="HEIGHTxWIDTH",
        help="Resize the images, in pixels; own keeps their sizes. [default: the experts' training size]",
    ),
)
split = click.option(
    "--split", help="Split of the data, or of a dataset as --images. [default: val; for --images all but test]"
)
trust_code = click.option(
    "--trust-code",
    is_flag=True,
    expose_value=False,
    callback=_trust_code,
    help="Run the code of custom encoders and heads that a model folder names.",
)
track = click.option(
    "--track",
    "trackers",
    multiple=True,
    type=click.Choice(TRACKERS),
    help="Also report losses and learning rates to this tracker; may be repeated.",
)


def _precision(context: click.Context, option: Any, chosen: str | None) -> None:
    """Choose the precision of this process and of those that it starts."""
    if chosen is not None:
        os.environ["SIMOMERGE_PRECISION"] = chosen


precision = click.option(
    "--precision",
    type=click.Choice(("auto", "fp32", "bf16")),
    callback=_precision,
    expose_value=False,
    help="Precision of products. [default: auto, bf16 where the machine computes faster in it]",
)
ray = click.option(
    "--ray",
    is_flag=False,
    flag_value="",
    default=None,
    metavar="[ADDRESS]",
    help="Share the work among the nodes of a Ray cluster, such as auto or ray://HOST:10001. Without ADDRESS: that of"
    " RAY_ADDRESS, or this machine.",
)
shard = together(
    click.option(
        "--shard",
        is_flag=True,
        help="Under torchrun, divide the model among the processes while its encoder trains: less memory in each.",
    ),
    click.option(
        "--offload", is_flag=True, help="With --shard, keep the shares in the CPU's memory instead of the GPU's."
    ),
)
workers = click.option(
    "--workers", type=click.IntRange(1), help="Parallel processes. [default: one per core, or one on a GPU]"
)


def pairs(option: str, name: str, help: str) -> Decorator:
    """An option that takes TASK=EXPERT and may be repeated; the command receives a dictionary."""
    return click.option(option, name, multiple=True, metavar="TASK=EXPERT", callback=_pairs, help=help)


def numbers(option: str, name: str, help: str) -> Decorator:
    """An option that takes TASK=NUMBER and may be repeated; the command receives a dictionary."""
    return click.option(option, name, multiple=True, metavar="TASK=NUMBER", callback=_numbers, help=help)


def size_in_bytes(option: str, help: str) -> Decorator:
    """An option that takes a size such as 20GB; the command receives bytes or None."""
    return click.option(option, metavar="SIZE", callback=_bytes, help=help)


class _Written(click.Path):
    """A path to write; or a URL, as text, if the command takes one."""

    def __init__(self, urls: bool = False) -> None:
        super().__init__(path_type=Path)
        self.urls = urls

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value).strip():
            raise InputError(f"-o {str(value)!r}: the name is empty; name what to write.")
        if str(value) == "-":
            raise InputError("-o -: nothing is written to the standard output; name what to write.")
        if not is_url(value):
            return super().convert(value, param, ctx)
        if not self.urls:
            raise InputError(f"-o {value}: only run and search write to a URL; give a path, and copy what is there.")
        return value


def output(required: bool = True, model: bool = True, help: str = "Folder to write (OUT).") -> Decorator:
    """-o and --overwrite: a file or folder (of a model) that must not exist, except with --overwrite; and --json."""
    path, callback = _Written(), _new_model if model else _new_path
    return together(
        click.option("-o", "--output", type=path, required=required, callback=callback, help=help),
        click.option("--overwrite", is_flag=True, is_eager=True, help="Replace OUT if it exists."),
        as_json,
    )


def folder(default: Path | None, help: str, required: bool = False, urls: bool = False) -> Decorator:
    """-o for a folder that may exist; the command adds to it or continues in it. With ``urls``, it may be a URL."""
    settings: dict[str, Any] = (
        {} if default is None else {"default": default, "show_default": True}
    )  # click takes None for a given value
    return click.option("-o", "--output", type=_Written(urls), required=required, help=help, **settings)


def is_given(name: str) -> bool:
    """Whether the user gave an option or argument of the command that runs."""
    return click.get_current_context().get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def note_count(count: int | None, available: int, what: str) -> None:
    """Warn if ``--count`` asks for more images than there are."""
    if count is not None and available < count and is_given("count"):
        warning(f"--count {count}: {what} has {available} images; all of them are used.")


def note_rooms(rooms: bool) -> None:
    """Warn if no ``--data`` was given, so that the included rooms are used.

    Args:
        rooms: Whether the model was trained on rooms; then there is no warning.
    """
    if not rooms and not is_given("data"):
        warning("without --data the included rooms are used, a toy dataset; give the data that this model is for.")


def check_images(images: str | None) -> None:
    """Reject ``--images`` for a folder that does not exist, before any work starts."""
    from simomerge.core.assets import expanded

    if images is not None and ":" not in images and images != "rooms" and not expanded(images).exists():
        raise InputError(f"{images}: no such folder of images.")


def note_images(images: str | None, count: int | None) -> None:
    """`note_count` for ``--images``, if that is a folder."""
    if images is not None and count is not None and Path(images).is_dir() and not Path(images, "simo.json").exists():
        from simomerge.datasets.manifest import MANIFESTS
        from simomerge.datasets.pictures import pictures_of

        if not any(Path(images, f"data{suffix}").is_file() for suffix in MANIFESTS):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # reading the images warns of the same
                available = len(pictures_of(Path(images)))
            note_count(count, available, images)


# Options from parameters --------------------------------------------------------------------------------


def from_parameter(spec: Field[Any], help: str = "", default: Any = None) -> Decorator:
    """The option for a parameter of a registered method, or of `TrainSettings`."""
    limits, text = spec.metadata, help or spec.metadata["help"]
    flag = f"--{spec.name.replace('_', '-')}"
    if limits["kind"] is bool:
        flag += f"/--no-{flag[2:]}" if spec.default else ""
        return click.option(flag, spec.name, is_flag=True, default=None, help=text)
    kind, callback = limits["kind"], None
    if limits["choices"]:
        kind = Name(limits["choices"])
    elif limits["many"] or limits["words"]:
        kind, callback = str, _plain
    elif kind is int and limits["low"] is not None:
        kind = click.IntRange(int(limits["low"]))
    shown = default is not None
    return click.option(flag, type=kind, callback=callback, default=default, show_default=shown, help=text)


def _plain(context: click.Context, option: Any, text: str | None) -> Any:
    """A number, a word, or a list with commas; the registry checks the value."""
    return plain_value([each.strip() for each in text.split(",")] if text and "," in text else text)


TRAINING = ("steps", "batch_size", "lr", "encoder_lr", "seed")
"""The settings of a training that have an option."""


def training(notes: Mapping[str, str] | None = None, **defaults: Any) -> Decorator:
    """The options for `TRAINING`; without a default the value is None. The notes, by name, follow the help texts."""
    specs = {spec.name: spec for spec in fields(TrainSettings)}
    texts = {name: f"{specs[name].metadata['help']} {note}" for name, note in (notes or {}).items()}
    options = (from_parameter(specs[name], texts.get(name, ""), defaults.get(name)) for name in TRAINING)
    return together(*options)
