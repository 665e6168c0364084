"""Draw the pictures of README and docs:

    simomerge demo --tasks all --head dpt --full -o runs/rooms-dpt
    python benchmarks/pictures.py runs/rooms-dpt

docs/pictures/rooms.png shows test images with their labels. docs/pictures/story.png shows one of them with the ground
truth and the predictions of the experts, the merged model and the folded model.

    PYTHONPATH=examples python benchmarks/pictures.py PHOTO MERGED REPAIRED TASK=EXPERT...

docs/pictures/photo.png shows what experts, their merge and the repaired merge predict for a photo.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from simomerge.core.classes import trust
from simomerge.datasets import DenseDataset, load_data
from simomerge.datasets.colours import colourise
from simomerge.datasets.legend import legend_of
from simomerge.datasets.sheet import sheet
from simomerge.models.model import load
from simomerge.recipes.recipe import Recipe
from simomerge.recipes.run import run_recipe

PICTURES = Path("docs/pictures")
STORY_TASKS = ("segmentation", "depth", "normals", "edges")
STORY_COLUMNS = {
    "truth": "{task}: truth",
    "experts": "its own expert",
    "task-arithmetic": "merged",
    "task-arithmetic+fold-cross": "merged and repaired",
}
PHOTO_SIZE = (160, 240)
"""Height and width to which a photo is resized for the encoder: about the size of the experts' training images."""
LABELS = ["segmentation", "depth", "normals", "edges", "texture", "keypoints"]


def in_row(tiles: list[np.ndarray], gap: int) -> np.ndarray:
    """Put tiles (H, W, 3) of one height into a row, with white gaps between them."""
    white = np.full((tiles[0].shape[0], gap, 3), 255, np.uint8)
    return np.concatenate([part for tile in tiles for part in (tile, white)][:-1], axis=1)


def in_column(rows: list[np.ndarray], gap: int) -> np.ndarray:
    return in_row([row.transpose(1, 0, 2) for row in rows], gap).transpose(1, 0, 2)


def labels(data: DenseDataset, index: int) -> np.ndarray:
    """One image and its labels in a row."""
    sample = data[index]
    tiles = [(sample["image"].permute(1, 2, 0).numpy() * 255).astype(np.uint8)]
    for name, task in data.tasks.items():
        values = sample[name].numpy()
        limits = (float(values.min()), float(values.max())) if task.kind == "depth" else (0.0, 1.0)
        tiles.append(colourise(task, values, limits))
    return in_row(tiles, 2)


def rooms_picture() -> None:
    data = load_data("rooms", split="test", count=256, tasks=LABELS)
    rows = [in_row([labels(data, 2 * row), labels(data, 2 * row + 1)], 6) for row in range(7)]
    Image.fromarray(in_column(rows, 3)).save(PICTURES / "rooms.png", optimize=True)


def story_rows(shown: dict[str, Any], tasks: tuple[str, ...] = STORY_TASKS) -> list[list[tuple[str, np.ndarray]]]:
    """The pictures of one entry of the gallery with their titles: a row per task, a column per model."""
    rows = []
    for index, task in enumerate(tasks):
        maps = shown["predictions"][task]
        first = ("input, a rendered room", shown["image"]) if index == 0 else ("", np.full_like(shown["image"], 255))
        rows.append([first, *((title.format(task=task), maps[column]) for column, title in STORY_COLUMNS.items())])
    return rows


def story_picture(folder: Path) -> None:
    recipe = Recipe(**json.loads((folder / "results.json").read_text())["recipe"])
    gallery = run_recipe(recipe, folder)["gallery"]  # all stages are finished
    sheet(story_rows(gallery[0]), 128).save(PICTURES / "story.png", optimize=True)


def photo_picture(photo: str, merged: str, repaired: str, *experts: str) -> None:
    """A row per task, with the colours of its expert's range, and the legends of the classes."""
    trust()
    found = {task: load(folder) for task, _, folder in (pair.partition("=") for pair in experts)}
    columns = {"merged": load(merged), "merged and repaired": load(repaired)}
    image = np.asarray(Image.open(photo).convert("RGB"))
    rows, legends = [], []
    for task, expert in found.items():
        about, wanted = expert.tasks[task], expert.predict(photo, size=PHOTO_SIZE)[task]
        limits = (float(wanted.min()), float(wanted.max()))
        maps = {f"its own expert: {task}": wanted}
        maps |= {title: model.predict(photo, tasks=[task], size=PHOTO_SIZE)[task] for title, model in columns.items()}
        first = ("input", image) if not rows else ("", np.full_like(image, 255))
        rows.append([first, *((title, colourise(about, values, limits)) for title, values in maps.items())])
        legends += [legend_of(about, wanted)] if about.kind == "segmentation" else []
    sheet(rows, 136, legends).save(PICTURES / "photo.png", optimize=True)


if __name__ == "__main__":
    PICTURES.mkdir(parents=True, exist_ok=True)
    if len(sys.argv) > 2:
        photo_picture(*sys.argv[1:])
    else:
        rooms_picture()
        story_picture(Path(sys.argv[1]))
