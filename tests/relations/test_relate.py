"""`relate`: its sections, errors, plain data, and the sentences of the verdict."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import pytest

import simomerge as sm
from simomerge.assembly.experts import with_merged_encoder
from simomerge.assembly.sharing.grow import Grower
from simomerge.assembly.sharing.search import TreeSearch
from simomerge.core.errors import InputError
from simomerge.datasets.tasks import Task
from simomerge.merging import TaskArithmetic
from simomerge.models.model import SimoModel
from simomerge.relations import SECTIONS, Judge, Relations, relate, verdict

from .conftest import TASKS, RandomDataset

pytestmark = [
    pytest.mark.usefixtures("float32"),
    pytest.mark.filterwarnings("ignore:.*the fold stays close"),
]


def test_everything_at_once(base: SimoModel, experts: dict[str, SimoModel], dataset: RandomDataset) -> None:
    merged = with_merged_encoder(base, experts, TaskArithmetic(scale=0.4))
    found = relate(base, experts, dataset, merged=merged, lambdas=(0, 1))
    assert all(getattr(found, section) is not None for section in SECTIONS)
    assert found.judged_by == "the experts' predictions" and found.images == 16
    plain = found.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain and set(SECTIONS) < set(plain)
    assert found.verdict() == plain["verdict"] and found.verdict()[0].startswith("One encoder for all 3 tasks")
    only = found.verdict(budget=2)
    assert only[0].startswith("2 encoders: ") and not any(line.startswith("1 encoder") for line in only)
    with pytest.raises(InputError, match="budget 4: give 1 to 3 encoders"):
        found.verdict(budget=4)
    assert sm.relate is relate


def test_the_curve_of_shared_blocks_goes_from_one_encoder_to_the_experts(
    base: SimoModel, experts: dict[str, SimoModel], dataset: RandomDataset
) -> None:
    some = {task: experts[task] for task in ("depth", "normals")}
    found = relate(base, some, dataset, sections=["sharing"])
    curve = found.to_dict()["sharing"]
    costs = [each["cost"] for each in curve]
    assert costs == sorted(costs) and costs[0] == 1 and costs[-1] == 2
    assert all(each["cost"] <= each["budget"] + 1e-6 for each in curve)
    assert curve[0]["shared"] == {"depth": 4, "normals": 4} and curve[-1]["shared"] == {"depth": 0, "normals": 0}
    assert curve[-1]["gain"] == pytest.approx(0, abs=1e-3) and curve[0]["gain"] < 0
    assert found.judged_images == 8
    assert found.verdict()[0].startswith("Shared blocks: ")
    assert "(agreement with the experts, an estimate without labels: " in found.verdict()[0]


def test_labels_choose_the_trees_of_the_curve(
    base: SimoModel, experts: dict[str, SimoModel], dataset: RandomDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    judges = []

    class Search(TreeSearch):
        def __init__(self, grower: Grower, images: Any, data: Any = None) -> None:
            super().__init__(grower, images, data)
            judges.append((self, data))

    monkeypatch.setattr("simomerge.relations.sharing.TreeSearch", Search)
    some = {task: experts[task] for task in ("depth", "normals")}
    found = relate(base, some, data=dataset, sections=["sharing"], count=16)
    ((search, data),) = judges
    assert found.sharing is not None and len(data) == found.judged_images == 8
    fitted = {tuple(search.images[index]["image"].flatten().tolist()) for index in range(len(search.images))}
    assert not any(tuple(data.image(index).flatten().tolist()) in fitted for index in range(len(data)))
    assert all(tried.power == 1 for tried in search.tried)  # the loss is Delta_MTL, not a power of disagreements
    assert {each.tree for each in found.sharing} <= {str(tried.tree) for tried in search.tried}
    assert "(Delta_MTL on 8 labelled images: " in found.verdict()[0]


def test_labels_judge_if_given(base: SimoModel, experts: dict[str, SimoModel], dataset: RandomDataset) -> None:
    found = relate(base, experts, data=dataset, sections=["groups"], count=16)
    assert found.judged_by == "labels" and found.images == 16 and found.sweeps is None
    assert "Delta_MTL" in found.verdict()[0]


def test_pictures_of_any_size(base: SimoModel, experts: dict[str, SimoModel], dataset: RandomDataset) -> None:
    pictures = [dataset.image(index)[:, :, : 24 + 4 * (index % 2)] for index in range(16)]
    found = relate(base, experts, pictures, sections=["sweeps", "cka"], lambdas=(0, 1))
    assert found.sweeps is not None and found.sweeps.images == 8


def test_geometry_needs_no_images(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    found = relate(base, experts, sections=["geometry"])
    assert found.images == 0 and found.judged_by == "" and "groups" not in found.to_dict()
    with pytest.raises(InputError, match="a budget requires the section 'groups'"):
        found.verdict(budget=1)


def test_invalid_arguments(base: SimoModel, experts: dict[str, SimoModel], dataset: RandomDataset) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "looks at images"),
        ({"images": dataset, "data": dataset}, "give one of them"),
        ({"images": dataset, "sections": ["sweep"]}, "did you mean 'sweeps'"),
        ({"images": dataset, "sections": []}, "no section requested"),
        ({"images": dataset, "sections": ["alignment"]}, "give the merged model"),
        ({"sections": ["cka"]}, "the section 'cka' looks at images"),
        ({"images": dataset.take(7)}, "7 images: .* give at least 16"),
        ({"images": dataset, "lambdas": (0, 0.5)}, "lambdas 0, 0.5"),
        ({"data": dataset.select(["depth", "parts"])}, "no labels of normals"),
    ]
    for arguments, message in wrong:
        with pytest.raises(InputError, match=message):
            relate(base, experts, **arguments)
    with pytest.raises(InputError, match="at least two"):
        relate(base, {"depth": experts["depth"]}, dataset)


# Sentences ----------------------------------------------------------------------------------------------


def answer(judged_by: str) -> dict[str, Any]:
    """Three tasks; c has large losses, and costs the others most."""
    pairs = {("a", "b"): (-1.0, -1.0), ("a", "c"): (-3.0, -20.0), ("b", "c"): (-3.0, -22.0)}
    merges = [{"tasks": list(p), "gains": dict(zip(p, gains, strict=True))} for p, gains in pairs.items()]
    choices = [
        {"budget": 1, "groups": [["a", "b", "c"]], "gains": {"a": -3.0, "b": -3.0, "c": -24.0}, "gain": -10.0,
         "measured": False},
        {"budget": 2, "groups": [["a", "b"], ["c"]], "gains": {"a": -1.0, "b": -1.0, "c": 0.0}, "gain": -2 / 3,
         "measured": True},
        {"budget": 3, "groups": [["a"], ["b"], ["c"]], "gains": dict.fromkeys("abc", 0.0), "gain": -0.0,
         "measured": True},
    ]  # fmt: skip
    return {"tasks": list("abc"), "judged_by": judged_by, "groups": {"merges": merges, "choices": choices}}


def test_the_verdict_in_words() -> None:
    assert verdict(answer("labels")) == [
        "One encoder for all 3 tasks would change Delta_MTL by -10.0 %. Two (a + b; alone: c): by -0.7 %.",
        "1 encoder: a + b + c (Delta_MTL -10.0 %, predicted from pairs; c loses most, -24.0 %).",
        "2 encoders: a + b; alone: c (Delta_MTL -0.7 %; a loses most, -1.0 %).",
        "3 encoders: every expert by itself (Delta_MTL 0.0 %).",
        "Merged in pairs, a and b do best (-1.0 % on average), b and c worst (-12.5 %).",
        "Merged with b, the other tasks lose most (-11.5 %); c loses most in its pairs (-21.0 %).",
    ]


def test_without_labels_losses_of_two_tasks_are_not_compared() -> None:
    """In its own unit c loses equally with either task; the other tasks lose by it."""
    lines = verdict(answer("the experts' predictions"), budget=2)
    assert lines == [
        "2 encoders: a + b; alone: c (agreement with the experts -0.7 %).",
        "Merged in pairs, a and b do best (0.50 of what these tasks lose in their mean pair), b and c worst (1.27).",
        "Merged with c, the other tasks lose most (1.50).",
    ]


def test_geometry_and_sweeps_in_words() -> None:
    sweeps = {"effects": {"a": {"b": 0.2}, "b": {"a": -0.1}}, "widths": {"a": 0.5, "b": 1.0}, "kept": 0.9}
    table = [[1.0, 0.3], [0.3, 1.0]]
    geometry = [{"cosine": table, "weighted_conflict": [[0.0, 0.4], [0.4, 0.0]]}]
    lines = verdict({"tasks": ["a", "b"], "judged_by": "labels", "sweeps": sweeps, "geometry": geometry})
    assert lines[0].startswith("Along its task vector a helps b most (+0.20")
    assert lines[1] == "Along its task vector b hurts a most (-0.10)."
    assert lines[2].startswith(
        "Most sensitive to changes of the encoder: a, which keeps 90% of its performance over a width of 0.50"
    )
    assert lines[3] == "The task vectors of a and b are closest (cosine 0.30, 40% of the weight pulls apart)."


def test_task_vectors_without_a_weight_in_common() -> None:
    geometry = [{"cosine": [[1.0, 0.0], [0.0, 1.0]], "weighted_conflict": [[0.0, None], [None, 0.0]]}]
    lines = verdict({"tasks": ["a", "b"], "judged_by": "", "geometry": geometry})
    assert lines == ["The task vectors of a and b are closest (cosine 0.00, no weight in common)."]


def test_a_budget_larger_than_needed_is_answered_too() -> None:
    found = answer("labels")
    found["groups"]["choices"][1] = {**found["groups"]["choices"][0], "budget": 2}
    assert verdict(found)[2] == "2 encoders: no better than 1."
    assert verdict(found, budget=2)[0] == (
        "2 encoders: a + b + c (Delta_MTL -10.0 %, predicted from pairs; c loses most, -24.0 %); more than 1 brings"
        " nothing."
    )


def test_errors_are_raised_before_any_merge(
    base: SimoModel, experts: dict[str, SimoModel], dataset: RandomDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        pytest.fail("it started to work")

    monkeypatch.setattr("simomerge.relations.relations.geometry", never)
    monkeypatch.setattr("simomerge.relations.relations.group_tasks", never)
    two = {task: experts[task] for task in list(TASKS)[:2]}
    merged = with_merged_encoder(base, two, TaskArithmetic(scale=0.4))
    with pytest.raises(InputError, match=r"is not one of the model|model has|has no"):
        relate(base, experts, dataset, merged=merged)
    with pytest.raises(InputError, match="give at least 16"):
        relate(base, experts, dataset.take(4))
    with pytest.raises(InputError, match="count is 0; give a whole number of 1 or more"):
        relate(base, experts, data=dataset, count=0)
    with pytest.raises(InputError, match="give a dataset, such as"):
        relate(base, experts, data="rooms")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="lambdas"):
        relate(base, experts, dataset, lambdas=(0, 1, float("nan")))


def test_equally_sensitive_tasks_are_not_ranked() -> None:
    sweeps = {"effects": {"a": {"b": 0.0}, "b": {"a": 0.0}}, "widths": {"a": 1.5, "b": 1.5}, "kept": 0.9}
    lines = verdict({"tasks": ["a", "b"], "judged_by": "labels", "sweeps": sweeps})
    assert lines[-1] == "All keep 90% of their performance over a width of 1.50 in lambda."


def test_a_merge_without_finite_metrics_is_an_error(
    base: SimoModel, experts: dict[str, SimoModel], dataset: RandomDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Judge, "gains", lambda self, scores: dict.fromkeys(scores, float("nan")))
    with pytest.raises(InputError, match=r"merged, .* that is not finite"):
        relate(base, experts, dataset, sections=["groups"])
    with pytest.raises(InputError, match=r"merged, .* that is not finite"):
        relate(base, experts, dataset, sections=["sharing"])


def test_all_pairs_are_merged(base: SimoModel, experts: dict[str, SimoModel], dataset: RandomDataset) -> None:
    """All groups of the answer are merged, not only predicted."""
    found = relate(base, experts, dataset, sections=["groups"])
    assert isinstance(found, Relations) and found.groups is not None
    assert [merge.tasks for merge in found.groups.merges[:3]] == list(combinations(TASKS, 2))
    assert all(choice.measured for choice in found.groups.choices)


def test_labels_of_another_order_of_classes_are_refused(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    turned = RandomDataset()
    turned.tasks = {**TASKS, "parts": Task("parts", "segmentation", classes=("b", "a", "c"))}
    with pytest.raises(InputError, match="class 0 is 'a' in the expert, but 'b' in the data, which has the same"):
        relate(base, experts, data=turned, sections=["cka"])
    with pytest.raises(InputError, match="class 0 is 'a' in the model, but 'b' in the data, which has the same"):
        sm.merge(base, experts, images=turned, validation=turned, budget=2)
