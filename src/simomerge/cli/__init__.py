"""The command line. Each command is one file, imported when it is called, so that ``--help`` imports no torch."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from simomerge.core.progress import starting
from simomerge.core.version import __version__

GROUPS = {
    "Make models and data": {
        "demo": "Train experts, merge and re-align them, and compare: a complete example.",
        "train": "Train an expert (one task) or a joint model (several tasks).",
        "import": "Convert a model that was trained elsewhere into an expert.",
        "data": "Check a dataset before you train on it.",
    },
    "Merge": {
        "merge": "Merge the encoders of experts into one model with all their heads.",
        "edit": "Add a task to a merged model, or remove one.",
        "compress": "Store many experts of one base in little more space than two.",
        "restore": "Restore one expert from a compressed folder.",
    },
    "Repair": {
        "realign": "Repair the mismatch between merged features and heads.",
    },
    "Judge": {
        "evaluate": "Measure a model on a dataset, and compare it with its experts.",
        "relate": "Measure which tasks help or hurt each other, and which to merge.",
        "diff": "Compare two checkpoints, or the task vectors of two experts.",
        "inspect": "Show what a model folder or a checkpoint contains and its origin.",
    },
    "Ship": {
        "predict": "Predict every task for your own images or videos.",
        "push": "Publish a model on the Hugging Face hub.",
        "app": "Try models, merges and repairs on your photos, on a page in the browser.",
        "export": "Write a model as one file for ONNX Runtime, OpenVINO, TensorRT or torch.",
        "benchmark": "Time models and exported files on this machine.",
    },
    "Run benchmarks": {
        "run": "Run a recipe: a benchmark described in one file.",
        "search": "Search for the values of a recipe that give the best result.",
    },
    "About simomerge": {
        "methods": "List the merge methods and re-alignments with their parameters.",
        "encoders": "List the encoder families that can serve as a base.",
        "completion": "Print what makes the Tab key of your shell complete commands.",
        "doctor": "Check this installation, and show what to fix.",
    },
}
"""Help text of each command, by purpose."""

COMMANDS = {name: text for group in GROUPS.values() for name, text in group.items()}

TOGETHER = ("demo", "run", "train", "realign", "evaluate")
"""The commands that torchrun may start in several processes."""


def module_of(command: str) -> str:
    """The module of a command. It has the command's name, except for ``import``, which is a Python keyword."""
    return f"simomerge.cli.{'import_expert' if command == 'import' else command}"


def _with_quiet(command: click.Command) -> click.Command:
    """A command, or all commands of a group, with the option --quiet, which every command has."""
    for each in command.commands.values() if isinstance(command, click.Group) else (command,):
        if not any(option.name == "quiet" for option in each.params):
            each.params.append(_quiet_option())
    return command


