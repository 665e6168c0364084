"""simomerge restore"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from simomerge.cli import options
from simomerge.cli.compress import table
from simomerge.cli.output import say


@click.command("restore")
@click.argument("compressed", type=options.place)
@click.argument("task")
@options.output()
def command(compressed: str, task: str, output: Path, overwrite: bool, as_json: bool) -> None:
    """Restore the expert of one TASK from a COMPRESSED folder, as a model folder.

    If OUT ends in .safetensors, only the weights of its encoder are written.

    \b
    simomerge restore runs/compressed depth -o runs/depth-restored
    """
    from simomerge.merging.disk.compress import restore

    done = restore(compressed, task, output, overwrite)
    found = {"output": str(output), "task": task, **asdict(done.tasks[task])}
    say(as_json, found, f"Restored {task}: {output}", table(done))
