"""Evaluation, normalised performance, and Delta_MTL, which is checked against the paper's tables."""

import math
from functools import partial

import pytest
import torch

from simomerge.core.errors import InputError
from simomerge.core.machine import PRECISION
from simomerge.core.progress import show_progress
from simomerge.datasets.base import DenseDataset
from simomerge.datasets.batches import images_within
from simomerge.datasets.tasks import Task
from simomerge.training.evaluate import delta_mtl, evaluate, normalised_performance
from simomerge.training.metrics import TaskMetrics
from simomerge.training.statistics import fisher_information

SEG = Task("seg", "segmentation", classes=("floor", "wall", "sofa"))
NYU = {"seg": SEG, "depth": Task("depth"), "normals": Task("normals")}


def nyu(miou, abs_err, angle):
    return {"seg": {"miou": miou}, "depth": {"abs_err": abs_err}, "normals": {"mean_angle": angle}}


# Source of the numbers: arXiv 2504.11268, NYUv2.
EXPERTS = nyu(70.79, 0.2314, 18.02)
PAPER = {  # method: its scores, its Delta_MTL in the paper's table
    "joint MTL": (nyu(69.01, 0.2531, 19.01), -5.4),
    "task arithmetic": (nyu(65.78, 0.4171, 26.13), -27.5),
    "task arithmetic + heads": (nyu(69.95, 0.2524, 19.29), -5.4),
}


# Comparison ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PAPER)
def test_the_papers_table_is_its_mean_normalised_performance_minus_one(method):
    scores, table = PAPER[method]
    ratios = normalised_performance(scores, EXPERTS, NYU)
    assert round(100 * (sum(ratios.values()) / 3 - 1), 1) == table


@pytest.mark.parametrize(
    ("method", "expected"), [("joint MTL", -5.80), ("task arithmetic", -44.11), ("task arithmetic + heads", -5.77)]
)
def test_delta_mtl_is_the_papers_formula_which_differs_from_its_table(method, expected):
    scores, table = PAPER[method]
    gains = [
        (scores["seg"]["miou"] - 70.79) / 70.79,
        -(scores["depth"]["abs_err"] - 0.2314) / 0.2314,
        -(scores["normals"]["mean_angle"] - 18.02) / 18.02,
    ]
    delta = delta_mtl(scores, EXPERTS, NYU)
    assert delta == pytest.approx(100 * sum(gains) / 3)
    assert round(delta, 2) == expected
    assert delta < table  # M / b - 1 is harsher than b / M - 1 on a metric where lower is better


def test_equal_to_the_baseline_is_zero_and_one():
    assert delta_mtl(EXPERTS, EXPERTS, NYU) == 0
    assert normalised_performance(EXPERTS, EXPERTS, NYU) == {"seg": 1, "depth": 1, "normals": 1}


@pytest.mark.parametrize(("name", "metric", "better"), [("seg", "miou", 80.0), ("depth", "abs_err", 0.2)])
def test_better_is_above_and_worse_below_whatever_the_sign_of_the_metric(name, metric, better):
    baseline = {name: EXPERTS[name]}
    worse = 2 * EXPERTS[name][metric] - better
    assert delta_mtl({name: {metric: better}}, baseline, NYU) > 0 > delta_mtl({name: {metric: worse}}, baseline, NYU)
    assert normalised_performance({name: {metric: better}}, baseline, NYU)[name] > 1
    assert normalised_performance({name: {metric: worse}}, baseline, NYU)[name] < 1


def test_only_the_main_metric_of_a_task_counts():
    scores = {"depth": {"rel_err": 99.0, "abs_err": 0.2314}}
    assert delta_mtl(scores, {"depth": {"abs_err": 0.2314, "rel_err": 1.0}}, NYU) == 0


def test_a_model_with_fewer_tasks_is_compared_on_those():
    assert delta_mtl({"seg": {"miou": 70.79 * 1.1}}, EXPERTS, NYU) == pytest.approx(10)


def test_an_error_of_zero_is_infinitely_better_not_a_crash():
    scores = {"depth": {"abs_err": 0.0}}
    assert normalised_performance(scores, EXPERTS, NYU) == {"depth": math.inf}
    assert delta_mtl(scores, EXPERTS, NYU) == 100


@pytest.mark.parametrize("compare", [delta_mtl, normalised_performance])
class TestErrors:
    def test_a_task_without_a_baseline_is_named(self, compare):
        with pytest.raises(InputError, match="no score for task 'depth'"):
            compare(EXPERTS, {"seg": EXPERTS["seg"]}, NYU)

    def test_a_task_that_is_not_described_is_named(self, compare):
        with pytest.raises(InputError, match="scores of 'depth', and tasks has no such task; give all"):
            compare(EXPERTS, EXPERTS, {"seg": NYU["seg"]})

    def test_no_scores_are_refused(self, compare):
        with pytest.raises(InputError, match="no scores"):
            compare({}, EXPERTS, NYU)

    @pytest.mark.parametrize("value", [0.0, math.nan, -1.0])
    def test_a_baseline_that_is_not_positive_is_refused(self, compare, value):
        with pytest.raises(InputError, match="'depth': the baseline's abs_err"):
            compare(EXPERTS, EXPERTS | {"depth": {"abs_err": value}}, NYU)


