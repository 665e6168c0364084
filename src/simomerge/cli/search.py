"""simomerge search"""

from __future__ import annotations

import json
from pathlib import Path

import click

from simomerge.cli.options import console, json_option, say, workers_option


@click.command("search")
@click.argument("recipe")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Replace a value, as search.trials=50.")
@click.option("--storage", help="Storage of the study: a file, or an Optuna URL. [default: search.log in OUT]")
@click.option("--seed", type=int, help="Seed of the sampler; give every machine of a study a different one, or none.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder (OUT). [default: the recipe's + -search]")
@workers_option
@json_option
def command(
    recipe: str,
    changes: tuple[str, ...],
    storage: str | None,
    seed: int | None,
    output: Path | None,
    workers: int | None,
    as_json: bool,
) -> None:
    """Search the values that RECIPE names under `search`, by Optuna, on held-out validation images.

    A second call resumes the study, and another machine with the same --storage joins it. docs/recipes.md says
    what a search holds.
    """
    from simomerge.recipes.file import read_recipe
    from simomerge.recipes.search import search_recipe

    folder = output or Path(read_recipe(recipe, changes).output + "-search")
    with console():
        results = search_recipe(recipe, folder, changes, storage, seed, workers)
    shown = [trial for trial in results["trials"] if trial["delta_mtl"] is not None]
    lines = [f"{trial['delta_mtl']:+8.2f} %  {_values(trial['values'])}" for trial in shown[:10]]
    sets = " ".join(f"--set {key}={json.dumps(value)}" for key, value in shown[0]["values"].items())
    say(
        as_json,
        {**results, "output": str(folder)},
        f"Delta_MTL of {results['row']} on {results['images']} held-out validation images, {len(shown)} trials:",
        *lines,
        f"All trials: {folder / 'search.json'}",
        f"Next: simomerge run {recipe} {sets}",
    )


def _values(values: dict[str, object]) -> str:
    return "  ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )
