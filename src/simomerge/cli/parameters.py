"""The parameters of a merge method on the command line: -p KEY=VALUE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from simomerge.cli.options import parse_pairs, parse_value
from simomerge.core.errors import InputError
from simomerge.core.registry import settings


def _parameters(context: click.Context, option: Any, given: Sequence[str]) -> dict[str, Any]:
    return {name: parse_value(value) for name, value in parse_pairs(given, "KEY=VALUE").items()}


method_parameters = click.option(
    "-p",
    "--parameter",
    "parameters",
    multiple=True,
    metavar="KEY=VALUE",
    callback=_parameters,
    help="Parameter of the method; may be repeated.",
)


class MethodCommand(click.Command):
    """A command with `method_parameters`. It says where a parameter belongs that is given as an option of its own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name.removeprefix("--").replace("-", "_")
            if methods := _methods_with(name):
                value = _value_after(error.option_name, given)
                raise InputError(
                    f"{error.option_name} is no option: {name} is a parameter of the method"
                    f"{'s' if len(methods) > 1 else ''} {', '.join(methods)}. Give -p {name}={value}."
                ) from error
            raise


def _methods_with(parameter: str) -> list[str]:
    """The merge methods that have a parameter of this name."""
    from simomerge.merging import available

    return [name for name, method in available().items() if any(each.name == parameter for each in settings(method))]


def _value_after(option: str, args: Sequence[str]) -> str:
    """What was given as the value of an option, or VALUE."""
    for index, word in enumerate(args):
        name, equals, value = word.partition("=")
        if name == option:
            following = args[index + 1 : index + 2]
            return value if equals else next((each for each in following if not each.startswith("-")), "VALUE")
    return "VALUE"