# Evaluation ---------------------------------------------------------------------------------------------


class Random(DenseDataset):
    """Seven random images with partly invalid targets. The dataset records which targets were read."""

    def __init__(self, tasks):
        super().__init__(tasks, 7)
        self.asked = set()

    def image(self, index):
        return torch.rand(3, 20, 28, generator=torch.Generator().manual_seed(index))

    def targets(self, index, tasks):
        self.asked.update(tasks)
        generator = torch.Generator().manual_seed(100 + index)
        valid = torch.rand(20, 28, generator=generator) > index / 10
        made = {
            "seg": torch.where(valid, torch.randint(0, 3, (20, 28), generator=generator), -1),
            "depth": torch.where(valid, torch.rand(1, 20, 28, generator=generator) + 0.5, 0.0),
            "normals": torch.nn.functional.normalize(torch.randn(3, 20, 28, generator=generator), dim=0) * valid,
        }
        return {name: made[name] for name in tasks}


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Use float32: in bfloat16, batches of different sizes differ in the third digit."""
    monkeypatch.setenv(PRECISION, "fp32")


def test_evaluate_equals_predicting_one_image_at_a_time(make_model):
    model, dataset = make_model(NYU), Random(NYU)
    metrics = {name: TaskMetrics(task) for name, task in NYU.items()}
    for index in range(7):
        item = dataset[index]
        for name, value in model.predict(item["image"]).items():
            prediction = torch.from_numpy(value)
            prediction = prediction[None] if name == "depth" else prediction
            metrics[name].update(prediction[None], item[name][None])
    expected = {name: metric.compute() for name, metric in metrics.items()}
    for batch_size in (3, 64):
        scores = evaluate(model, dataset, batch_size=batch_size)
        for name, values in expected.items():
            assert scores[name] == pytest.approx(values, rel=1e-3)


def test_large_images_have_small_batches_which_change_no_metric(make_model, monkeypatch):
    model, dataset, sizes = make_model(NYU), Random(NYU), []
    model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    alone, together = (evaluate(model, dataset, batch_size=size) for size in (1, 64))
    assert sizes == [1] * 7 + [7]
    sizes.clear()
    limited = partial(images_within, max_pixels=3 * 20 * 28 + 1)
    monkeypatch.setattr("simomerge.training.evaluate.images_within", limited)
    by_pixels = evaluate(model, dataset)
    assert sizes == [3, 3, 1]
    for name in NYU:
        assert by_pixels[name] == pytest.approx(alone[name], rel=1e-5)
        assert together[name] == pytest.approx(alone[name], rel=1e-5)


@pytest.mark.parametrize(("size", "images"), [((64, 80), 64), ((480, 640), 6), ((1024, 2048), 1), ((3000, 4000), 1)])
def test_a_batch_has_at_most_two_million_pixels_or_a_single_image(size, images):
    assert images_within(64, torch.empty(3, *size)) == images


def test_evaluate_reads_only_the_shared_tasks(make_model):
    model, dataset = make_model({"depth": NYU["depth"], "edges": Task("edges")}), Random(NYU)
    assert list(evaluate(model, dataset)) == ["depth"]
    assert dataset.asked == {"depth"}


@pytest.mark.parametrize("batch_size", [0, -1, 1.5])
def test_evaluate_needs_images_in_a_batch(make_model, batch_size):
    with pytest.raises(InputError, match=f"batch_size is {batch_size}; give a whole number of 1 or more"):
        evaluate(make_model(NYU), Random(NYU), batch_size=batch_size)


def test_evaluate_with_no_task_in_common_names_both_sides(make_model):
    with pytest.raises(InputError, match=r"predicts edges, the dataset has seg, depth, normals: no task in common"):
        evaluate(make_model([Task("edges")]), Random(NYU))
    with pytest.raises(InputError, match="predicts nothing"):
        evaluate(make_model({}), Random(NYU))


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_changes_neither_mode_nor_weights(make_model, training):
    model = make_model(NYU).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, Random(NYU))
    assert model.training == training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_evaluate_reports_progress_by_image(make_model):
    lines = []
    with show_progress(lambda *a: lines.append(a[:3])):
        evaluate(make_model([NYU["depth"]]), Random(NYU), batch_size=3, label="test")
    assert lines == [("test", 3, 7), ("test", 6, 7), ("test", 7, 7)]


@pytest.mark.parametrize("measure", [evaluate, fisher_information])
def test_classes_in_another_order_are_refused_before_anything_is_read(make_model, measure):
    """A label is the number of its class, so that the numbers would mean nothing."""
    dataset = Random({"seg": Task("seg", "segmentation", classes=("wall", "floor", "sofa"))})
    with pytest.raises(InputError, match="class 0 is 'floor' in the model, but 'wall' in the data, which has the same"):
        measure(make_model([SEG]), dataset)
    assert not dataset.asked
