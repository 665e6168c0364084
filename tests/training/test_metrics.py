"""Metrics compared with numpy: streaming, invalid pixels, and the conventions of torchmetrics."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cosine
from torchmetrics.functional.classification import binary_f1_score, multiclass_jaccard_index

from simomerge.datasets.tasks import KINDS, Task
from simomerge.training.metrics import TaskMetrics

SEG = Task("seg", "segmentation", classes=("floor", "wall", "sofa", "bed"))
OWN = {
    "wind": Task("wind", "regression", channels=2, unit="m/s", norm="l2"),
    "height": Task("height", "regression", unit="m", range=(-1, 2)),
}
TASKS = {"seg": SEG, **{kind: Task(kind) for kind in KINDS if kind != "segmentation"}, **OWN}
EVERY = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
BATCHES = (3, 1, 4)  # uneven, so that a mean of batch means is wrong


def sample(task, count=8, seed=0):
    """Predictions and targets of ``count`` images as numpy arrays; a third of the pixels is invalid, unevenly."""
    rng = np.random.default_rng(seed)
    valid = rng.random((count, 5, 6)) > np.linspace(0, 0.7, count)[:, None, None]
    if task.kind == "segmentation":
        prediction, target = rng.integers(0, 4, (2, count, 5, 6))
        return prediction, np.where(valid, np.where(rng.random(target.shape) > 0.5, prediction, target), -1)
    shape = (count, task.channels, 5, 6)
    target = rng.uniform(0.2, 3, shape).astype(np.float32)
    prediction = (target * rng.uniform(0.6, 1.6, shape)).astype(np.float32)
    mark = np.nan
    if task.kind in ("depth", "disparity"):
        mark = 0.0
    elif task.kind == "normals":
        target = rng.normal(size=shape)
        prediction = (target + rng.normal(0, 0.3, shape)).astype(np.float32)
        target = (target / np.linalg.norm(target, axis=1, keepdims=True)).astype(np.float32)
        mark = 0.0
    elif task.kind in ("edges", "binary"):
        mark = -1.0
        prediction, target = rng.random(shape, np.float32), (rng.random(shape) > 0.7).astype(np.float32)
    return prediction, np.where(valid[:, None], target, np.float32(mark))


def reference(task, prediction, target):
    """The same metrics, written with numpy in float64."""
    prediction, target = np.asarray(prediction, np.float64), np.asarray(target, np.float64)
    if task.kind == "segmentation":
        p, t = prediction[target != -1], target[target != -1]
        ious = []
        for label in range(4):
            union = ((p == label) | (t == label)).sum()
            if union:
                ious.append(((p == label) & (t == label)).sum() / union)
        return {"miou": 100 * np.mean(ious), "pixel_accuracy": 100 * np.mean(p == t)}
    if task.kind == "normals":
        valid = (target**2).sum(1) > 0
        pairs = zip(
            prediction.transpose(0, 2, 3, 1)[valid].tolist(), target.transpose(0, 2, 3, 1)[valid].tolist(), strict=True
        )
        angles = np.array([math.degrees(math.acos(max(-1, min(1, 1 - cosine(p, t))))) for p, t in pairs])
        return {"mean_angle": angles.mean(), "within_11": 100 * np.mean(angles < 11.25)}
    if task.kind in ("edges", "binary"):
        p, t = prediction[target >= 0] > 0.5, target[target >= 0] > 0.5
        precision, recall = (p & t).sum() / p.sum(), (p & t).sum() / t.sum()
        f1 = 2 * precision * recall / (precision + recall)
        found = {"f1": 100 * f1, "precision": 100 * precision, "recall": 100 * recall}
        return {**found, "iou": 100 * (p & t).sum() / (p | t).sum()} if task.kind == "binary" else found
    if task.kind == "flow":
        lengths = np.hypot(*(prediction - target).transpose(1, 0, 2, 3))
        lengths = lengths[~np.isnan(lengths)]
        return {"epe": lengths.mean(), "within_3": 100 * np.mean(lengths < 3)}
    valid = target > 0 if task.kind in ("depth", "disparity") else ~np.isnan(target)
    p, t = prediction[valid], target[valid]
    unit = 100 if task.unit.startswith("%") else 1
    expected = {"abs_err": unit * np.abs(p - t).mean()}
    if task.kind == "regression":
        expected["rmse"] = np.sqrt(np.square(p - t).mean())
    if task.kind == "depth":
        expected["rel_err"] = 100 * (np.abs(p - t) / t).mean()
        expected["delta_1"] = 100 * np.mean(np.maximum(p / t, t / p) < 1.25)
    return expected


def stream(task, prediction, target, sizes):
    metrics = TaskMetrics(task)
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        metrics.update(torch.from_numpy(prediction[rows]), torch.from_numpy(target[rows]))
        start += size
    assert start == len(prediction)
    return metrics.compute()


@EVERY
def test_metrics_over_uneven_batches_equal_numpy_over_all_valid_pixels(task):
    prediction, target = sample(task)
    got = stream(task, prediction, target, BATCHES)
    assert got == pytest.approx(reference(task, prediction, target), rel=1e-4)
    assert task.metric in got


@EVERY
@settings(max_examples=8, deadline=None, derandomize=True)
@given(cuts=st.sets(st.integers(1, 7)), seed=st.integers(0, 3))
def test_streaming_equals_one_batch_for_all_batch_sizes(task, cuts, seed):
    prediction, target = sample(task, 8, seed)
    edges = [0, *sorted(cuts), 8]
    streamed = stream(task, prediction, target, np.diff(edges).tolist())
    assert streamed == pytest.approx(stream(task, prediction, target, [8]), rel=1e-4)


@EVERY
def test_predictions_in_invalid_pixels_do_not_count(task):
    prediction, target = sample(task)
    if task.kind == "segmentation":
        invalid = target == -1
        changed = np.where(invalid, 3 - prediction, prediction)
    else:
        invalid = np.isnan(target) | (target == (-1 if task.kind in ("edges", "binary") else 0))
        if task.kind == "normals":
            invalid = np.broadcast_to(invalid.all(1, keepdims=True), target.shape)
        elif task.kind in ("edges", "binary"):
            invalid = target == -1
        changed = np.where(invalid, np.float32(0.987), prediction)
    assert invalid.any() and (changed != prediction).any()
    assert stream(task, changed, target, BATCHES) == stream(task, prediction, target, BATCHES)


def nothing_valid(task, target):
    marks = {"segmentation": -1, "edges": -1, "depth": 0, "disparity": 0, "normals": 0}
    return np.full_like(target, marks.get(task.kind, np.nan))


@EVERY
def test_without_valid_pixels_metrics_are_nan_without_a_warning(task):
    prediction, target = sample(task)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = stream(task, prediction, nothing_valid(task, target), BATCHES)
        assert TaskMetrics(task).compute().keys() == got.keys()
    assert got.keys() == reference(task, prediction, target).keys()
    assert all(math.isnan(value) for value in got.values())


@EVERY
def test_a_batch_without_valid_pixels_changes_nothing(task):
    prediction, target = sample(task)
    gap = np.concatenate([target[:3], nothing_valid(task, target[:2]), target[3:]])
    filled = np.concatenate([prediction[:3], prediction[:2], prediction[3:]])
    assert stream(task, filled, gap, (3, 2, 5)) == stream(task, prediction, target, (3, 5))


@EVERY
def test_a_model_that_predicts_nan_is_not_scored_on_the_rest(task):
    _, target = sample(task)
    logits = torch.randn(len(target), task.channels, *target.shape[-2:])
    valid = task.valid(torch.from_numpy(target))
    counts = valid.any(1) if valid.ndim == 4 else valid
    for where, is_scored in ((counts, False), (~counts, True)):
        place, row, column = where.nonzero()[0].tolist()
        given = logits.clone()
        given[place, -1, row, column] = math.nan
        metrics = TaskMetrics(task)
        metrics.update_by_logits(logits, torch.from_numpy(target))
        expected = metrics.compute()
        metrics = TaskMetrics(task)
        metrics.update_by_logits(given, torch.from_numpy(target))
        assert metrics.compute() == (
            expected if is_scored else pytest.approx(dict.fromkeys(expected, math.nan), nan_ok=True)
        )


@pytest.mark.parametrize("name", ["edges", "binary"])
def test_probabilities_with_nan_have_no_score(name):
    prediction, target = sample(TASKS[name])
    place = tuple(np.argwhere(target >= 0)[0])
    prediction[place] = np.nan
    assert all(map(math.isnan, stream(TASKS[name], prediction, target, BATCHES).values()))


@EVERY
def test_a_perfect_prediction_has_the_perfect_score(task):
    _, target = sample(task)
    best = stream(task, np.where(target == -1, 0, target) if task is SEG else target, target, BATCHES)
    assert best[task.metric] == pytest.approx(100 if task.higher_is_better else 0, abs=0.05)


# Conventions --------------------------------------------------------------------------------------------


def miou(prediction, target):
    return stream(SEG, np.array([[prediction]]), np.array([[target]]), [1])["miou"]


def test_a_class_in_neither_prediction_nor_target_is_left_out_of_miou():
    assert miou([0, 0, 1], [0, 1, 1]) == pytest.approx(100 * (1 / 2 + 1 / 2) / 2)  # of four classes, two count


def test_a_class_only_predicted_counts_as_zero():
    assert miou([0, 3, 0], [0, 0, 0]) == pytest.approx(100 * (2 / 3 + 0) / 2)


def test_a_class_only_in_the_target_counts_as_zero():
    assert miou([0, 0, 0], [0, 2, 0]) == pytest.approx(100 * (2 / 3 + 0) / 2)


def test_a_class_predicted_only_in_invalid_pixels_is_left_out():
    assert miou([0, 0, 3], [0, 0, -1]) == 100


def test_miou_and_f1_are_torchmetrics_own():
    prediction, target = sample(SEG)
    expected = multiclass_jaccard_index(torch.from_numpy(prediction), torch.from_numpy(target), 4, ignore_index=-1)
    assert stream(SEG, prediction, target, BATCHES)["miou"] == pytest.approx(100 * expected.item(), rel=1e-6)
    prediction, target = (torch.from_numpy(a) for a in sample(TASKS["edges"]))
    expected = binary_f1_score(prediction[target >= 0], target[target >= 0].long())
    got = stream(TASKS["edges"], prediction.numpy(), target.numpy(), BATCHES)["f1"]
    assert got == pytest.approx(100 * expected.item(), rel=1e-6)


def test_miou_is_over_all_images_not_a_mean_over_images():
    prediction, target = np.array([[[0, 0]], [[1, 1]]]), np.array([[[0, 0]], [[0, 1]]])
    assert stream(SEG, prediction, target, (1, 1))["miou"] == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)


def test_angles_are_degrees_and_length_does_not_matter():
    target = np.array([1.0, 0, 0], np.float32).reshape(1, 3, 1, 1)
    for vector, angle in (([5, 0, 0], 0), ([1, 1, 0], 45), ([0, 0, 0.1], 90), ([-3, 0, 0], 180)):
        prediction = np.array(vector, np.float32).reshape(1, 3, 1, 1)
        assert stream(TASKS["normals"], prediction, target, [1])["mean_angle"] == pytest.approx(angle, abs=1e-2)
