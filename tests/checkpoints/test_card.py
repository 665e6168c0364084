"""What a model card claims about the data that a model learned from."""

from __future__ import annotations

from typing import Any

import pytest

from simomerge.checkpoints.card import learned_rooms, model_card

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
