"""The headline: what it claims, and what it must not claim."""

from typing import Any

import pytest

from report.sample import identity, make_results
from simomerge.report.facts import sentences


def headline(results: dict[str, Any]) -> str:
    return " ".join(sentences(results))


def story(std: float | None = None, images: int = 256, **deltas: float | None) -> str:
    """The headline of rows given as ``ta_heads=-5.0``."""
    names = {"zs": "zero-shot", "ta": "task-arithmetic"}
    rows: list[dict[str, Any]] = []
    for key, delta in deltas.items():
        merge, _, kind = key.partition("_")
        method = names.get(merge, merge) + (f"+{kind}" if kind else "")
        rows.append({**identity(method), "delta_mtl": {"mean": delta, "std": std}, "labelled_images": images})
    return headline({"rows": rows})


def test_cost_and_recovery() -> None:
    assert story(experts=0.0, ta=-27.5, ta_heads=-5.5) == (
        "Merging by task-arithmetic cost 27.5 points of Delta_MTL; re-aligning its heads on 256 labelled images "
        "recovered 80 % of that (now -5.5 %)."
    )


def test_the_best_re_aligned_row_is_compared_with_its_own_merge() -> None:
    text = story(ta=-20.0, ties=-40.0, ta_heads=-10.0, ties_adapters=-8.0)
    assert text.startswith("Merging by ties cost 40.0 points of Delta_MTL; re-aligning it with adapters")
    assert text.endswith("recovered 80 % of that (now -8.0 %, the best of 2 rows that re-align a merge).")


def test_without_labels_no_labelled_images_are_mentioned() -> None:
    assert "folding its heads recovered 50 % of that" in story(images=0, ta=-20.0, ta_fold=-10.0)


def test_several_steps_are_named_in_order() -> None:
    assert "; folding its heads, then re-aligning its heads on 256 labelled images recovered 75 %" in headline(
        {"rows": [delta("ties", -20.0), delta("ties+fold+heads", -5.0)]}
    )


def delta(method: str, mean: float) -> dict[str, Any]:
    return {**identity(method), "delta_mtl": {"mean": mean}, "labelled_images": 256}


def test_a_row_without_family_and_steps_is_a_merge() -> None:
    row = {"method": "new+thing", "delta_mtl": {"mean": -3.0}}
    assert headline({"rows": [row]}) == ("Merging by new+thing cost 3.0 points of Delta_MTL; nothing was re-aligned.")
    after = {**row, "family": "re-aligned", "merge": "new+thing", "method": "new+thing+more"}
    assert "; re-aligning it changed nothing measurable" in headline({"rows": [row, after]})
    after["realignment"] = [{"name": "more"}]
    assert "; re-aligning it (more) changed nothing measurable" in headline({"rows": [row, after]})


def test_a_share_is_rounded_down() -> None:
    assert "recovered 99 % of that (now -0.1 %)" in story(ta=-20.0, ta_heads=-0.1)
    assert "recovered 100 % of that (now 0.0 %)" in story(ta=-20.0, ta_heads=0.0)


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
    assert expected in story(ta=merge, ta_heads=after)


def test_a_gain_within_the_spread_between_seeds_does_not_count() -> None:
    assert "changed nothing measurable" in story(std=3.0, ta=-20.0, ta_heads=-18.0)
    assert "level with task-arithmetic+heads" in story(std=3.0, ta=-20.0, ta_heads=-5.0, zs_heads=-7.0)


def test_missing_rows_shorten_the_headline() -> None:
    assert story() == story(experts=0.0, zs_heads=-3.0) == "This run measured no merged model."
    assert story(ta=-20.0) == "Merging by task-arithmetic cost 20.0 points of Delta_MTL; nothing was re-aligned."
    assert story(ta_heads=-3.0) == (
        "task-arithmetic+heads stands at Delta_MTL -3.0 %; its merge alone was not measured."
    )
    assert story(ties=-20.0, ta_heads=-3.0).endswith("nothing was re-aligned.")
    assert story(ta=-20.0, ta_heads=None).endswith("nothing was re-aligned.")
    assert headline({}) == "This run measured no merged model."


def test_a_control_that_beats_the_merge_is_reported() -> None:
    text = story(ta=-20.0, ta_heads=-5.0, zs=-60.0, zs_heads=-4.0)
    assert text.endswith(
        "But the control zero-shot+heads (base encoder, nothing merged) reaches -4.0 %, "
        "1.0 points better than task-arithmetic+heads: merging added nothing here."
    )
    assert story(ties=-20.0, zs=-12.0).endswith("8.0 points better than ties: merging added nothing here.")


def test_a_control_with_labels_proves_nothing_against_a_bare_merge() -> None:
    text = story(ta=-20.0, zs_heads=-10.0)
    assert text.endswith("But the control zero-shot+heads (base encoder, nothing merged) reaches -10.0 %, "
                         "10.0 points better than task-arithmetic.")  # fmt: skip


def test_a_control_between_merge_and_re_aligned_row() -> None:
    text = story(ta=-20.0, ta_heads=-5.0, zs_heads=-10.0)
    assert text.endswith("-10.0 %, better than task-arithmetic alone but 5.0 points below task-arithmetic+heads.")
    assert story(ta=-20.0, ta_heads=-5.0, zs_heads=-40.0).endswith("-40.0 %, 35.0 points below task-arithmetic+heads.")


def test_the_control_is_compared_after_the_same_steps() -> None:
    """A better row with adapters must not hide that heads alone do as well without any merge."""
    text = story(ta=-20.0, ta_heads=-10.0, ta_adapters=-5.0, zs_heads=-9.0)
    assert "re-aligning it with adapters" in text
    assert text.endswith("1.0 points better than task-arithmetic+heads: merging added nothing here.")


def test_a_complete_run() -> None:
    assert headline(make_results()).startswith("Merging by task-arithmetic cost 30.6 points")


def test_a_better_row_without_labels_follows_the_story() -> None:
    """`auto` does not re-align a merge that was measured, but it may be the best row."""
    rows = [
        {**identity("ties"), "delta_mtl": {"mean": -20.0}, "labelled_images": 128},
        {**identity("ties+distill"), "delta_mtl": {"mean": -5.0}, "labelled_images": 0, "unlabelled_images": 64},
        {**identity("auto"), "delta_mtl": {"mean": -4.0}, "labelled_images": 0, "unlabelled_images": 256},
    ]
    assert sentences({"rows": rows})[1] == "Without any label, auto stands at -4.0 % on 256 unlabelled images."
    rows[2]["delta_mtl"] = {"mean": -6.0}
    assert len(sentences({"rows": rows})) == 1


def test_few_test_images_are_a_warning_at_the_end() -> None:
    run = {"rows": [{"family": "merge", "method": "ties", "merge": "ties", "delta_mtl": {"mean": -20.0}}]}
    (plain,) = sentences(run)
    assert sentences({**run, "test_images": 100}) == [plain]
    warning = "These figures come from 99 test images only, so small differences may be chance."
    assert sentences({**run, "test_images": 99}) == [plain, warning]
