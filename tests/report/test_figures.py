"""Figures: they render, contain what they should, follow the page's colours, and report missing results."""

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from report.sample import make_results
from simomerge.core.errors import InputError
from simomerge.report.drawing import PALETTE, inline_svg, png
from simomerge.report.figures import overview_figure, scale_figure, task_figure

FIGURES = [overview_figure, task_figure, scale_figure]
Draw = Callable[[Any], Figure]


def svg(draw: Draw, results: Any, label: str = "Figure") -> str:
    return str(inline_svg(draw(results), label))


def text_of(draw: Draw, results: Any) -> str:
    return "".join(ElementTree.fromstring(svg(draw, results)).itertext())


@pytest.mark.parametrize("draw", FIGURES)
@pytest.mark.parametrize(("seeds", "tasks"), [(1, 3), (3, 5)])
def test_svg_is_complete_and_labelled(draw: Draw, seeds: int, tasks: int) -> None:
    results = make_results(seeds, tasks)
    content = svg(draw, results)
    text = "".join(ElementTree.fromstring(content).itertext())
    named = results["scale_curves"] if draw is scale_figure else [row["method"] for row in results["rows"]]
    tasks_shown = [] if draw is overview_figure else [task["name"] for task in results["tasks"]]
    assert all(name in text for name in [*named, *tasks_shown])
    assert len(content) < 200_000


@pytest.mark.parametrize("draw", FIGURES)
def test_all_colours_follow_the_page(draw: Draw) -> None:
    content = svg(draw, make_results(3))
    assert not re.search(r"#[0-9a-fA-F]{6}\b|\brgb\(|black|white", content)
    assert set(re.findall(r"var\(--([a-z-]+)\)", content)) <= {*PALETTE, "font"}
    assert len({light for light, _ in PALETTE.values()}) == len(PALETTE)


@pytest.mark.parametrize("draw", FIGURES)
def test_two_figures_of_a_page_share_no_id(draw: Draw) -> None:
    first, second = (svg(draw, make_results(), label) for label in ("The <first>", "second"))
    ids = set(re.findall(r' id="([^"]+)"', first))
    assert ids and not ids & set(re.findall(r' id="([^"]+)"', second))
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', first))
    assert {name for pair in used for name in pair if name} <= ids
    assert 'role="img"' in first and 'aria-label="The &lt;first&gt;"' in first and "<style" not in first


@pytest.mark.parametrize("draw", FIGURES)
def test_png_has_ink_on_light_paper(draw: Draw) -> None:
    pixels = np.asarray(Image.open(io.BytesIO(png(draw(make_results())))).convert("RGB"))
    assert tuple(pixels[0, 0]) == (0xFF, 0xFF, 0xFF)
    assert 0.02 < (pixels != pixels[0, 0]).any(-1).mean() < 0.6


def test_same_results_same_bytes_and_settings_are_left_alone() -> None:
    before = dict(matplotlib.rcParams)
    assert svg(overview_figure, make_results()) == svg(overview_figure, make_results())
    assert png(overview_figure(make_results())) == png(overview_figure(make_results()))
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("draw", FIGURES)
def test_nothing_to_draw(draw: Draw) -> None:
    with pytest.raises(InputError, match="nothing to draw"):
        draw({"tasks": [], "rows": [{"method": "ties"}], "scale_curves": {}})


def test_a_row_far_below_is_cut_and_keeps_its_number() -> None:
    rows = [{"method": name, "delta_mtl": {"mean": mean}} for name, mean in (("zero-shot", -900.0), ("ties", -30.0))]
    text = text_of(overview_figure, {"rows": rows})
    assert "◂ -900.0 %" in text and "-30.0 %" in text and "−800" not in text


def test_names_are_not_parsed_as_formulas() -> None:
    row = {"method": r"$\oops$ <b>", "delta_mtl": {"mean": -1.0}}
    assert r"$\oops$ <b>" in text_of(overview_figure, {"rows": [row]})


def test_gaps_in_curves_and_rows_are_gaps() -> None:
    results = make_results(3)
    curve = results["scale_curves"]["ties"]
    curve["delta_mtl"]["mean"][:3] = [None, float("nan"), float("-inf")]
    curve["normalised"].pop("depth")
    curve["chosen"] = []
    del results["rows"][3]["normalised"]["depth"]
    for draw in (scale_figure, task_figure):
        assert "ties" in text_of(draw, results)
