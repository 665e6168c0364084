"""A recipe with relations: one more stage per seed, and no other stage is computed again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from simomerge.recipes.graph import read_log
from simomerge.recipes.run import plan_of
from simomerge.recipes.stages import Relate
from simomerge.relations.page import seeds_section
from simomerge.report.page import report_page

from .conftest import MICRO, Finished, on

ENOUGH = replace(MICRO, val_images=16, relate=True)


def test_it_adds_its_own_stages_and_changes_no_other(tiny_base: Path, tmp_path: Path) -> None:
    seeds = replace(ENOUGH, seeds=(0, 1))
    with_it, without = (
        dict.fromkeys(name for name, _ in plan_of(on(recipe, tiny_base), tmp_path))
        for recipe in (seeds, replace(seeds, relate=False))
    )
    assert [name for name in with_it if name not in without] == ["relations seed 0", "relations seed 1"]
    assert [name for name in with_it if name in without] == list(without)


def test_what_is_done_stays_done(tiny_base: Path, finished: Finished) -> None:
    """The folders of the micro run, as a recipe that differs in ``relate`` alone sees them."""
    stages_ = dict(plan_of(on(MICRO, tiny_base), finished.folder))
    assert all(stages_.values())
    # MICRO has too few images to relate on: the plan alone is asked, past the recipe's check.
    more = on(MICRO, tiny_base)
    object.__setattr__(more, "relate", True)
    found = dict(plan_of(more, finished.folder))
    assert [name for name, done in found.items() if not done] == ["relations seed 0"]


@pytest.mark.filterwarnings("ignore:.*the fold stays close")
def test_the_stage_and_its_place_in_the_report(tiny_base: Path, finished: Finished, tmp_path: Path) -> None:
    experts = {task: next((finished.folder / "stages").glob(f"expert-{task}-seed-0-*")) for task in MICRO.tasks}
    data = {"spec": "rooms", "split": "val", "count": 16}
    Relate(name="relations", base=str(tiny_base), experts=experts, data=data).run(tmp_path / "out")
    found = read_log(tmp_path / "out")["relations"]
    assert found["judged_by"] == "labels" and found["tasks"] == list(MICRO.tasks) and found["images"] == 16
    html = report_page(
        finished.results, (), [("Task relationships", seeds_section({"0": json.loads(json.dumps(found))}))]
    )
    assert "Task relationships" in html and found["verdict"][0].split(".")[0] in html
    assert "Task relationships" not in report_page(finished.results)
