"""Figures, page and terminal lines of relate: complete, self-contained, and only on measured sections."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from simomerge.relations.figures import (
    cka_figure,
    cosine_figure,
    norm_figure,
    pair_figure,
    sharing_figure,
    sweep_figure,
)
from simomerge.relations.page import FIGURES, relation_tables, seeds_section, write_relations
from simomerge.report.drawing import NothingToDraw, inline_svg, png
from simomerge.report.table import aligned

Draw = Callable[[Any], Figure]
DRAWN = [sweep_figure, pair_figure, norm_figure, cosine_figure, cka_figure, sharing_figure]


def sample(count: int = 4) -> dict[str, Any]:
    """A result of relate with random numbers; one is missing."""
    rng = np.random.default_rng(0)
    tasks = ["depth", "normals", "a task <with> $a$ long name", "edges", "texture", "parts", "seg", "boxes"][:count]

    def table(size: int) -> list[list[Any]]:
        return rng.uniform(-0.2, 0.9, (size, size)).round(3).tolist()

    def part(name: str) -> dict[str, Any]:
        numbers = {key: rng.random(count).tolist() for key in ("norms", "relative")}
        return {"name": name, **numbers, **{k: table(count) for k in ("cosine", "conflict", "weighted_conflict")}}

    curves = {a: {b: rng.random(4).tolist() for b in tasks} for a in tasks}
    curves[tasks[0]][tasks[1]][2] = None
    merges = [{"tasks": [a, b], "gains": {a: -2.0, b: -1.5}, "scale": 0.4} for a, b in combinations(tasks, 2)]
    choices = [
        {"budget": k, "groups": [tasks[: count - k + 1], *([t] for t in tasks[count - k + 1 :])], "gain": k - count,
         "gains": dict.fromkeys(tasks, float(k - count)), "measured": k != 2}
        for k in range(1, count + 1)
    ]  # fmt: skip
    together, apart = "+".join(tasks), ", ".join(tasks)
    shared = [
        {"budget": cost, "cost": cost, "tree": tree, "shared": dict.fromkeys(tasks, blocks),
         "gain": gain, "gains": dict.fromkeys(tasks, gain)}
        for cost, tree, blocks, gain in (
            (1.0, f"3: {together}", 3, -4.0),
            ((2 + count) / 3, f"2: {together} | 3: {apart}", 2, -1.0),
            (float(count), f"3: {apart}", 0, 0.0),
        )
    ]  # fmt: skip
    return {
        "format": 1, "tasks": tasks, "judged_by": "labels", "images": 16, "judged_images": 8,
        "verdict": ["One encoder would do.", "So would two."],
        "groups": {"merges": merges, "choices": choices},
        "sweeps": {
            "lambdas": [0, 0.5, 1, 1.5], "performance": curves, "kept": 0.9, "peaks": dict.fromkeys(tasks, 1.0),
            "widths": dict.fromkeys(tasks, 0.7), "effects": {a: {b: 0.1 for b in tasks if b != a} for a in tasks},
        },
        "geometry": [part(name) for name in ("all", "outside", "1", "2", "3")],
        "cka": {"names": ["base", *tasks], "taps": [2, 4], "cka": [table(count + 1), table(count + 1)], "images": 8},
        "alignment": [{"task": "depth", "tap": 2, "r2_before": 0.1, "r2_after": 0.9, "cka_before": None,
                       "cka_after": 0.8}],
        "sharing": shared,
    }  # fmt: skip


@pytest.mark.parametrize("draw", DRAWN)
@pytest.mark.parametrize("count", [2, 4, 8])
def test_svg_is_complete_labelled_and_follows_the_page(draw: Draw, count: int) -> None:
    found = sample(count)
    svg = str(inline_svg(draw(found), "a figure"))
    text = "".join(ElementTree.fromstring(svg).itertext())
    assert all(task[:12] in text for task in found["tasks"])
    assert not re.search(r"#[0-9a-fA-F]{6}\b|<image", svg)


@pytest.mark.parametrize("draw", DRAWN)
def test_png_has_ink_and_missing_sections_are_reported(draw: Draw) -> None:
    pixels = np.asarray(Image.open(io.BytesIO(png(draw(sample())))).convert("RGB"))
    assert 0.01 < (pixels != pixels[0, 0]).any(-1).mean() < 0.9
    with pytest.raises(NothingToDraw, match="was not measured: nothing to draw"):
        draw({"tasks": ["a", "b"]})


def test_the_folder_holds_everything_and_the_page_needs_nothing_else(tmp_path: Path) -> None:
    found = sample()
    page = write_relations(tmp_path / "related", found)
    assert {path.name for path in page.parent.iterdir()} == {
        "relate.html", "relate.json", *(f"{heading.lower()}.png" for heading in FIGURES)
    }  # fmt: skip
    assert json.loads((page.parent / "relate.json").read_text()) == found
    html = page.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html) and "<script" not in html
    assert "One encoder would do." in html and "a task &lt;with&gt; $a$ long name" in html and "<with>" not in html
    assert html.count("<figure>") == html.count("<svg ") == 6
    assert html.count("<pre>") == 3 and "\n|-- block 3: a task &lt;with&gt; $a$ long name\n" in html
    assert html.count(", recommended</h3>") == 1 and "<h3>2.00 encoders: -1.0 %, recommended</h3>" in html
    assert "<h2>Shared blocks (Delta_MTL on 8 labelled images)</h2>" in html
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_the_curve_says_what_it_measures_and_marks_the_recommended_tree() -> None:
    axes = sharing_figure(sample()).axes[0]
    assert axes.get_title(loc="left") == "Delta_MTL on 8 labelled images: mean (thick) and by task"
    *_, ring, _ = axes.lines
    assert ring.get_xydata().tolist() == [[2.0, -1.0]] and axes.get_xlim() == (0.95, 4.05)
    estimate = sharing_figure(sample() | {"judged_by": "the experts' predictions"}).axes[0]
    assert estimate.get_title(loc="left").startswith("agreement with the experts, an estimate without labels: ")


def test_only_what_was_measured_is_shown(tmp_path: Path) -> None:
    found = {key: sample()[key] for key in ("format", "tasks", "judged_by", "images", "verdict", "geometry")}
    page = write_relations(tmp_path, found)
    assert {path.name for path in tmp_path.iterdir()} == {"relate.html", "relate.json", "norms.png", "cosines.png"}
    assert page.read_text().count("<figure>") == 2
    assert not any("encoders" in head for _, (head, *_) in relation_tables(found))


def test_tables_for_a_terminal() -> None:
    lines = [line for _, table in relation_tables(sample()) for line in aligned(table)]
    assert any(re.match(r" +1 +-3.0 +depth \+ normals", line) for line in lines)
    assert any(re.match(r" +2 +-2.0 \*", line) for line in lines)  # predicted, not measured
    assert any(re.match(r"depth +2 +0.100 +0.900 +– +0.800", line) for line in lines)
    assert any(re.match(r" *2.00 +-1.0 +2: depth\+normals\+.* \| 3: depth, normals, ", line) for line in lines)
    leaves = [table for heading, table in relation_tables(sample(3)) if heading.startswith("The last block")]
    assert leaves[0][1:] == [["1.00", *["never"] * 3], ["1.67", *["2"] * 3], ["3.00", *["0"] * 3]]
    (_, first), *others = relation_tables(sample(), budget=3)
    assert [row[0] for row in first[1:]] == ["3"]
    assert not any(row[0].isdigit() for _, table in others for row in table)


def test_the_section_of_a_runs_report() -> None:
    section = seeds_section({"0": sample(), "1": sample()})
    assert section.count("<figure>") == 3 and "<h3>Seed 0</h3>" in section and "<h3>Seed 1</h3>" not in section
    assert section.count("<tr><td>1</td>") == 2 and "<li>One encoder would do.</li>" in section
    assert "a task &lt;with&gt; $a$ long name" in section and "<with>" not in section
    assert seeds_section({}) == ""
