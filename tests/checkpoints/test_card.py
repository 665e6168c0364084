"""What a model card claims about the data that a model learned from."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import simomerge as sm
from simomerge.checkpoints.card import is_model_card, learned_rooms, model_card
from simomerge.checkpoints.description import read_description, record_evaluation
from simomerge.core.caution import Caution
from simomerge.core.errors import InputError

ROOMS = "It has seen rendered toy rooms only"
MEASURED = {"data": "bedrooms", "split": "test", "images": 8, "metrics": []}


def card(provenance: dict[str, Any], **more: Any) -> str:
    return model_card({"tasks": {}, "heads": {}, "encoder": {}, "provenance": provenance, **more})


@pytest.mark.parametrize(
    ("provenance", "rooms"),
    [
        ({"training": {"data": "rooms", "renderer": 1}}, True),
        ({"base": {"source": "rooms-base"}, "merge": {"method": "ties"}}, True),
        ({"training": {"data": "bedrooms"}}, False),
        ({"training": {"data": "rooms"}}, False),  # a folder of that name
        ({"training": {"data": "photos"}, "base": {"source": "rooms-base"}}, False),
        ({"base": {"source": "someone/bedrooms-base"}}, False),
        ({}, False),
    ],
)
def test_only_the_built_in_dataset_counts_as_rooms(provenance: dict[str, Any], rooms: bool) -> None:
    assert learned_rooms(provenance) == rooms == (ROOMS in card(provenance))


def test_data_of_the_evaluation_are_not_called_training_data() -> None:
    limits = card({}, evaluation={**MEASURED, "data": "rooms"}).partition("## Intended use")[2]
    assert "its experts were trained on. On others" in limits and ROOMS not in limits
    trained = card({"training": {"data": "kitchens"}}, evaluation=MEASURED).partition("## Intended use")[2]
    assert "its experts were trained on (kitchens)." in trained


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ("{card}", True),
        ("# Notes\n{card}", False),
        ("# Notes\nIt was made with simomerge.\n", False),
        ("---\nlicense: mit\n---\nIt was made with simomerge.\n", False),
        ("---\nlibrary_name: simomerge\n---\n# Notes\n", False),
    ],
)
def test_figures_replace_only_a_card_of_simomerge(text: str, ours: bool, make_model: Any, tmp_path: Path) -> None:
    folder = make_model([sm.Task("depth")]).save_pretrained(tmp_path / "scene")
    readme = folder / "README.md"
    readme.write_text(text.replace("{card}", readme.read_text()))
    before = readme.read_text()
    assert is_model_card(readme) == ours
    evaluation = {"data": "photos", "split": "test", "images": 8, "metrics": []}
    with nullcontext() if ours else pytest.warns(Caution, match=r"README\.md is no model card of simomerge and stays"):
        record_evaluation(folder, evaluation)
    assert read_description(folder)["evaluation"] == evaluation and (readme.read_text() == before) == (not ours)
    readme.unlink()
    record_evaluation(folder, evaluation)
    assert is_model_card(readme)


def test_figures_of_another_model_and_no_numbers_are_not_recorded(make_model: Any, tmp_path: Path) -> None:
    model = make_model([sm.Task("depth")])
    folder = model.save_pretrained(tmp_path / "scene")
    measured, before = read_description(folder), (folder / "simo.json").read_text()
    row = {"task": "depth", "metric": "abs_err", "unit": "m", "value": float("nan"), "higher_is_better": False}
    evaluation = {"data": "photos", "split": "test", "images": 8, "metrics": [row]}
    with pytest.raises(InputError, match="scene: the figures cannot be recorded, for it could not be read again"):
        record_evaluation(folder, evaluation)
    assert (folder / "simo.json").read_text() == before
    row["value"] = 0.5
    record_evaluation(folder, evaluation, measured)
    record_evaluation(folder, evaluation, measured)  # earlier figures do not make it another model
    model.provenance = {"training": {"images": 9}}
    model.save_pretrained(folder, overwrite=True)
    with pytest.raises(InputError, match="scene: holds another model than the one that was measured; evaluate it"):
        record_evaluation(folder, evaluation, measured)
    assert "evaluation" not in read_description(folder)
    model.provenance = {"merge": {"tried": [{"agreement": float("-inf")}]}}
    with pytest.raises(InputError, match="the model cannot be saved, for it could not be read again: Out of range"):
        model.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()
