"""simomerge app"""

from __future__ import annotations

import os
import threading
from importlib import import_module
from pathlib import Path

import click

from simomerge.cli import options
from simomerge.cli.output import console, say, warning

FOLD_ROOMS = 32
"""Rooms to fold on if a user gives no pictures."""

SAMPLE_SIZE = (192, 240)
"""Height and width of the sample photos, in pixels."""


@click.command("app")
@click.argument("given", nargs=-1, metavar="[MODEL|RUN|BASE] [TASK=EXPERT]...")
@click.option("--base", help="The foundation encoder of the experts. [default: what they record]")
@click.option("--port", type=click.IntRange(1, 65535), help="Port to serve on. [default: 7860, or the next free one]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to serve on; by default this machine.")
@click.option("--open", "browse", is_flag=True, help="Open the page in the default browser.")
@options.trust_code
def command(given: tuple[str, ...], base: str | None, port: int | None, host: str, browse: bool) -> None:
    """Try models on your own photos, on a page in the browser.

    The page shows all tasks of a photo, from the experts, their merge and the repaired merge, and merges again when
    you change the method or the scale. It needs the extra app.

    \b
    simomerge app                               the run in runs/demo, or three tiny experts
    simomerge app runs/demo                     the experts of a run
    simomerge app runs/scene                    the predictions of one model
    simomerge app rooms-base depth=runs/depth normals=runs/normals
    """
    source, experts = _parsed(given)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
    import_module("gradio")  # without the extra, nothing else is started
    from simomerge.datasets.rooms import load_rooms
    from simomerge.playground.opening import open_models

    with console():
        opened = open_models(source, experts, base)
        from simomerge.playground.page import open_browser, served
        from simomerge.playground.workshop import Choice, Workshop

        fold = list(load_rooms("val", FOLD_ROOMS)["image"]) if opened.rooms and opened.experts else []
        samples = list(load_rooms("test", 6, *SAMPLE_SIZE)["image"])
        workshop = Workshop(opened, fold)
        if fold:
            workshop.look(samples[0], Choice())  # the first visitor does not wait for imports and experts
    if host not in ("127.0.0.1", "localhost", "::1"):
        warning(f"everyone who can reach {host} can use this page; it has no password.")
    with served(workshop, samples, host, port) as address:
        say(False, {}, f"Playground: {address}", "Ctrl-C ends it.")
        if browse:
            open_browser(address)
        threading.Event().wait()


def _parsed(given: tuple[str, ...]) -> tuple[str | None, dict[str, str]]:
    """What to open, if it is named, and the experts."""
    first = bool(given) and ("=" not in given[0] or Path(given[0]).exists())
    return (given[0] if first else None), options.parse_pairs(given[first:])
