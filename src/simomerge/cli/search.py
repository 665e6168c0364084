"""simomerge search"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from simomerge.cli import options
from simomerge.cli.next_step import next_step
from simomerge.cli.output import console, say


@click.command("search")
@click.argument("recipe", type=options.place)
@options.changes
@click.option("--storage", help="Storage of the study: a file, or an Optuna URL. [default: search.log in OUT]")
@click.option("--seed", type=int, help="Seed of the sampler. Machines that share a study need different seeds or none.")
@options.folder(None, "Folder (OUT), or its URL. [default: the recipe's + -search]", urls=True)
@options.workers
@options.ray
@options.precision
@options.trust_code
@options.as_json
def command(recipe: str, changes: tuple[str, ...], output: str | Path | None, as_json: bool, **given: Any) -> None:
    """Search the values that RECIPE names under `search`, with Optuna, on held-out validation images.

    A second call resumes the study, and another machine with the same --storage joins it. docs/recipes.md describes
    the keys of a search.
    """
    from simomerge.recipes.file import read_recipe
    from simomerge.recipes.search import search_recipe
    from simomerge.training.run_folder import RunFolder

    folder = RunFolder.of(output or read_recipe(recipe, changes).output + "-search")
    with console():
        results = search_recipe(
            recipe, folder, changes, given["storage"], given["seed"], given["workers"], given["ray"]
        )
    shown = [trial for trial in results["trials"] if trial["delta_mtl"] is not None]
    lines = [f"{trial['delta_mtl']:+8.2f} %  {_values(trial['values'])}" for trial in shown[:10]]
    best = [f"{key}={json.dumps(value)}" for key, value in shown[0]["values"].items()]
    sets = [word for change in (*changes, *best) for word in ("--set", change)]
    say(
        as_json,
        {**results, "output": folder.shown()},
        f"Delta_MTL of {results['row']} on {results['images']} held-out validation images, {len(shown)} trials:",
        *lines,
        f"All trials: {folder.shown('search.json')}",
        next_step("run", recipe, *sets),
    )


def _values(values: dict[str, object]) -> str:
    return "  ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )
