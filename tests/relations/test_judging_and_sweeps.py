"""Judges: 1 is the expert. Sweeps: lambda 0 is the base, 1 the expert, between them task arithmetic of one expert."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch

from simomerge.assembly.experts import with_merged_encoder
from simomerge.core.errors import InputError
from simomerge.datasets.tasks import Task
from simomerge.merging import TaskArithmetic, ZeroShot
from simomerge.models.model import SimoModel
from simomerge.relations import Judge, Sweeps, sweep
from simomerge.training.evaluate import delta_mtl, evaluate, normalised_performance

from .conftest import TASKS, RandomDataset

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(scope="module")
def merged(base: SimoModel, experts: dict[str, SimoModel]) -> SimoModel:
    return with_merged_encoder(base, experts, TaskArithmetic(scale=0.5))


def test_labels_judge_as_the_evaluation_does(
    experts: dict[str, SimoModel], merged: SimoModel, dataset: RandomDataset
) -> None:
    judge = Judge(experts, dataset, labelled=True)
    scores, baseline = judge.scores(merged), {t: evaluate(e, dataset)[t] for t, e in experts.items()}
    assert scores == evaluate(merged, dataset)
    assert judge.performance(scores) == pytest.approx(normalised_performance(scores, baseline, TASKS))
    gains = judge.gains(scores)
    assert sum(gains.values()) / 3 == pytest.approx(delta_mtl(scores, baseline, TASKS))
    assert judge.gains(baseline) == pytest.approx(dict.fromkeys(TASKS, 0.0))


def test_an_expert_agrees_with_itself(experts: dict[str, SimoModel], merged: SimoModel, judge: Judge) -> None:
    own = {task: judge.scores(expert)[task] for task, expert in experts.items()}
    assert judge.performance(own) == pytest.approx(dict.fromkeys(experts, 1.0), abs=1e-5)
    assert judge.gains(own) == pytest.approx(dict.fromkeys(experts, 0.0), abs=1e-3)
    assert all(value < 0.99 for value in judge.performance(judge.scores(merged)).values())


def test_another_images_prediction_is_no_agreement(experts: dict[str, SimoModel], judge: Judge) -> None:
    """Targets that are shifted by one image score the chance level, which is performance 0."""
    targets = {task: torch.cat([batch.targets[task] for batch in judge]) for task in experts}
    for task, metric in judge.metrics().items():
        metric.update(targets[task].roll(1, 0), targets[task])
        assert judge.performance({task: metric.compute()})[task] == pytest.approx(0, abs=1e-6)


def test_chance_does_not_depend_on_the_batches(experts: dict[str, SimoModel], dataset: RandomDataset) -> None:
    """No image is compared with its own prediction, even if the first batch has only one image."""
    chances = [Judge(experts, dataset, labelled=False, batch_size=size).chance for size in (1, 12)]
    assert chances[0] == pytest.approx(chances[1], rel=1e-4)


def test_values_that_are_not_finite_are_neither_in_the_width_nor_the_peak() -> None:
    nan = float("nan")

    def sweeps(curve: list[float]) -> Sweeps:
        return Sweeps(["a"], [0.0, 0.5, 1.0, 1.5], True, 1, {"a": {"a": curve}}, {})

    assert sweeps([0.5, 0.9, 1.0, nan]).peak("a") == 1.0 and sweeps([0.95, 0.95, 1.0, nan]).width("a") == 1.0
    assert math.isnan(sweeps([0.5, 0.8, nan, nan]).width("a")) and math.isnan(sweeps([nan] * 4).peak("a"))


def test_chance_is_measured_over_batches_of_several_sizes(experts: dict[str, SimoModel]) -> None:
    from simomerge.datasets.pictures import as_images

    rng = torch.Generator().manual_seed(0)
    pictures = as_images([torch.rand(3, 24, width, generator=rng) for width in (32, 32, 40, 24)])
    judge = Judge(experts, pictures, labelled=False, batch_size=2)
    assert [batch.images.shape[-1] for batch in judge] == [32, 40, 24]
    assert all(judge.chance[task] == judge.chance[task] for task in experts)


def test_judges_without_enough_information_are_errors(experts: dict[str, SimoModel], dataset: RandomDataset) -> None:
    with pytest.raises(InputError, match="at least two"):
        Judge(experts, dataset.take(1), labelled=False)
    blind = copy.deepcopy(experts["depth"])
    for parameter in blind.heads.parameters():
        parameter.data.zero_()
    with pytest.raises(InputError, match="'depth' predicts the same for every image"):
        Judge({"depth": blind}, dataset, labelled=False)
    with pytest.raises(InputError, match="nothing can be relative"):
        Judge({"parts": _never_right(experts["parts"])}, _one_class(dataset), labelled=True)


def test_predictions_of_small_values_are_not_alike(experts: dict[str, SimoModel], dataset: RandomDataset) -> None:
    """Only their unit is small."""
    chances = []
    for factor in (1.0, 1e-7):
        head = copy.deepcopy(experts["depth"].heads["depth"])
        for parameter in head.output.parameters():
            parameter.data.mul_(factor)
        expert = SimoModel(experts["depth"].encoder, {"depth": Task("depth", "regression")}, {"depth": head}).eval()
        judge = Judge({"depth": expert}, dataset, labelled=False)
        assert judge.performance(judge.scores(expert))["depth"] == pytest.approx(1)
        chances.append(judge.chance["depth"])
    assert chances[1] == pytest.approx(1e-7 * chances[0], rel=1e-3) and 0 < chances[1] < 1e-6


def _never_right(expert: SimoModel) -> SimoModel:
    wrong = copy.deepcopy(expert)
    for parameter in wrong.heads.parameters():
        parameter.data.zero_()
    list(wrong.heads.parameters())[-1].data[0] = 9.0
    return wrong


def _one_class(dataset: RandomDataset) -> RandomDataset:
    other = RandomDataset()
    other.truth["parts"] = torch.full_like(other.truth["parts"], 1)
    return other


@pytest.mark.parametrize("kind", ["disparity", "depth", "log_depth"])
def test_every_pixel_of_an_experts_prediction_counts(
    kind: str, make_model: Callable[..., SimoModel], dataset: RandomDataset
) -> None:
    """Also where a disparity is at its lower bound, as in the sky, although 0 means no value in labels."""
    task = Task("far", kind)
    expert = make_model({"far": task}, seed=1)
    images = torch.stack([dataset.image(index) for index in range(4)])
    with torch.no_grad():
        *_, bias = (values for name, values in expert.heads.named_parameters() if name.endswith("bias"))
        bias.sub_(expert(images)["far"].median())  # half of the pixels are below 0
        wanted = task.activate(expert(images)["far"])
    judge = Judge({"far": expert}, images, labelled=False)
    (batch,) = judge
    target = batch.targets["far"]
    assert task.valid(target).all() and torch.allclose(target, wanted, atol=1e-6)
    near = torch.where(target <= target.min(), 5.0, target)
    metric = judge.metrics()["far"]
    metric.update(near, target)
    error, chance = (float((values - target).abs().mean()) for values in (near, target.roll(1, 0)))
    assert error > 2
    assert judge.performance({"far": metric.compute()})["far"] == pytest.approx(1 - error / chance, rel=1e-4)


# Sweeps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [True, False])
def test_the_ends_are_the_base_and_the_expert(
    base: SimoModel, experts: dict[str, SimoModel], dataset: RandomDataset, labelled: bool
) -> None:
    judge = Judge(experts, dataset.take(5), labelled, batch_size=2)
    found = sweep(base, experts, judge, (0, 0.4, 1))
    assert found.tasks == list(experts) and found.images == 5 and found.labelled == labelled
    unmerged = judge.performance(judge.scores(with_merged_encoder(base, experts, ZeroShot())))
    for primary, expert in experts.items():
        heads = {task: other.heads[task] for task, other in experts.items()}
        own = judge.performance(judge.scores(SimoModel(expert.encoder, TASKS, heads)))
        for task, curve in found.performance[primary].items():
            assert curve[0] == pytest.approx(unmerged[task], abs=1e-6)
            assert curve[2] == pytest.approx(own[task], abs=1e-6)
        assert found.performance[primary][primary][2] == pytest.approx(1, abs=1e-5)


def test_between_them_lies_task_arithmetic_of_one_expert(
    base: SimoModel, experts: dict[str, SimoModel], dataset: RandomDataset
) -> None:
    found = sweep(base, experts, Judge(experts, dataset, labelled=True), (0, 0.4, 1, 1.3))
    for primary in ("depth", "parts"):
        for place, at in ((1, 0.4), (3, 1.3)):
            alone = with_merged_encoder(base, {primary: experts[primary]}, TaskArithmetic(scale=at))
            heads = {task: other.heads[task] for task, other in experts.items()}
            scores = evaluate(SimoModel(alone.encoder, TASKS, heads), dataset)
            for task in TASKS:
                wanted = scores[task][TASKS[task].metric]
                assert found.metrics[primary][task][place] == pytest.approx(wanted, rel=2e-3)


def test_experts_are_not_changed(base: SimoModel, experts: dict[str, SimoModel], judge: Judge) -> None:
    before = {task: expert.encoder_fingerprint() for task, expert in experts.items()}
    sweep(base, experts, judge, (0, 1))
    assert before == {task: expert.encoder_fingerprint() for task, expert in experts.items()}


@pytest.mark.parametrize("lambdas", [(0, 0.5), (0.5, 1), (-0.1, 0, 1)])
def test_invalid_lambdas(base: SimoModel, experts: dict[str, SimoModel], judge: Judge, lambdas: tuple) -> None:
    with pytest.raises(InputError, match=r"give 0 \(the base\), 1 \(the expert\)"):
        sweep(base, experts, judge, lambdas)


def sweeps_of(curves: dict[str, dict[str, list[float]]], lambdas: list[float]) -> Sweeps:
    return Sweeps(list(curves), lambdas, True, 1, curves, {})


def test_peak_width_and_effect_of_a_curve() -> None:
    lambdas = [0.0, 0.5, 1.0, 1.5]
    curves = {"a": {"a": [0.2, 0.6, 1.0, 0.8], "b": [0.5, 0.7, 0.9, 0.0]}, "b": {"a": [0.2] * 4, "b": [1.0] * 4}}
    found = sweeps_of(curves, lambdas)
    assert found.peak("a") == 1.0
    # 0.9 is reached a quarter of the way down on the right, an eighth of the way (0.4 per half) on the left.
    assert found.width("a") == pytest.approx(0.25 + 0.125)
    assert found.width("b") == pytest.approx(1.5)
    assert found.effect("a", "b") == pytest.approx(0.8 - 0.5)
    assert found.effect("b", "a") == pytest.approx(0)
