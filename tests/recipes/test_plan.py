"""Which images each stage of a plan uses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from simomerge.recipes.plan import Plan
from simomerge.recipes.stages import Merge, MergeWithoutLabels, Realign

from .conftest import MICRO

COUNTS = {"train": 16, "val": 6, "test": 5}  # those of the micro recipe
RECIPE = replace(
    MICRO,
    realigned=(
        "task-arithmetic+heads",
        *("task-arithmetic+fold(count=3)", "task-arithmetic+fold-cross", "task-arithmetic+distill", "auto"),
        *("learned", "learned+fold(count=5)"),
    ),
    realign={"fold-cross": {"count": 12}, "distill": {"count": None}},
    choose_images=8,
    auto_images=99,
)


def data_of(**changes: Any) -> dict[str, dict[str, Any]]:
    """Row -> the images that its last stage uses."""
    splits = {split: {"spec": "rooms", "split": split, "count": count} for split, count in COUNTS.items()}
    found = {}
    for (_, row), stage in Plan(replace(RECIPE, **changes), "base", splits).models.items():
        if isinstance(stage, Merge | MergeWithoutLabels | Realign):
            found[row] = getattr(stage, {Merge: "validation", MergeWithoutLabels: "images"}.get(type(stage), "data"))
    return found


@pytest.mark.parametrize(("split", "most"), [("val", 6), ("train", 16)])
def test_rows_without_labels_use_images_of_the_align_split(split: str, most: int) -> None:
    found = data_of(align_split=split)
    counts = {
        "task-arithmetic without labels": min(8, most),
        "task-arithmetic+fold(count=3)": 3,
        "task-arithmetic+fold-cross": min(12, most),
        "task-arithmetic+distill": most,
        "auto": most,
        "learned": most,
        "learned+fold(count=5)": 5,
    }
    for row, count in counts.items():
        assert found[row] == {"spec": "rooms", "split": split, "count": count, "tasks": []}, row
    for row in ("task-arithmetic", "task-arithmetic+heads"):  # those with labels stay on the validation split
        assert found[row]["split"] == "val" and found[row].get("tasks") != [] and found[row]["count"] == 6
    assert len(found) == len(counts) + 3  # and the average


def test_rows_without_labels_use_training_and_validation_images_by_default() -> None:
    found = data_of()
    assert found == data_of(align_split="train+val") != data_of(align_split="train")
    assert found["auto"]["split"] == {"train": 16, "val": 6} and found["task-arithmetic+distill"]["count"] is None


def test_rows_without_labels_may_use_a_folder_of_pictures() -> None:
    found = data_of(align_images="photos")
    assert found["task-arithmetic+fold-cross"] == {"spec": "photos", "count": 12, "unlabelled": True}
    assert found["task-arithmetic+heads"]["spec"] == "rooms"
