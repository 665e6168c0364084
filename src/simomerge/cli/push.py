"""simomerge push"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import click

from simomerge.cli import options
from simomerge.cli.next_step import next_step
from simomerge.cli.output import console, say


@click.command("push")
@click.argument("repository", metavar="OWNER/NAME")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--public", is_flag=True, help="Let everybody see a new repository. [default: private]")
@click.option("--license", "licence", default="", metavar="ID", help="Its licence. [default: that of all parents]")
@click.option("--picture", metavar="PHOTO", help="Show in the card what the model predicts for this photo.")
@click.option("--message", default="", help="Message of the commit.")
@click.option("--dry-run", is_flag=True, help="List the files and print the card; send nothing.")
@options.trust_code
@options.as_json
def command(repository: str, model: Path, dry_run: bool, as_json: bool, **given: Any) -> None:
    """Publish the folder MODEL on the Hugging Face hub as OWNER/NAME, with a model card.

    Only the files of a model are sent, none of which holds code. A new repository is private. The token is that of
    `hf auth login`, or HF_TOKEN.

    \b
    simomerge push me/scene runs/scene --picture photo.jpg --dry-run
    """
    from simomerge.checkpoints.publishing import card_to_publish, check_repository, files_to_publish, push_folder

    check_repository(repository)
    files, left_out = files_to_publish(model)
    picture = _picture(model, given["picture"]) if given["picture"] else None
    ignored = [f"Not part of a model, and left out: {', '.join(left_out)}"] if left_out else []
    if dry_run:
        card = card_to_publish(model, repository, given["licence"], picture is not None)
        found = {"repository": repository, "files": files, "left_out": left_out, "card": card}
        say(as_json, found, f"Would send to {repository}: {', '.join(files)}", *ignored, "", *card.splitlines())
        return
    with console():
        how = {"licence": given["licence"], "message": given["message"], "picture": picture}
        done = push_folder(model, repository, private=not given["public"], **how)
    seen = "private" if done.private else "public"
    sent = f"Sent {len(done.files)} files: {done.url} ({seen})"
    result = {"url": done.url, "files": list(done.files), "left_out": left_out, "private": done.private}
    say(as_json, result, *ignored, sent, next_step("inspect", repository))


def _picture(model: Path, photo: str) -> bytes:
    """What the model predicts for a photo, as a PNG file."""
    from simomerge.models.model import load
    from simomerge.models.strip import strip_of

    target = io.BytesIO()
    strip_of(load(model), photo).save(target, "PNG", optimize=True)
    return target.getvalue()
