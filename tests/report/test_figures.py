"""Figures: they render, they hold what they should, and bad input is told."""

import io
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import matplotlib
import numpy as np
import pytest
from PIL import Image

from report.sample import make_results
from simomerge.core.errors import InputError
from simomerge.report.figures import overview_figure, scale_figure, task_figure

FIGURES = [overview_figure, task_figure, scale_figure]


@pytest.mark.parametrize("draw", FIGURES)
@pytest.mark.parametrize(("seeds", "tasks", "theme"), [(1, 3, "light"), (3, 5, "dark")])
def test_svg_is_whole_and_labelled(draw: Callable[..., bytes], seeds: int, tasks: int, theme: str) -> None:
    results = make_results(seeds, tasks)
    svg = draw(results, theme)
    text = "".join(ElementTree.fromstring(svg).itertext())
    named = results["scale_curves"] if draw is scale_figure else [row["method"] for row in results["rows"]]
    tasks_shown = [] if draw is overview_figure else [task["name"] for task in results["tasks"]]
    assert all(name in text for name in [*named, *tasks_shown])
    assert len(svg) < 200_000


@pytest.mark.parametrize("draw", FIGURES)
def test_png_has_ink_on_the_themes_paper(draw: Callable[..., bytes]) -> None:
    pixels = np.asarray(Image.open(io.BytesIO(draw(make_results(), "dark", "png"))).convert("RGB"))
    assert tuple(pixels[0, 0]) == (0x16, 0x1B, 0x22)
    assert 0.02 < (pixels != pixels[0, 0]).any(-1).mean() < 0.6


def test_same_results_same_bytes_and_settings_are_left_alone() -> None:
    before = dict(matplotlib.rcParams)
    assert overview_figure(make_results()) == overview_figure(make_results())
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("draw", FIGURES)
def test_nothing_to_draw(draw: Callable[..., bytes]) -> None:
    with pytest.raises(InputError, match="nothing to draw"):
        draw({"tasks": [], "rows": [{"method": "ties"}], "scale_curves": {}})


def test_a_row_far_below_is_cut_and_keeps_its_number() -> None:
    rows = [{"method": name, "delta_mtl": {"mean": mean}} for name, mean in (("zero-shot", -900.0), ("ties", -30.0))]
    text = "".join(ElementTree.fromstring(overview_figure({"rows": rows})).itertext())
    assert "◂ -900.0 %" in text and "-30.0 %" in text and "−800" not in text


def test_names_are_no_formulas() -> None:
    row = {"method": r"$\oops$ <b>", "delta_mtl": {"mean": -1.0}}
    assert r"$\oops$ <b>" in "".join(ElementTree.fromstring(overview_figure({"rows": [row]})).itertext())


def test_gaps_in_curves_and_rows_are_gaps() -> None:
    results = make_results(3)
    curve = results["scale_curves"]["ties"]
    curve["delta_mtl"]["mean"][:3] = [None, float("nan"), float("-inf")]
    curve["normalised"].pop("depth")
    curve["chosen"] = []
    del results["rows"][3]["normalised"]["depth"]
    for draw in (scale_figure, task_figure):
        ElementTree.fromstring(draw(results))
