"""A recipe is checked when it is made."""

from __future__ import annotations

import json
from typing import Any

import pytest

from simomerge.core.errors import InputError
from simomerge.recipes.demo import ALL_TASKS, demo_recipe
from simomerge.recipes.recipe import DEMO_TASKS, Recipe, RecipeError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"realigned": ("tie+heads",)}, "row 'tie.heads' starts with 'tie'; add it to `merges`"),
        ({"realigned": ("ties+head",)}, "is not a merge followed by one or more of"),
        ({"realigned": ("ties",)}, "row 'ties'"),
        ({"merges": ("average",)}, "row 'zero-shot.heads'"),
        ({"merges": ("tie",), "realigned": ()}, "did you mean 'ties'"),
        ({"head": "liner"}, "unknown head 'liner'; choose among: linear, dpt"),
        ({"relate": True, "val_images": 6}, "relate needs at least two tasks, and 16 images"),
        ({"relate": True, "tasks": ("depth",)}, "relate needs at least two tasks"),
        ({"align_split": "test"}, "align_split names the test split"),
        ({"align_split": "train + Testing", "data": "data.yaml"}, "align_split names the test split"),
        ({"align_split": "val+dev", "data": "data.yaml"}, "name each split once"),
        ({"seeds": ()}, "at least one seed"),
        ({"seeds": (1, 2, 1)}, "seeds has 1 twice"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(**changes)


def test_all_mistakes_are_reported_at_once_and_none_that_follows_from_another() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(
            train_images="many",  # type: ignore[arg-type]
            hed="dpt",  # type: ignore[call-arg]
            merges=3,  # type: ignore[arg-type]
            augmentation="flop",
            seeds=(1, 1),
            realigned=("dare+fold",),  # nobody can say whether `merges` has it
            probe={"steps": 0},  # type: ignore[arg-type]
            gallery=("nothing",),
        )
    found = "\n".join(caught.value.problems)
    for message in (
        "train_images is 'many'; give a whole number",
        "unknown key 'hed' (did you mean 'head'",
        "merges is 3; give a list",
        "probe: training: steps must be a number at least 1, got 0",
        "unknown augmentation 'flop'; choose among: none, flip, scale-crop-flip",
        "seeds has 1 twice",
    ):
        assert message in found, found
    assert len(caught.value.problems) == 6


def test_a_recipe_is_plain_data() -> None:
    recipe = Recipe(seeds=(0, 1))
    plain = json.loads(json.dumps(recipe.to_dict()))
    assert plain["probe"]["steps"] == recipe.probe.steps and Recipe(**plain) == recipe


def test_the_demo_is_small_and_the_benchmark_larger() -> None:
    demo, full = demo_recipe(), demo_recipe(ALL_TASKS, "dpt", seeds=3, full=True)
    assert demo.tasks == DEMO_TASKS and demo.seeds == (0,) and demo.head_settings == {"subpixels": 4}
    assert full.tasks == ALL_TASKS and full.seeds == (0, 1, 2) and full.head_settings == {"fusion_channels": 32}
    assert full.train_images > demo.train_images
    assert full.tune.steps > demo.tune.steps
    for phase in ("probe", "tune", "joint"):
        assert getattr(full, phase).steps >= getattr(demo, phase).steps
    assert full.realign["adapters"]["steps"] >= demo.realign["adapters"]["steps"]
    assert "zero-shot+heads" in demo.realigned  # the control: what re-alignment gives without a merge


def test_no_seeds_are_refused() -> None:
    with pytest.raises(InputError, match="at least 1"):
        demo_recipe(seeds=0)


def test_spaces_in_a_row_do_not_matter() -> None:
    recipe = Recipe(realigned=("average+heads(steps=3,lr=0.1)",), gallery=("average+heads( steps=3,  lr=0.1 )",))
    assert recipe.realigned == recipe.gallery == ("average+heads(steps=3, lr=0.1)",)
    assert recipe.realigned == tuple(map(str, recipe.rows))
