"""Merges chosen on images without labels: by how well they can be folded, or by the experts' predictions."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from simomerge.assembly.alignment import START_SCALE, Aligner, Trial
from simomerge.assembly.coefficients import COEFFICIENT_SETTINGS, _Blend, learn_coefficients
from simomerge.assembly.experts import with_merged_encoder, with_parameters
from simomerge.assembly.merge import AUTO_METHODS, merge
from simomerge.assembly.realign import realign
from simomerge.assembly.realign.sums import fold_heads, head_targets
from simomerge.core.errors import InputError
from simomerge.datasets import DenseDataset, groups
from simomerge.datasets.pictures import as_images
from simomerge.datasets.tasks import Task
from simomerge.merging import Average, Lines, MergeMethod, Schedule, TaskArithmetic, Ties
from simomerge.models.model import SimoModel
from simomerge.training.metrics import TaskMetrics

TASKS = {"depth": Task("depth"), "parts": Task("parts", "segmentation", classes=("a", "b", "c"))}
pytestmark = [
    pytest.mark.usefixtures("float32"),
    pytest.mark.filterwarnings("ignore:.*the fold stays close to the unfolded head:UserWarning"),
]


class Unlabelled(DenseDataset):
    """Has images, and tasks; whoever asks for a label fails."""

    def __init__(self, count: int = 12) -> None:
        super().__init__(TASKS, count)
        coarse = np.random.default_rng(0).random((count, 3, 4, 4)).astype(np.float32)
        self.pictures = torch.from_numpy(coarse.repeat(6, 2).repeat(8, 3))

    def image(self, index: int) -> Tensor:
        return self.pictures[index].clone()

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        raise AssertionError("read a label")


IMAGES = Unlabelled()


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.fixture(scope="module")
def base(make_model: Callable[..., SimoModel]) -> SimoModel:
    model = make_model({})
    model.source = "the-base"
    return model


@pytest.fixture(scope="module")
def experts(experts_by_dice: Callable[..., dict[str, SimoModel]], base: SimoModel) -> dict[str, SimoModel]:
    found = experts_by_dice(TASKS, base, 0.08)
    for name, expert in found.items():
        expert.source = f"runs/{name}"
    return found


@pytest.fixture
def aligner(base: SimoModel, experts: dict[str, SimoModel]) -> Aligner:
    return Aligner(base, experts, IMAGES, 8)


class Climber(Aligner):
    """Climbs a given curve of agreement over scale instead of merging anything."""

    def __init__(self, curve: Callable[[float], float]) -> None:
        self.curve = curve
        self.trials = []
        self.asked: list[float] = []

    def try_out(self, method: MergeMethod, schedule: Schedule | None = None) -> Trial:
        scale: Any = getattr(method, "scale", None)
        self.asked.append(scale)
        for trial in self.trials:
            if (trial.method, trial.schedule) == (method, schedule):
                return trial
        self.trials.append(Trial(method, schedule, {"depth": self.curve(scale) - 0.1, "parts": self.curve(scale)}))
        return self.trials[-1]


# Trials -------------------------------------------------------------------------------------------------


def test_a_trial_is_a_merge_a_fold_without_the_held_out_images_and_a_judgement_on_them(
    base: SimoModel, experts: dict[str, SimoModel], aligner: Aligner
) -> None:
    images = as_images(IMAGES, 8)
    out = groups.held_out(images)
    kept = images._subset(groups.training_images(images, groups.SHARE))
    pixels = torch.stack([images.image(index) for index in out])
    for method, schedule in ((TaskArithmetic(scale=0.4), None), (Ties(density=0.5), Lines(beta=0.3))):
        trial = aligner.try_out(method, schedule)
        merged = with_merged_encoder(base, experts, method, schedule)
        ridges = realign(merged, experts, images).provenance["realign"]["ridge"]
        for task, expert in experts.items():
            ridge = math.inf if ridges[task] == "none" else ridges[task]
            folded = fold_heads(merged, list(head_targets(merged, experts, kept)), ridge=ridge).model
            with torch.no_grad():
                found, wanted = (TASKS[task].activate(model(pixels)[task]) for model in (folded, expert))
            best, here, chance = (_score(TASKS[task], values, wanted) for values in (wanted, found, wanted.roll(1, 0)))
            assert trial.agreement[task] == pytest.approx((here - chance) / (best - chance), abs=2e-2)
        assert trial.score == pytest.approx(sum(trial.agreement.values()) / 2)
        assert aligner.trials[-1] is trial
        assert (trial.method, trial.schedule) == (method, schedule)
    described = aligner.trials[1].describe()
    assert (described["method"], described["schedule"]) == ("ties", "lines:beta=0.3")
    assert described["agreement"] == pytest.approx(aligner.trials[1].score, abs=1e-4)
    json.dumps(described)


def _score(task: Task, found: Tensor, wanted: Tensor) -> float:
    metric = TaskMetrics(task)
    metric.update(found, wanted)
    return metric.compute()[task.metric]


def test_what_was_tried_is_not_tried_again(aligner: Aligner, monkeypatch: pytest.MonkeyPatch) -> None:
    first = aligner.try_out(TaskArithmetic(scale=0.4))
    other = aligner.try_out(TaskArithmetic(scale=0.4), Lines())
    assert other is not first and len(aligner.trials) == 2
    monkeypatch.setattr("simomerge.assembly.alignment.head_sums", lambda *_, **__: pytest.fail("tried again"))
    assert aligner.try_out(TaskArithmetic(scale=0.4)) is first
    assert aligner.try_out(TaskArithmetic(scale=0.4), Lines()) is other and len(aligner.trials) == 2


def test_the_experts_look_once(aligner: Aligner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simomerge.assembly.realign.sums.observe", lambda *_, **__: pytest.fail("looked again"))
    aligner.try_out(TaskArithmetic(scale=0.2))
    aligner.try_out(TaskArithmetic(scale=0.3))


def test_all_of_one_expert_agrees_perfectly(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    aligner = Aligner(base, {"depth": experts["depth"]}, Unlabelled(64), 64)
    assert aligner.try_out(TaskArithmetic(scale=1.0)).score == pytest.approx(1, abs=1e-2)
    found = aligner.best_scale(TaskArithmetic())
    assert isinstance(found.method, TaskArithmetic) and found.method.scale == 1.0 and aligner.best is found


def test_the_best_is_that_of_the_greatest_agreement() -> None:
    climber = Climber(lambda scale: -abs(scale - 0.6))
    for scale in (0.2, 0.5, 0.9):
        climber.try_out(TaskArithmetic(scale=scale))
    assert climber.best.method == TaskArithmetic(scale=0.5)


def test_too_few_images_are_refused(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    with pytest.raises(InputError, match=r"7 images: .*give at least 8"):
        Aligner(base, experts, IMAGES, 7)
    with pytest.raises(InputError, match="7 images"):
        merge(base, experts, scale="auto", images=IMAGES.take(7))
    assert len(Aligner(base, experts, IMAGES.take(8)).images) == 8


def test_pictures_that_cannot_be_read_leave_a_choice_to_be_made(
    base: SimoModel, experts: dict[str, SimoModel], tmp_path: Path
) -> None:
    """Also where it is those that would have been held out; or it is said that too few are left."""
    for index in range(12):
        Image.fromarray((IMAGES.image(index).permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(
            tmp_path / f"{index}.png"
        )
    (tmp_path / "3.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"1 of 12 images .*3\.png"):
        try:
            aligner = Aligner(base, experts, tmp_path)
            trial = aligner.try_out(TaskArithmetic(scale=0.3))
        except InputError as error:
            assert "images" in str(error)
        else:
            assert math.isfinite(trial.score)


# The best scale -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [*range(31), 40])
def test_the_best_scale_is_the_top_of_a_hill(steps: int) -> None:
    best = round(0.05 * steps, 2)
    for curve in (lambda scale: -abs(scale - best), lambda scale: 0.9 * math.exp(-((scale - best) ** 2))):
        climber = Climber(curve)
        trial = climber.best_scale(TaskArithmetic())
        assert isinstance(trial.method, TaskArithmetic) and trial.method.scale == best
        assert climber.asked[0] == START_SCALE and min(climber.asked) >= 0
        assert len(climber.trials) <= abs(best - START_SCALE) / 0.1 + 8  # a climb, not a survey


def test_a_plain_is_not_climbed() -> None:
    climber = Climber(lambda scale: 0.5)
    assert climber.best_scale(Ties()).method == Ties(scale=START_SCALE) and len(climber.trials) == 7


def test_what_else_the_method_and_the_schedule_say_stays() -> None:
    trial = Climber(lambda scale: -abs(scale - 0.5)).best_scale(Ties(density=0.7), Lines(beta=0.1))
    assert (trial.method, trial.schedule) == (Ties(density=0.7, scale=0.5), Lines(beta=0.1))


def test_a_method_without_a_scale_is_refused() -> None:
    with pytest.raises(InputError, match="'average' has no parameter 'scale'"):
        Climber(lambda scale: scale).best_scale(Average())


# merge(scale="auto", images=...) ------------------------------------------------------------------------


def test_auto_takes_the_scale_of_the_best_agreement_and_says_so(
    base: SimoModel, experts: dict[str, SimoModel], aligner: Aligner
) -> None:
    model = merge(base, experts, "ties", scale="auto", images=IMAGES, count=8, density=0.5)
    record = model.provenance["merge"]
    tried = record["tried"]
    best = max(tried, key=lambda one: one["agreement"])
    assert (record["method"], record["density"], record["scale"]) == ("ties", 0.5, best["scale"])
    assert record["scale_chosen_on"] == "8 unlabelled images, by agreement with the experts"
    scales = [one["scale"] for one in tried]
    assert scales[0] == START_SCALE and len(set(scales)) == len(scales) >= 4
    assert {round(best["scale"] + step, 2) for step in (0.05, -0.05)} <= set(scales)
    assert best == aligner.try_out(Ties(density=0.5, scale=best["scale"])).describe()
    plain = merge(base, experts, "ties", scale=best["scale"], density=0.5)
    assert same(weights(model), weights(plain))  # heads are the experts', not folded
    json.dumps(model.provenance)


def test_auto_keeps_the_schedule(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    model = merge(base, experts, scale="auto", images=IMAGES, count=8, schedule="lines:beta=0.2")
    record = model.provenance["merge"]
    assert record["schedule"] == "lines:beta=0.2" and all("schedule" in one for one in record["tried"])
    plain = merge(base, experts, scale=record["scale"], schedule="lines:beta=0.2")
    assert same(weights(model), weights(plain))


def test_auto_looks_at_64_images_unless_told(
    base: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[Any] = []

    class Stop(Exception):
        pass

    def noted(source: Any, count: Any = None, size: Any = None) -> Any:
        counts.append(count)
        raise Stop

    monkeypatch.setattr("simomerge.assembly.alignment.as_images", noted)
    for count in (None, 9):
        with pytest.raises(Stop):
            merge(base, experts, scale="auto", images=IMAGES, count=count)
    assert counts == [64, 9]


# merge("auto", images=...) ------------------------------------------------------------------------------


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coefficients learned in no time, though not well."""
    brief = replace(COEFFICIENT_SETTINGS, steps=2, batch_size=4)
    monkeypatch.setattr(learn_coefficients, "__defaults__", _with(learn_coefficients, settings=brief, rounds=1))


