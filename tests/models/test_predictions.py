"""Predictions are a dictionary, and in a notebook they are pictures with legends."""

from __future__ import annotations

import base64
import io
import pickle
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simomerge.datasets.colours import colourise
from simomerge.datasets.tasks import KINDS, Task
from simomerge.models.predictions import Predictions

PARTS = Task("parts", "segmentation", classes=("wall", "<script>", "rug"))


def test_predict_returns_a_dictionary_that_displays_itself(make_model: Any) -> None:
    model = make_model([Task("depth"), PARTS])
    found = model.predict(np.zeros((16, 24, 3), np.uint8))
    assert isinstance(found, dict) and list(found) == ["depth", "parts"] and found["depth"].shape == (16, 24)
    assert list(model.predict(np.zeros((16, 24, 3), np.uint8), tasks=["parts"]).tasks) == ["parts"]
    assert found._repr_html_().count("<img alt=") == 2


def test_pictures_have_the_colours_of_all_others_and_names_are_escaped() -> None:
    labels = np.array([[0, 1], [1, 0]])
    html = Predictions({"parts": PARTS}, {"parts": labels})._repr_html_()
    content = re.search(r"base64,([^\"]+)", html)
    assert content is not None
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(content[1]))))
    np.testing.assert_array_equal(shown, colourise(PARTS, labels))
    assert "&lt;script&gt;" in html and "<script>" not in html


def test_predictions_survive_pickling() -> None:
    found = Predictions({"depth": Task("depth"), "other": Task("edges")}, {"depth": np.ones((2, 2), np.float32)})
    again = pickle.loads(pickle.dumps(found))
    assert list(again.tasks) == ["depth"] and again._repr_html_() == found._repr_html_()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_is_shown(kind: str) -> None:
    task = Task("task", kind, classes=("a", "b") if kind == "segmentation" else ())
    shape = (4, 6) if task.channels == 1 or kind == "segmentation" else (task.channels, 4, 6)
    values = np.zeros(shape, np.int64) if kind == "segmentation" else np.linspace(0, 1, int(np.prod(shape)), dtype="f4")
    assert "<figcaption>" in Predictions({"task": task}, {"task": values.reshape(shape)})._repr_html_()


def test_scores_and_relations_display_themselves() -> None:
    from simomerge.relations.relations import Relations
    from simomerge.training.evaluate import TaskScores

    scores = TaskScores({"parts": PARTS}, {"parts": {"miou": 51.25, "pixel_accuracy": 70.0}})
    wanted = "<tr><th>parts</th><td>miou</td><td>51.25 %</td><td>higher</td><td>pixel_accuracy 70</td></tr>"
    assert wanted in scores._repr_html_() and scores == {"parts": {"miou": 51.25, "pixel_accuracy": 70.0}}
    assert pickle.loads(pickle.dumps(scores))._repr_html_() == scores._repr_html_()
    assert Relations(["a", "b"])._repr_html_().count("<table>") == 0
