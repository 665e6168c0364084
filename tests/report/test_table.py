"""The table in the terminal and in Markdown."""

import pytest

from report.sample import make_results
from simomerge.report import markdown_table, text_table
from simomerge.report.table import columns

TASK = {"name": "depth", "metric": "abs_err", "unit": "m", "higher_is_better": False}


def small() -> dict:
    return {
        "tasks": [TASK],
        "rows": [
            {
                "method": "experts",
                "delta_mtl": {"mean": 0.0, "std": 0.0},
                "metrics": {"depth": {"mean": 0.2314, "std": 0.0021}},
                "seconds": 1234.5,
                "steps": 21800,
                "trained_parameters": 90_140_000,
                "labelled_images": 16000,
                "encoders": 3,
            },
            {
                "method": "ties",
                "delta_mtl": {"mean": -32.84, "std": None},
                "metrics": {"depth": {"mean": 0.4171, "std": None}},
                "seconds": 0.42,
                "steps": 0,
                "trained_parameters": 312_000,
                "labelled_images": 0,
            },
            {"method": "ties+heads", "delta_mtl": {"mean": 1.26, "std": 0.449}, "trained_parameters": 4_100},
        ],
    }


def test_text_table_is_exact() -> None:
    assert text_table(small()).splitlines() == [
        "method                 Delta_MTL          depth  seconds   steps  trained  labelled",
        "                               ↑      abs_err ↓                    params    images",
        "                               %              m",
        "─" * 83,
        "experts (3 encoders)   0.0 ± 0.0  0.231 ± 0.002    1,234  21,800   90.1 M    16,000",
        "ties                       -32.8          0.417      0.4       0    0.3 M         0",
        "ties+heads            +1.3 ± 0.4              –        –       –    4.1 k         –",
    ]


def test_markdown_table_is_exact() -> None:
    heads = "| method | Delta_MTL ↑ (%) | depth abs_err ↓ (m) | seconds | steps | trained params | labelled images |"
    assert markdown_table(small()).splitlines() == [
        heads,
        "| :-- | --: | --: | --: | --: | --: | --: |",
        "| experts (3 encoders) | 0.0 ± 0.0 | 0.231 ± 0.002 | 1,234 | 21,800 | 90.1 M | 16,000 |",
        "| ties | -32.8 | 0.417 | 0.4 | 0 | 0.3 M | 0 |",
        "| ties+heads | +1.3 ± 0.4 | – | – | – | 4.1 k | – |",
    ]


@pytest.mark.parametrize(("seeds", "tasks"), [(1, 3), (3, 3), (1, 5), (3, 5)])
def test_lines_fit_and_align(seeds: int, tasks: int) -> None:
    results = make_results(seeds, tasks)
    blocks = [block.splitlines() for block in text_table(results).split("\n\n")]
    assert all(len(line) <= 120 for block in blocks for line in block)
    assert len(blocks) == (1 if tasks == 3 else 2)  # with five tasks the costs follow below
    for block in blocks:
        assert {len(line) for line in block[-len(results["rows"]) :]} == {max(map(len, block))}
        assert block[-1].startswith("task-arithmetic+adapters")


def test_no_column_is_lost_in_a_narrow_terminal() -> None:
    text = text_table(make_results(3, 5), width=50)
    assert max(map(len, text.splitlines())) <= 50
    for column in columns(make_results(3, 5)):
        assert column.head[0] in text and all(cell in text for cell in column.cells)


def test_ascii_only() -> None:
    text = text_table(make_results(3), ascii_only=True)
    assert text.isascii() and "+-" in text and "miou (up)" in text and "abs_err (down)" in text


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), "many"])
def test_unknown_numbers_are_a_dash(bad: object) -> None:
    row = {"method": "ties", "delta_mtl": {"mean": bad}, "metrics": {"depth": {"mean": bad}}, "steps": bad}
    assert [column.cells for column in columns({"tasks": [TASK], "rows": [row]})][1:] == [("–",)] * 6


def test_a_far_row_does_not_cost_the_others_their_digits() -> None:
    rows = [{"method": "m", "metrics": {"depth": {"mean": mean}}} for mean in (0.0123, 0.0145, 87.0)]
    assert columns({"tasks": [TASK], "rows": rows})[2].cells == ("0.0123", "0.0145", "87.0000")


def test_names_cannot_break_the_table() -> None:
    row = {"method": "a|b\n<i>\x1b[31m", "delta_mtl": {"mean": 1.0}}
    assert "\x1b" not in text_table({"rows": [row]}) and len(text_table({"rows": [row]}).splitlines()) == 5
    assert markdown_table({"rows": [row]}).splitlines()[2].startswith("| a\\|b &lt;i>[31m |")


def test_wide_letters_keep_the_columns_straight() -> None:
    rows = [{"method": name, "delta_mtl": {"mean": 1.0}} for name in ("深度", "ties")]
    first, second = text_table({"rows": rows}).splitlines()[-2:]
    assert first.index("+1.0") == second.index("+1.0") - 2  # two letters, each two columns wide


def test_empty_results() -> None:
    assert text_table({}).startswith("method") and markdown_table({}).count("\n") == 1
