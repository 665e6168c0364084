"""What the page shows: the values under the pointer are the predictions, and the colours have legends."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simomerge.datasets.tasks import Task
from simomerge.playground.view import view_of
from simomerge.playground.workshop import Look

PARTS = Task("parts", "segmentation", classes=("wall", "floor", "rug"), colours=((255, 0, 0), (0, 255, 0), (0, 0, 255)))


def decoded(values: dict[str, Any], grid: list[int]) -> np.ndarray:
    """The grid that the page reads, by its own description: 16 bits, 65535 is none, low + step * value."""
    raw = np.frombuffer(base64.b64decode(values["data"]), "<u2").reshape(values["planes"], grid[1], grid[0])
    return np.where(raw == 65535, np.nan, values["low"] + values["step"] * raw.astype(float))


def view(task: Task, values: np.ndarray, other: np.ndarray | None = None) -> dict[str, Any]:
    height, width = values.shape[-2:]
    columns = {"experts": {task.name: values}}
    if other is not None:
        columns["merged"] = {task.name: other}
    found = view_of(Look(np.zeros((height, width, 3), np.uint8), {task.name: task}, columns))
    return {**found, **found["tasks"][0]}


def test_values_are_the_predictions_within_half_a_step() -> None:
    depth = np.random.default_rng(0).uniform(0.5, 80, (60, 100)).astype(np.float32)
    found = view(Task("depth"), depth)
    assert found["grid"] == [100, 60]
    values = found["values"]["experts"]
    np.testing.assert_allclose(decoded(values, found["grid"])[0], depth, atol=values["step"] * 0.51)


def test_large_maps_are_sampled_at_the_centres_of_cells() -> None:
    rows, columns = np.mgrid[:256, :512]
    found = view(Task("flow"), np.stack([columns, rows]).astype(np.float32))
    assert found["grid"] == [128, 64]
    x, y = decoded(found["values"]["experts"], found["grid"])
    np.testing.assert_allclose(x[0], np.arange(128) * 4 + 2, atol=0.02)
    np.testing.assert_allclose(y[:, 0], np.arange(64) * 4 + 2, atol=0.02)


def test_what_is_no_number_has_no_value() -> None:
    values = np.array([[np.nan, 1.0], [np.inf, 3.0]], np.float32)
    found = view(Task("wind", "regression", unit="m/s"), values)
    np.testing.assert_allclose(decoded(found["values"]["experts"], [2, 2])[0], [[np.nan, 1], [np.nan, 3]], atol=1e-4)


def test_labels_are_exact_and_the_legend_names_them() -> None:
    labels = np.array([[0, 2], [2, 0]])
    found = view(PARTS, labels)
    assert decoded(found["values"]["experts"], [2, 2])[0].tolist() == labels.tolist()
    names = [("wall", "#ff0000"), ("floor", "#00ff00"), ("rug", "#0000ff")]
    assert found["legend"] == {"names": [{"name": name, "colour": colour} for name, colour in names]}
    kind, _, content = found["pictures"]["experts"].partition(";base64,")
    assert kind == "data:image/png"
    colours = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
    assert colours.tolist() == [[[255, 0, 0], [0, 0, 255]], [[0, 0, 255], [255, 0, 0]]]


def test_columns_share_the_colours_of_the_first() -> None:
    low, high = np.full((2, 2), 1.0, np.float32), np.full((2, 2), 9.0, np.float32)
    low[0, 0] = 3
    found = view(Task("depth"), low, high)
    assert (found["legend"]["low"], found["legend"]["high"], found["unit"]) == ("1", "3 m", "m")
    assert len(found["legend"]["ramp"]) == 9


@pytest.mark.parametrize(
    ("task", "shape"),
    [
        (Task("normals"), (3, 4, 6)),
        (Task("edges"), (4, 6)),
        (Task("albedo"), (3, 4, 6)),
        (Task("many", "regression", channels=5), (5, 4, 6)),
    ],
)
def test_every_kind_has_a_picture_and_values(task: Task, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(1).uniform(0, 1, shape).astype(np.float32)
    found = view(task, values)
    assert found["pictures"]["experts"].startswith("data:image/webp;base64,")
    np.testing.assert_allclose(decoded(found["values"]["experts"], [6, 4]).reshape(shape), values, atol=1e-4)
