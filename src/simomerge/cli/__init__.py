"""The command line: one file per command, loaded when it is called, so that ``--help`` imports no torch."""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from typing import Any

import click

from simomerge.core.version import __version__

COMMANDS = {
    "demo": "Train experts, merge, re-align, compare: the whole story on this machine.",
    "run": "Carry out a recipe of your own: a benchmark as one file.",
    "search": "Search the values of a recipe that make one of its rows best.",
    "data": "Check a dataset of your own before training on it.",
    "train": "Train an expert (one task) or a joint model (several) on a foundation encoder.",
    "import": "Make an expert of a model that was trained elsewhere.",
    "merge": "Merge experts' encoders into one model with all their heads.",
    "encoders": "List the families of encoders that can be a base.",
    "methods": "List the merge methods with their parameters.",
    "edit": "Add a task to a merged model, or remove one.",
    "realign": "Repair the mismatch between merged features and heads.",
    "evaluate": "Measure a model on a dataset, beside its experts where they are given.",
    "relate": "Say which tasks help or hurt each other, and which experts to merge.",
    "predict": "Predict every task for images of your own.",
    "inspect": "Say what a model folder or a checkpoint holds and where it comes from.",
    "diff": "Say how two checkpoints, or two experts' task vectors, differ.",
    "compress": "Store many experts of one base in little more than the space of two.",
    "restore": "Give one expert back from a compressed folder.",
    "doctor": "Check this installation and say what to mend.",
}


TOGETHER = ("demo", "run", "train", "realign", "evaluate")
"""Those that several processes, as torchrun starts them, do together."""


def module_of(command: str) -> str:
    """Where a command is: in the file of its name, but for a word that Python keeps to itself."""
    return f"simomerge.cli.{'import_expert' if command == 'import' else command}"


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        if cmd_name not in TOGETHER and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            ctx.fail(f"{cmd_name!r} is for one process; torchrun starts {', '.join(TOGETHER)} (docs/scale.md).")
        return getattr(import_module(module_of(cmd_name)), "command")  # noqa: B009

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS:
            from simomerge.core.schema import nearest

            near = nearest(args[0], COMMANDS)
            ctx.fail(f"no such command {args[0]!r}" + (f"; did you mean {near!r}?" if near else "."))
        return super().resolve_command(ctx, args)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="simomerge")
def cli() -> None:
    """Single-task vision experts in, one encoder with all their heads out.

    Start with `simomerge demo`. A model is a folder; BASE is a folder, a hub id or `rooms-base`, the encoder
    that ships with simomerge.
    """


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 a check found something to mend, 2 a mistake in what was given, 130 stopped by Ctrl-C.
    """
    from simomerge.core.errors import InputError

    warnings.showwarning = _show_warning
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        code = cli.main(prog_name="simomerge", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except InputError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("Stopped. Nothing is half-written; the same `demo` or `train` goes on from where it was.", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except MemoryError:
        click.echo("Error: out of memory; use fewer --workers, a smaller --batch-size or smaller images.", err=True)
        sys.exit(2)
    except ImportError:
        from simomerge.core.environment import broken_torchvision

        if not (cause := broken_torchvision()):
            raise
        click.echo(f"Error: {cause}", err=True)
        sys.exit(2)
    except OSError as error:
        click.echo(f"Error: {error.filename or 'the system'}: {error.strerror or error}.", err=True)
        sys.exit(2)
    if isinstance(code, int) and code:
        sys.exit(code)


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    if issubclass(category, UserWarning) and "simomerge" in filename:
        click.echo(f"Warning: {message}", err=True)
