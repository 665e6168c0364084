"""Tasks of one name are the same only if they have one kind, as many channels, and one order of classes."""

from __future__ import annotations

import re

import pytest

from simomerge.core.errors import InputError
from simomerge.datasets.comparison import check_same_task
from simomerge.datasets.tasks import Task
from simomerge.training.evaluate import shared_tasks


def street(*classes: str) -> Task:
    return Task("street", "segmentation", classes=classes)


ROAD = street("road", "traffic light", "sky")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (
            ("road", "sky", "traffic light"),
            "task 'street': class 1 is 'traffic light' in the model, but 'sky' in the data, which has the same classes"
            " in another order. A label is the number of its class: list the classes of the data in the order of the"
            " model, and number its labels by it.",
        ),
        (
            ("road", "traffic light", "tree"),
            "task 'street': class 2 is 'sky' in the model, but 'tree' in the data. If both mean the same class, give it"
            " one name; otherwise use a model or an expert of the classes of the data.",
        ),
        (("class_0", "tree", "class_2"), "class 1 is 'traffic light' in the model, but 'tree' in the data. If both"),
        (("road", "sky"), "task 'street' is segmentation of 3 channels in the model, but segmentation of 2 in the dat"),
    ],
)
def test_other_classes_and_another_order_are_refused(classes: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        check_same_task(ROAD, street(*classes), "model", "data")


@pytest.mark.parametrize(
    "classes",
    [
        ("road", "traffic light", "sky"),
        ("Road", "Traffic_Light", "SKY"),
        ("road", "traffic-light", "sky"),
        ("class_0", "class_1", "class_2"),
        ("LABEL_0", "LABEL_1", "LABEL_2"),
        ("7", "8", "11"),
        ("class_0", "traffic light", "class_2"),
    ],
)
def test_spellings_and_generated_names_are_no_difference(classes: tuple[str, ...]) -> None:
    assert shared_tasks({"street": ROAD}, {"street": street(*classes)}) == ["street"]
    assert shared_tasks({"street": street(*classes)}, {"street": ROAD}) == ["street"]


def test_classes_without_meaning_elsewhere_are_not_compared() -> None:
    named = Task("depth", classes=("near", "far"))
    check_same_task(named, Task("depth"), "model", "data")
    check_same_task(Task("depth"), named, "model", "data")
