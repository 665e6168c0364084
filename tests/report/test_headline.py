"""What the headline says, and what it must not say."""

from typing import Any

import pytest

from report.sample import make_results
from simomerge.report.headline import headline, sentences


def told(std: float | None = None, images: int = 256, **deltas: float | None) -> str:
    """The headline of rows given as ``ta_heads=-5.0``."""
    names = {"zs": "zero-shot", "ta": "task-arithmetic"}
    rows: list[dict[str, Any]] = []
    for key, delta in deltas.items():
        merge, _, kind = key.partition("_")
        method = names.get(merge, merge) + (f"+{kind}" if kind else "")
        rows.append({"method": method, "delta_mtl": {"mean": delta, "std": std}, "labelled_images": images})
    return headline({"rows": rows})


def test_cost_and_recovery() -> None:
    assert told(experts=0.0, ta=-27.5, ta_heads=-5.5) == (
        "Merging by task-arithmetic cost 27.5 points of Delta_MTL; re-aligning its heads on 256 labelled images "
        "recovered 80 % of that (now -5.5 %)."
    )


def test_the_best_re_aligned_row_is_told_with_its_own_merge() -> None:
    text = told(ta=-20.0, ties=-40.0, ta_heads=-10.0, ties_adapters=-8.0)
    assert text.startswith("Merging by ties cost 40.0 points of Delta_MTL; re-aligning it with adapters")
    assert text.endswith("recovered 80 % of that (now -8.0 %, the best of 2 rows that re-align a merge).")


def test_without_labels_none_are_named() -> None:
    assert "folding its heads recovered 50 % of that" in told(images=0, ta=-20.0, ta_fold=-10.0)


def test_a_share_is_rounded_down() -> None:
    assert "recovered 99 % of that (now -0.1 %)" in told(ta=-20.0, ta_heads=-0.1)
    assert "recovered 100 % of that (now 0.0 %)" in told(ta=-20.0, ta_heads=0.0)


@pytest.mark.parametrize(
    ("merge", "after", "expected"),
    [
        (-20.0, 1.5, "recovered all of that and ended 1.5 points above the experts (now +1.5 %)"),
        (-20.0, -25.0, "made it 5.0 points worse (now -25.0 %)"),
        (-20.0, -20.0, "changed nothing measurable (now -20.0 %)"),
        (-0.4, -0.1, "cost 0.4 points of Delta_MTL; re-aligning its heads on 256 labelled images gained 0.3 points"),
        (2.0, 3.0, "cost nothing (Delta_MTL +2.0 %); re-aligning its heads on 256 labelled images gained 1.0 points"),
        (2.0, -1.0, "made it 3.0 points worse"),
    ],
)
def test_outcomes(merge: float, after: float, expected: str) -> None:
    assert expected in told(ta=merge, ta_heads=after)


def test_a_gain_within_the_spread_between_seeds_is_none() -> None:
    assert "changed nothing measurable" in told(std=3.0, ta=-20.0, ta_heads=-18.0)
    assert "level with task-arithmetic+heads" in told(std=3.0, ta=-20.0, ta_heads=-5.0, zs_heads=-7.0)


def test_missing_rows_say_less() -> None:
    assert told() == told(experts=0.0, zs_heads=-3.0) == "This run measured no merged model."
    assert told(ta=-20.0) == "Merging by task-arithmetic cost 20.0 points of Delta_MTL; nothing was re-aligned."
    assert told(ta_heads=-3.0) == (
        "task-arithmetic+heads stands at Delta_MTL -3.0 %; its merge alone was not measured."
    )
    assert told(ties=-20.0, ta_heads=-3.0).endswith("nothing was re-aligned.")
    assert told(ta=-20.0, ta_heads=None).endswith("nothing was re-aligned.")
    assert headline({}) == "This run measured no merged model."


def test_a_control_that_beats_the_merge_is_told() -> None:
    text = told(ta=-20.0, ta_heads=-5.0, zs=-60.0, zs_heads=-4.0)
    assert text.endswith(
        "But the control zero-shot+heads (base encoder, nothing merged) reaches -4.0 %, "
        "1.0 points better than task-arithmetic+heads: merging added nothing here."
    )
    assert told(ties=-20.0, zs=-12.0).endswith("8.0 points better than ties: merging added nothing here.")


def test_a_control_with_labels_is_no_verdict_on_a_bare_merge() -> None:
    text = told(ta=-20.0, zs_heads=-10.0)
    assert text.endswith("But the control zero-shot+heads (base encoder, nothing merged) reaches -10.0 %, "
                         "10.0 points better than task-arithmetic.")  # fmt: skip


def test_a_control_between_merge_and_re_aligned_row() -> None:
    text = told(ta=-20.0, ta_heads=-5.0, zs_heads=-10.0)
    assert text.endswith("-10.0 %, better than task-arithmetic alone but 5.0 points below task-arithmetic+heads.")
    assert told(ta=-20.0, ta_heads=-5.0, zs_heads=-40.0).endswith("-40.0 %, 35.0 points below task-arithmetic+heads.")


def test_the_control_is_compared_with_its_like() -> None:
    """Adapters above it would hide that heads alone did as well without any merge."""
    text = told(ta=-20.0, ta_heads=-10.0, ta_adapters=-5.0, zs_heads=-9.0)
    assert "re-aligning it with adapters" in text
    assert text.endswith("1.0 points better than task-arithmetic+heads: merging added nothing here.")


def test_a_whole_run() -> None:
    assert headline(make_results()).startswith("Merging by task-arithmetic cost 30.6 points")


def test_a_better_row_without_labels_is_told_beside_the_story() -> None:
    """`auto` is no re-alignment of a merge that was measured, but may be the best of all."""
    rows = [
        {"method": "ties", "delta_mtl": {"mean": -20.0}, "labelled_images": 128},
        {"method": "ties+distill", "delta_mtl": {"mean": -5.0}, "labelled_images": 0, "unlabelled_images": 64},
        {"method": "auto", "delta_mtl": {"mean": -4.0}, "labelled_images": 0, "unlabelled_images": 256},
    ]
    assert sentences({"rows": rows})[1] == "Without any label, auto stands at -4.0 % on 256 unlabelled images."
    rows[2]["delta_mtl"] = {"mean": -6.0}
    assert len(sentences({"rows": rows})) == 1
