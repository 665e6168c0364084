"""The recipes of the demo and of the benchmark on rooms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from simomerge.core.errors import InputError
from simomerge.recipes.recipe import DEMO_TASKS, Recipe
from simomerge.training.settings import TrainSettings

ALL_TASKS = (*DEMO_TASKS, "edges", "texture")

ROOMS_HEADS: dict[str, dict[str, Any]] = {"linear": {"subpixels": 4}, "dpt": {"fusion_channels": 32}}
"""Head settings that fit rooms: images of 8 x 10 patches need more than one logit per patch, and fewer channels."""


def demo_recipe(
    tasks: tuple[str, ...] = DEMO_TASKS, head: str = "linear", seeds: int = 1, full: bool = False
) -> Recipe:
    """The demo's recipe, or with ``full`` the benchmark's: more images and steps, for figures worth quoting."""
    if seeds < 1:
        raise InputError(f"seeds {seeds}: use at least 1.")
    recipe = Recipe(
        title="simomerge demo",
        output="runs/demo",
        tasks=tasks,
        head=head,
        head_settings=ROOMS_HEADS.get(head, {}),
        seeds=tuple(range(seeds)),
    )
    return full_size(recipe) if full else recipe


def full_size(recipe: Recipe) -> Recipe:
    """A recipe with the benchmark's numbers of images and steps."""
    tune = TrainSettings(steps=400, lr=3e-3, encoder_lr=3e-4, validate_every=100)
    return replace(
        recipe,
        train_images=4000,
        val_images=512,
        test_images=512,
        scale_images=256,
        probe=replace(recipe.probe, steps=120),
        tune=tune,
        joint=tune,
        realign={
            "heads": {"steps": 120, "lr": 1e-3},
            "adapters": {"steps": 150, "lr": 1e-3},
            "distill": {"steps": 200, "count": 512},
            "distill-adapters": {"steps": 120, "count": 512},
            "distill-encoder": {"steps": 300, "lr": 1e-3, "count": 512},
        },
        refine={"heads": {"steps": 120}, "adapters": {"steps": 80}},
        realigned=(
            *recipe.realigned,
            "ties+heads",
            "auto+distill",
            "auto+distill-adapters",
            "task-arithmetic+fold-cross+adapters",
        ),
    )
