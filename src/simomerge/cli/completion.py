"""simomerge completion"""

from __future__ import annotations

import os
from pathlib import Path

import click

from simomerge.cli import options
from simomerge.cli.output import say

SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS), required=False)
@options.as_json
def command(shell: str | None, as_json: bool) -> None:
    """Print what makes the Tab key of SHELL complete commands, options and names of files.

    \b
    eval "$(simomerge completion bash)"        # in ~/.bashrc; zsh: in ~/.zshrc
    simomerge completion fish > ~/.config/fish/completions/simomerge.fish
    """
    from click.shell_completion import get_completion_class

    from simomerge.cli import cli

    own = Path(os.environ.get("SHELL", "")).name
    chosen = shell or (own if own in SHELLS else "bash")
    kind = get_completion_class(chosen)
    assert kind is not None
    script = kind(cli, {}, "simomerge", "_SIMOMERGE_COMPLETE").source_vars()
    text = kind.source_template % script
    say(as_json, {"shell": chosen, "script": text}, *text.splitlines())