def _quiet_option() -> click.Option:
    from simomerge.cli.output import be_quiet

    text = "Show no progress and no next step."
    callback = lambda context, option, given: be_quiet(given)  # noqa: E731
    return click.Option(["-q", "--quiet"], is_flag=True, expose_value=False, callback=callback, help=text)


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        if cmd_name not in TOGETHER and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            ctx.fail(f"{cmd_name!r} is for one process; torchrun starts {', '.join(TOGETHER)} (docs/scale.md).")
        return _with_quiet(import_module(module_of(cmd_name)).command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for purpose, group in GROUPS.items():
            with formatter.section(purpose):
                formatter.write_dl([(f"{name:<8}", text) for name, text in group.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command. If nobody reads its output any more, as in ``| head``, it ends quietly."""
        from simomerge.core.files import explain_lost_pages  # not needed for the help of all commands

        try:
            starting.begin()
            explain_lost_pages()
            return super().invoke(ctx)
        except BrokenPipeError:  # click would turn it into exit code 1
            sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - Python flushes it when it ends
            ctx.exit(0)
        finally:
            starting.end()

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS:
            from simomerge.core.schema import nearest

            near = nearest(args[0], COMMANDS)
            ctx.fail(f"no such command {args[0]!r}" + (f"; did you mean {near!r}?" if near else "."))
        return super().resolve_command(ctx, args)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="simomerge")
def cli() -> None:
    """Merge vision experts of one task each into one encoder with all their heads.

    Start with `simomerge demo`. A model is a folder. BASE is a folder, a hub id, or `rooms-base`, the encoder
    that ships with simomerge.
    """


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 a check found something to fix, 2 the input is wrong, 130 stopped by Ctrl-C (or SIGTERM or
    SIGHUP).
    """
    _stop_like_ctrl_c()
    _print_anything()
    warnings.showwarning = _show_warning
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        code = cli.main(prog_name="simomerge", standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        resumes = sys.argv[1:2] in (["train"], ["demo"], ["run"]) or "--work" in (w.split("=")[0] for w in sys.argv)
        click.echo(f"Stopped. No file is half-written{'; repeat the command to resume.' if resumes else '.'}", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        if message:
            from simomerge.cli import output

            output.error(message)
        sys.exit(2)
    if isinstance(code, int) and code:
        sys.exit(code)


def _print_anything() -> None:
    """Print "?" for characters that the terminal's or the pipe's encoding cannot write, such as those of file names."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _stop_like_ctrl_c() -> None:
    """Let SIGTERM and SIGHUP end the command as Ctrl-C does: nothing stays half-written."""
    owner = os.getpid()

    def stop(number: int, frame: Any) -> None:
        if os.getpid() != owner:  # a process that was forked from this one
            os._exit(128 + number)
        raise KeyboardInterrupt

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, stop)


def _message(error: Exception) -> str | None:
    """What to print instead of a traceback: "" if the help was printed; None for an error in simomerge itself."""
    from simomerge.core.errors import InputError

    if isinstance(error, click.ClickException):
        shown = io.StringIO()
        error.show(shown)
        usage, _, message = shown.getvalue().partition("Error: ")
        click.echo(usage, err=True, nl=False)
        return message.rstrip()
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, MemoryError) or _is_torch_out_of_memory(error):
        on_gpu = any(text in str(error) for text in ("CUDA", "CUBLAS"))
        if on_gpu:
            return f"the GPU is out of memory; {_remedies([])}"
        return f"out of memory; {_remedies(['raise ulimit -v'])}"
    if isinstance(error, ImportError):
        from simomerge.core.environment import broken_torchvision, missing_extra

        return broken_torchvision() or missing_extra(error) or None
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return "too many open files; raise the limit of this shell (ulimit -n 1024)."
    if isinstance(error, OSError):
        return f"{error.filename or 'the system'}: {error.strerror or error}."
    return None


def _remedies(more: list[str]) -> str:
    """What to do when memory runs out: what anyone can, and what the options of the command allow."""
    name = next(iter(sys.argv[1:2]), "")
    command = import_module(module_of(name)).command if name in COMMANDS else None
    commands = command.commands.values() if isinstance(command, click.Group) else [command] if command else []
    found = {option for each in commands for parameter in each.params for option in parameter.opts}
    use = ["smaller or fewer images"] if found & {"--images", "--data", "images", "data", "recipe"} else []
    if batches := [option for option in ("--batch-size", "--images-at-once", "--batch") if option in found]:
        use.append(f"smaller batches ({' or '.join(batches)})")
    use += ["fewer --workers"] if "--workers" in found else []
    either = ", ".join([*use[:-2], " or ".join(use[-2:])])  # as in "a, b or c"
    return ", ".join(["free some", *more, *([f"or use {either}"] if use else [])]) + "."


def _is_torch_out_of_memory(error: Exception) -> bool:
    """Whether torch has no memory left, on a GPU or a CPU. Without torch, no error is one of torch."""
    if "torch" not in sys.modules:
        return False
    from simomerge.core.machine import is_out_of_memory

    return is_out_of_memory(error)


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    from simomerge.core.caution import Caution

    if issubclass(category, Caution):
        from simomerge.cli import output

        output.warning(str(message))