def _with(function: Any, **changes: Any) -> tuple[Any, ...]:
    """The defaults of a function, some changed."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    defaults = dict(zip(names[-len(function.__defaults__) :], function.__defaults__, strict=True))
    return tuple({**defaults, **changes}.values())


@pytest.mark.usefixtures("few_steps")
def test_the_method_auto_gives_the_best_of_several_folded(
    base: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def two_scales(self: Aligner, method: MergeMethod, schedule: Schedule | None = None) -> Trial:
        trials = [self.try_out(with_parameters(method, {"scale": scale}), schedule) for scale in (0.3, 0.4)]
        return max(trials, key=lambda trial: trial.score)

    monkeypatch.setattr(Aligner, "best_scale", two_scales)
    before = [weights(model) for model in (base, *experts.values())]
    model = merge(base, experts, "auto", images=IMAGES, count=8)
    record = model.provenance
    tried = record["merge"]["tried"]
    assert {(one["method"], "schedule" in one) for one in tried} >= {
        (name, schedule is not None) for name, schedule in AUTO_METHODS
    }
    learned = [one for one in tried if isinstance(one.get("scale"), dict)]
    assert len(learned) == 1 and learned[0] == tried[-1] and set(learned[0]["scale"]) == set(TASKS)
    best = max(tried, key=lambda one: one["agreement"])
    chosen = {key: value for key, value in record["merge"].items() if key not in ("tried", "scale_chosen_on")}
    assert chosen == {key: value for key, value in best.items() if key != "agreement"}
    assert record["merge"]["scale_chosen_on"] == "8 unlabelled images, by agreement with the experts"
    assert (record["realign"]["method"], record["realign"]["variant"]) == ("fold", "cross-tap")
    assert record["realign"]["unlabelled_images"] == 8 and record["realign"]["labelled_images"] == 0
    parameters = {key: value for key, value in chosen.items() if key not in ("method", "schedule")}
    plain = merge(base, experts, best["method"], schedule=best.get("schedule"), **parameters)
    assert same(weights(plain.encoder), weights(model.encoder))
    assert all(same(old, weights(new)) for old, new in zip(before, (base, *experts.values()), strict=True))
    json.dumps(record)


@pytest.mark.usefixtures("few_steps")
def test_the_method_auto_takes_what_aligns_best(
    base: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever it is: here, by decree, LiNeS at 0.7."""

    def try_out(self: Aligner, method: MergeMethod, schedule: Schedule | None = None) -> Trial:
        scale: Any = getattr(method, "scale", 0.0)
        height = 0.0 if isinstance(scale, Mapping) else 0.5 - abs(scale - 0.7) + (0.2 if schedule else 0.0)
        trial = Trial(method, schedule, {"depth": height, "parts": height})
        self.trials.append(trial)
        return trial

    monkeypatch.setattr(Aligner, "try_out", try_out)
    model = merge(base, experts, "auto", images=IMAGES, count=8)
    record = model.provenance["merge"]
    assert (record["method"], record["scale"]) == ("task-arithmetic", 0.7) and record["schedule"].startswith("lines")
    expected = merge(base, experts, scale=0.7, schedule=Lines())
    assert same(weights(expected.encoder), weights(model.encoder))


