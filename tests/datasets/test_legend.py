"""Legends: the colours that they show are those of the pictures, and they fit the picture's width."""

from __future__ import annotations

import numpy as np
import pytest

from simomerge.datasets.colours import colourise
from simomerge.datasets.legend import NARROWEST, legend_of, lines_of, with_legend
from simomerge.datasets.tasks import Task

PARTS = Task("parts", "segmentation", classes=("head", "arm", "leg"))
MANY = Task("many", "segmentation", classes=tuple(f"class {n}" for n in range(40)))


def test_classes_have_the_colours_of_the_picture() -> None:
    labels = np.array([[0, 1, 2]])
    picture = colourise(PARTS, labels)[0].tolist()
    assert [list(colour) for _, colour in legend_of(PARTS, labels).entries] == picture


def test_of_many_classes_those_that_occur_are_listed() -> None:
    labels = np.array([[39, -1, 3]])
    assert [name for name, _ in legend_of(MANY, labels).entries] == ["class 3", "class 39"]
    assert len(legend_of(MANY, None).entries) == 40


@pytest.mark.parametrize("kind", ["depth", "disparity", "log_depth", "edges", "texture", "keypoints", "regression"])
def test_a_bar_begins_and_ends_with_the_colours_of_the_extremes(kind: str) -> None:
    task, values = Task("map", kind), np.array([[0.25, 0.75, 0.5]], np.float32)
    legend, picture = legend_of(task, values), colourise(task, values)[0]
    assert legend.bar[0].tolist() == picture[0].tolist() and legend.bar[-1].tolist() == picture[1].tolist()
    assert legend.low == "0.25" and legend.high.split()[0] == "0.75"


def test_a_bar_has_the_range_that_the_picture_was_given() -> None:
    legend = legend_of(Task("depth"), np.array([[2.0, 3.0]], np.float32), (1.0, 8.0))
    assert (legend.low, legend.high) == ("1", "8 m")


def test_invalid_pixels_do_not_decide_a_range() -> None:
    values = np.array([[0.0, np.nan, 2.0, 4.0]], np.float32)
    assert legend_of(Task("depth"), values).low == "2"
    assert legend_of(Task("depth"), np.zeros((1, 3), np.float32)).high == "1 m"  # nothing is valid


def test_lengths_of_many_channels_have_their_own_range() -> None:
    task = Task("embedding", "regression", channels=4, range=(0, 1))
    values = np.zeros((4, 1, 2), np.float32)
    values[:, 0, 1] = 2.0
    legend, picture = legend_of(task, values), colourise(task, values)[0]
    assert (legend.low, legend.high) == ("0", "4") and legend.bar[-1].tolist() == picture[1].tolist()


def test_directions_have_the_colours_of_their_vectors() -> None:
    x = np.array([1, 0, 0], np.float32)[:, None, None]
    assert dict(legend_of(Task("normals"), x).entries)["+x"] == tuple(colourise(Task("normals"), x)[0, 0])
    down = np.array([0, 3], np.float32)[:, None, None]
    assert dict(legend_of(Task("flow"), down).entries)["down"] == tuple(colourise(Task("flow"), down)[0, 0])


def test_pictures_explain_themselves() -> None:
    values = np.full((3, 2, 2), 0.5, np.float32)
    picture = colourise(Task("albedo"), values)
    assert not legend_of(Task("albedo"), values) and with_legend(picture, legend_of(Task("albedo"), values)) is picture


@pytest.mark.parametrize("width", [NARROWEST, 400, 1300])
def test_lines_fit_the_width_and_lose_nothing(width: int) -> None:
    legend = legend_of(MANY, None)
    lines = lines_of(legend, width)
    assert [text for line in lines for _, text, _ in line] == ["many:", *(name for name, _ in legend.entries)]
    assert all(line[-1][0] + 7 * len(line[-1][1]) <= width for line in lines)


def test_the_legend_of_a_large_picture_has_larger_letters() -> None:
    values = np.linspace(1, 4, 30 * 2000, dtype=np.float32).reshape(30, 2000)
    legend = legend_of(Task("depth"), values)
    picture = colourise(Task("depth"), values)
    small, large = with_legend(picture[:, :600], legend), with_legend(picture, legend)
    assert small.shape[0] - 30 == 24 and large.shape == (30 + 3 * 24, 2000, 3)
    assert (large[:30] == picture).all()
    np.testing.assert_array_equal(large[30::3, :1800:3], small[30:, :600])
