"""What a report says first: which model to ship, where it is, and what it costs. Never kinder than the numbers."""

from __future__ import annotations

from typing import Any

import pytest

from report.sample import make_results
from report.test_page import Reader
from simomerge.report.page import report_page
from simomerge.report.recommendation import recommendation

MODEL: dict[str, Any] = {
    "folder": "model",
    "row": "task-arithmetic+heads",
    "seed": 0,
    "candidates": {"task-arithmetic+heads": -8.0, "ties+heads": -10.0},
    "validation_images": 128,
    "bytes": 7.6e6,
    "experts_bytes": 20.6e6,
    "image": [64, 80],
    "device": "CPU, 2 threads",
    "milliseconds": 12.34,
    "experts_milliseconds": 36.9,
}


def results(**changes: Any) -> dict[str, Any]:
    return {**make_results(), "model": {**MODEL, **changes}}


def test_it_says_what_where_how_good_and_how_expensive() -> None:
    found = recommendation(results(), "runs/demo")
    assert found is not None and found.folder == "runs/demo/model" and found.size == "64x80"
    first, second, third, *_ = found.sentences
    assert first == (
        "Ship runs/demo/model: one model for segmentation, depth and normals, on average 8.5 % worse than the three"
        " separate experts."
    )
    assert second == (
        "Compared with the experts one after the other, it takes 7.6 MB on the disk instead of 20.6 MB and needs"
        " 12.3 ms instead of 37 ms for one image of 64 x 80 pixels (CPU, 2 threads, the machine of this run)."
    )
    assert third == (
        "In the table it is the row task-arithmetic+heads, the best of 2 merges that were repaired with labels on 128"
        " validation images. The test images had no part in this choice."
    )


def test_changes_are_positive_for_the_better(monkeypatch: pytest.MonkeyPatch) -> None:
    found = recommendation(results(), "")
    assert found is not None and found.folder == "model"
    ratio = 0.92  # of the sample's row
    assert [row[0] for row in found.table] == ["segmentation", "depth", "normals"]
    assert found.table[0][1:] == ("miou in %, higher is better", f"{80 * ratio:.4g}", "80", "-8.0 %")
    assert found.table[1][2:] == (f"{0.2 / ratio:.4g}", "0.2", "-8.7 %")  # an error that is higher is a loss


def test_means_over_seeds_are_called_means_and_the_folder_one_seed() -> None:
    given = {**make_results(seeds=3), "model": {**MODEL, "seed": 2}}
    found = recommendation(given, "runs/demo")
    assert found is not None and found.sentences[0].endswith("the three separate experts (mean over 3 seeds).")
    assert found.sentences[1] == (
        "The folder holds the model of one seed, 2: the best seed on the validation images. Its own figures are in its"
        " README.md."
    )
    assert found.heads[1:3] == ("this model (mean over 3 seeds)", "its expert (mean over 3 seeds)")
    assert "this model (mean over 3 seeds)" in Reader(report_page(given, folder="runs/demo")).text
    alone = recommendation({**given, "model": {**MODEL, "candidates": {}}}, "runs/demo")
    assert alone is not None and "of one seed, 0: the first seed." in alone.sentences[1]
    single = recommendation(results(), "runs/demo")
    assert single is not None and single.heads == ("task", "this model", "its expert", "change")
    assert not any("seed" in sentence for sentence in single.sentences)


def test_a_better_model_of_another_kind_is_named() -> None:
    *_, last = recommendation(results(), "runs/demo").sentences
    assert last.startswith("But joint-mtl (trained on all labels at once) is better on the test images: -5.2 % against")
    better = results(row="task-arithmetic+adapters")
    for row in better["rows"]:
        if row["method"] == "task-arithmetic+adapters":
            row["delta_mtl"] = {"mean": 0.02, "std": None}
    found = recommendation(better, "runs/demo").sentences
    assert "on average as good as the three separate experts" in found[0] and not found[-1].startswith("But")


def test_a_single_candidate_and_missing_numbers() -> None:
    given = {"tasks": [{"name": "depth", "metric": "abs_err", "higher_is_better": False}], "rows": []}
    model = {"folder": "model", "row": "ties", "candidates": {}}
    found = recommendation({**given, "model": model}, ".")
    assert found.sentences == (
        "Ship model: one model for depth, not compared with its expert.",
        "In the table it is the row ties. There was no other candidate.",
    )
    assert recommendation(given, ".") is None


def test_the_page_begins_with_it_and_ends_with_the_glossary() -> None:
    read = Reader(report_page(results(), folder="runs/demo"))
    text = read.text.replace("\xa0", " ")
    assert text.index("Ship runs/demo/model") < text.index("The model to ship") < text.index("Results")
    headings = [word for word in read.words if word in ("The model to ship", "Results", "Notes", "How to read it")]
    assert headings == ["The model to ship", "Results", "Notes", "How to read it"]
    assert "simomerge predict runs/demo/model photo.jpg -o predictions" in text