def test_what_is_chosen_cannot_be_given_too(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    with pytest.raises(InputError, match="method='auto' needs images without labels"):
        merge(base, experts, "auto")
    given: list[tuple[str, dict[str, Any]]] = [
        ("scale", {"scale": 0.3}),
        ("scale", {"scale": "auto"}),
        ("schedule", {"schedule": "lines"}),
        ("density", {"density": 0.2}),
    ]
    for name, parameters in given:
        with pytest.raises(InputError, match=f"method='auto' chooses '{name}' itself"):
            merge(base, experts, "auto", images=IMAGES, **parameters)
    with pytest.raises(InputError, match="'auto' or 'learned'"):
        merge(base, experts, scale="best", images=IMAGES)


# merge(scale="learned", images=...) ---------------------------------------------------------------------


def folded_distances(base: SimoModel, experts: Mapping[str, SimoModel], method: MergeMethod) -> dict[str, float]:
    """Of a merge's predictions from each expert's, once its heads are folded."""
    merged = with_merged_encoder(base, experts, method)
    folded = fold_heads(merged, list(head_targets(merged, experts, IMAGES))).model
    with torch.no_grad():
        logits = folded(IMAGES.pictures)
        return {t: float(TASKS[t].distance(logits[t], e(IMAGES.pictures)[t])) for t, e in experts.items()}


def test_learned_coefficients_bring_predictions_nearer(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    settings = replace(COEFFICIENT_SETTINGS, steps=15, batch_size=8, lr=0.05)
    method = learn_coefficients(base, experts, IMAGES, 0.1, settings)
    assert isinstance(method, TaskArithmetic) and isinstance(method.scale, Mapping)
    assert {task: len(values) for task, values in method.scale.items()} == {"depth": 4, "parts": 4}
    assert all(value >= 0 and value == round(value, 4) for values in method.scale.values() for value in values)
    start, end = (folded_distances(base, experts, one) for one in (TaskArithmetic(scale=0.1), method))
    assert sum(end[task] / start[task] for task in TASKS) / 2 < 0.98


def test_coefficients_start_from_what_is_given(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    alone = {"depth": experts["depth"]}
    settings = replace(COEFFICIENT_SETTINGS, steps=12, batch_size=8)
    method = learn_coefficients(base, alone, Unlabelled(64), {"depth": 0.5}, settings, rounds=1)
    start = TaskArithmetic(scale={"depth": 0.5})
    assert folded_distances(base, alone, method)["depth"] < folded_distances(base, alone, start)["depth"]
    assert learn_coefficients(base, alone, IMAGES, {"depth": 0.5}, settings, rounds=0) == start


@pytest.mark.usefixtures("few_steps")
def test_scale_learned_merges_with_what_it_learned(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    before = [weights(model) for model in (base, *experts.values())]
    model = merge(base, experts, scale="learned", images=IMAGES, count=8)
    record = model.provenance["merge"]
    assert record["method"] == "task-arithmetic" and record["scale_chosen_on"].startswith("unlabelled images")
    assert {task: len(values) for task, values in record["scale"].items()} == {"depth": 4, "parts": 4}
    plain = merge(base, experts, scale=record["scale"])
    assert same(weights(plain), weights(model)) and "realign" not in model.provenance
    assert all(same(old, weights(new)) for old, new in zip(before, (base, *experts.values()), strict=True))
    assert all(p.requires_grad for m in (base, *experts.values()) for p in m.parameters())
    json.dumps(model.provenance)


@pytest.mark.usefixtures("few_steps")
def test_what_learned_cannot_do_is_said(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    with pytest.raises(InputError, match="scale='learned' needs images"):
        merge(base, experts, scale="learned")
    for wrong in ("ties", Ties()):
        with pytest.raises(InputError, match="scale='learned' works with task arithmetic"):
            merge(base, experts, wrong, scale="learned", images=IMAGES)
    with pytest.raises(InputError, match="schedule"):
        merge(base, experts, scale="learned", images=IMAGES, schedule="lines")


@pytest.mark.usefixtures("few_steps")
def test_a_parameter_that_task_arithmetic_lacks_is_not_passed_over(
    base: SimoModel, experts: dict[str, SimoModel]
) -> None:
    with pytest.raises(InputError, match="density"):
        merge(base, experts, scale="learned", images=IMAGES, count=8, density=0.2)


@pytest.mark.parametrize("count", [0, -1, 1.5])
@pytest.mark.parametrize("scale", [{"scale": "auto"}, {"scale": "learned"}, {"method": "auto"}, {"share": 2}, {}])
def test_a_count_that_is_no_number_of_images_is_refused(
    base: SimoModel, experts: dict[str, SimoModel], scale: dict[str, Any], count: Any
) -> None:
    with pytest.raises(InputError, match=f"count is {count}; give a whole number of 1 or more"):
        merge(base, experts, **scale, images=IMAGES, count=count)


def test_images_of_several_sizes_cannot_teach_coefficients(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    mixed = [IMAGES.image(i) if i % 2 else IMAGES.image(i)[:, :16] for i in range(8)]
    with pytest.raises(InputError, match="images of one size"):
        merge(base, experts, scale="learned", images=mixed)


@pytest.mark.parametrize(
    "start",
    [
        TaskArithmetic(scale=0.3),
        TaskArithmetic(scale={"parts": 0.2, "depth": 0.5}),
        TaskArithmetic(scale={"parts": [0.1, 0.2, 0.3, 0.4], "depth": 0.5}),
    ],
    ids=["one", "per expert", "per block"],
)
def test_a_blend_with_its_first_coefficients_is_the_merged_model(
    base: SimoModel, experts: dict[str, SimoModel], start: TaskArithmetic
) -> None:
    merged = with_merged_encoder(base, experts, start)
    seen = list(head_targets(merged, experts, as_images(IMAGES, 8)))
    folded = fold_heads(merged, seen).model
    blend = _Blend(copy.deepcopy(folded), base, experts, start)
    assert [name for name, p in blend.named_parameters() if p.requires_grad] == ["model.encoder.coefficients"]
    assert blend.blend.coefficients.shape == (2, 4)
    with torch.no_grad():
        expected = folded(IMAGES.pictures)
        for task, found in blend(IMAGES.pictures).items():
            torch.testing.assert_close(found, expected[task], rtol=1e-5, atol=1e-5)
    method = blend.method()
    assert isinstance(method.scale, Mapping)
    again = with_merged_encoder(base, experts, method).encoder.backbone.state_dict()
    for name, value in merged.encoder.backbone.state_dict().items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_a_blend_moves_with_its_coefficients_as_merges_do(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    start = TaskArithmetic(scale=0.3)
    blend = _Blend(with_merged_encoder(base, experts, start), base, experts, start)
    with torch.no_grad():
        blend.blend.coefficients.copy_(torch.tensor([[0.1, 0.9, -0.4, 0.3], [0.5, 0.0, 0.2, 1.3]]))
    method = blend.method()
    assert method.scale == {"depth": [0.1, 0.9, 0.0, 0.3], "parts": [0.5, 0.0, 0.2, 1.3]}
    with torch.no_grad():
        expected = with_merged_encoder(base, experts, method)(IMAGES.pictures)
        for task, found in blend(IMAGES.pictures).items():
            torch.testing.assert_close(found, expected[task], rtol=1e-4, atol=1e-5)
    blend(IMAGES.pictures)["depth"].square().mean().backward()
    grad = blend.blend.coefficients.grad
    assert grad is not None and torch.isfinite(grad).all() and (grad != 0).sum() == 7  # all but what is held at zero


def test_an_agreement_that_is_no_number_is_none_in_the_record() -> None:
    """The record is JSON, which has no infinity: a model with it could not be loaded again."""
    trial = Trial(TaskArithmetic(scale=0.3), None, {"depth": float("nan"), "parts": 0.9})
    assert trial.score == -math.inf
    assert trial.describe() == {"method": "task-arithmetic", "scale": 0.3, "agreement": None}
