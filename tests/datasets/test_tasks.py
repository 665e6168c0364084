"""Losses against slow loops, invalid pixels, activations, colours, and what a Task refuses."""

import json
import math
import tracemalloc

import numpy as np
import pytest
import torch

from simomerge.core.errors import InputError
from simomerge.datasets import colours
from simomerge.datasets.colours import class_colours, colourise
from simomerge.datasets.tasks import KINDS, Task, select_tasks

SEG = Task("seg", "segmentation", classes=("floor", "wall", "sofa"), colours=((255, 0, 0), (0, 255, 0), (1, 2, 3)))
OWN = {
    "wind": Task("wind", "regression", channels=2, unit="m/s", norm="l2"),
    "height": Task("height", "regression", unit="m", range=(-1, 2)),
}
TASKS = {"seg": SEG, **{kind: Task(kind) for kind in KINDS if kind != "segmentation"}, **OWN}
INVALID = {"segmentation": -1, "edges": -1.0, "binary": -1.0, "normals": 0.0, "depth": 0.0, "disparity": 0.0}  # or NaN
EVERY = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())


def sample(task, seed=0, invalid=True):
    """Logits (2, C, 4, 5), a target, and the mask (2, 4, 5) of its valid pixels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, task.channels, 4, 5, generator=generator)
    valid = torch.rand(2, 4, 5, generator=generator) > 0.3 if invalid else torch.ones(2, 4, 5, dtype=torch.bool)
    if task.kind == "segmentation":
        target = torch.randint(0, task.channels, (2, 4, 5), generator=generator)
        return logits, torch.where(valid, target, -1), valid
    target = torch.rand(2, task.channels, 4, 5, generator=generator) + 0.1
    if task.kind == "normals":
        target = torch.nn.functional.normalize(target - 0.6, dim=1)
    if task.kind in ("edges", "binary"):
        target = (target > 0.6).float()
    return logits, torch.where(valid[:, None], target, INVALID.get(task.kind, math.nan)), valid


def invalidate(task, target):
    return torch.full_like(target, INVALID.get(task.kind, math.nan))


def loss_of_pixel(task, logits, target):
    """Loss terms of one pixel, from plain numbers."""
    if task.kind == "segmentation":
        return [math.log(sum(math.exp(value) for value in logits)) - logits[int(target)]]
    if task.kind == "normals":
        length = math.sqrt(sum(value**2 for value in logits))
        return [1 - sum(a * b for a, b in zip(logits, target, strict=True)) / length]
    if task.kind in ("edges", "binary"):
        probability = 1 / (1 + math.exp(-logits[0]))
        weight = 2 if task.kind == "edges" else 1
        return [-weight * math.log(probability) if target[0] == 1 else -math.log(1 - probability)]
    if task.kind == "flow":
        return [math.dist(logits, target)]
    if task.norm == "l2":
        return [(a - b) ** 2 for a, b in zip(logits, target, strict=True)]
    return [abs(a - b) for a, b in zip(logits, target, strict=True)]


# Losses -------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("seed", [0, 1])
def test_losses_equal_a_slow_loop_over_the_valid_pixels(task, seed):
    logits, target, valid = sample(task, seed)
    terms = []
    for image, row, column in valid.nonzero().tolist():
        pixel = target[image, row, column] if task is SEG else target[image, :, row, column].tolist()
        terms += loss_of_pixel(task, logits[image, :, row, column].tolist(), pixel)
    assert 0 < len(terms) < valid.numel() * task.channels
    assert task.loss(logits, target).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


@EVERY
def test_invalid_pixels_change_neither_the_loss_nor_any_gradient(task):
    logits, target, valid = sample(task)
    changed = torch.where(valid[:, None], logits, 100 * torch.randn(logits.shape)).requires_grad_()
    logits.requires_grad_()
    losses = [task.loss(logits, target), task.loss(changed, target)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == losses[1].item()
    assert torch.equal(logits.grad, changed.grad)
    outside = (~valid[:, None]).expand_as(logits)
    assert (logits.grad[outside] == 0).all()
    assert (logits.grad[~outside] != 0).any()


@EVERY
@pytest.mark.parametrize("mark", [math.nan, math.inf, -math.inf])
def test_targets_that_are_not_finite_count_like_invalid_ones(task, mark):
    if task is SEG:
        return
    logits, target, valid = sample(task)
    marked = torch.where(valid[:, None], target, mark)
    assert torch.equal(task.valid(marked), task.valid(target))
    found, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses = task.loss(found, marked), task.loss(expected, target)
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    assert torch.equal(found.grad, expected.grad)


@EVERY
def test_a_batch_with_nothing_valid_gives_zero_and_a_zero_gradient(task):
    logits, target, _ = sample(task)
    logits.requires_grad_()
    loss = task.loss(logits, invalidate(task, target))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@EVERY
def test_losses_are_computed_in_float32_even_for_half_logits(task):
    logits, target, _ = sample(task)
    half = logits.bfloat16()
    loss = task.loss(half, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(task.loss(half.float(), target).item(), rel=1e-6)


@EVERY
def test_one_valid_pixel_is_its_own_mean(task):
    logits, target, valid = sample(task)
    image, row, column = valid.nonzero()[0].tolist()
    alone = invalidate(task, target)
    alone[image, ..., row, column] = target[image, ..., row, column]
    pixel = target[image, row, column] if task is SEG else target[image, :, row, column].tolist()
    terms = loss_of_pixel(task, logits[image, :, row, column].tolist(), pixel)
    assert task.loss(logits, alone).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_normals_loss_is_zero_at_the_target_whatever_the_length_and_two_opposite():
    _, target, _ = sample(TASKS["normals"], invalid=False)
    loss = TASKS["normals"].loss
    assert loss(7 * target, target).item() == pytest.approx(0, abs=1e-6)
    assert loss(-0.1 * target, target).item() == pytest.approx(2, abs=1e-6)


def test_an_edge_pixel_weighs_twice():
    logits = torch.zeros(1, 1, 1, 2)
    edge, none = (TASKS["edges"].loss(logits, torch.full_like(logits, value)).item() for value in (1.0, 0.0))
    assert edge == pytest.approx(2 * math.log(2)) and none == pytest.approx(math.log(2))


# Activations --------------------------------------------------------------------------------------------


def test_activate_gives_predictions_in_the_units_of_the_target():
    column = torch.tensor([-2.0, 0.25, 3.0]).view(1, 1, 1, 3)
    for kind in ("texture", "keypoints", "autoencoder"):
        assert Task(kind).activate(column).flatten().tolist() == [0, 0.25, 1]
    depth, disparity = (Task(kind).activate(column).flatten() for kind in ("depth", "disparity"))
    assert depth[0] > 0 and depth[1:].tolist() == [0.25, 3]  # positive: 0 would mean invalid
    assert disparity.tolist() == [0, 0.25, 3]  # 0 is far away
    expected = [1 / (1 + math.exp(-value)) for value in (-2, 0.25, 3)]
    assert Task("edges").activate(column).flatten().tolist() == pytest.approx(expected)
    labels = SEG.activate(torch.tensor([[0.0, 5], [1, 0], [0, 0]]).view(1, 3, 1, 2))
    assert labels.dtype == torch.int64 and labels.tolist() == [[[1, 0]]]
    vector = Task("normals").activate(torch.tensor([3.0, 0, -4]).view(1, 3, 1, 1))
    assert vector.flatten().tolist() == pytest.approx([0.6, 0, -0.8])


@EVERY
def test_activate_has_the_shape_of_the_target(task):
    logits, target, _ = sample(task)
    assert task.activate(logits).shape == target.shape


# Means --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["depth", "disparity", "texture", "autoencoder", "albedo", "flow", "wind"])
def test_mean_target_is_the_mean_of_the_valid_pixels_per_channel(kind):
    task = TASKS[kind]
    _, target, valid = sample(task)
    expected = [
        sum(target[i, c, y, x].item() for i, y, x in valid.nonzero().tolist()) / valid.sum().item()
        for c in range(task.channels)
    ]
    assert task.mean_target(list(target)).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["seg", "normals", "edges", "binary"])
def test_mean_target_is_zero_where_logits_have_other_units(name):
    _, target, _ = sample(TASKS[name])
    assert torch.equal(TASKS[name].mean_target(list(target)), torch.zeros(TASKS[name].channels))


@pytest.mark.parametrize("kind", ["depth", "texture"])
def test_mean_target_of_nothing_valid_is_zero(kind):
    _, target, _ = sample(TASKS[kind])
    assert TASKS[kind].mean_target(list(invalidate(TASKS[kind], target))).tolist() == [0]


# Tasks --------------------------------------------------------------------------------------------------


def test_kinds_have_the_papers_metrics_and_signs():
    better_higher = {kind for kind, behaviour in KINDS.items() if behaviour.higher_is_better}
    assert better_higher == {"segmentation", "edges", "binary"}
    assert {KINDS[kind].metric for kind in ("depth", "disparity", "texture", "keypoints", "autoencoder")} == {"abs_err"}
    assert (KINDS["segmentation"].metric, KINDS["normals"].metric) == ("miou", "mean_angle")


def test_a_regression_has_its_own_channels_unit_range_and_norm():
    wind, height = TASKS["wind"], TASKS["height"]
    assert (wind.channels, wind.unit, wind.metric) == (2, "m/s", "rmse")
    assert (height.channels, height.unit, height.metric) == (1, "m", "abs_err")
    values = torch.tensor([-3.0, 0.5, 7.0]).view(1, 1, 1, 3)
    assert height.activate(values).flatten().tolist() == [-1, 0.5, 2]
    assert torch.equal(Task("any", "regression").activate(values), values)
    assert wind.to_dict() == {"name": "wind", "kind": "regression", "channels": 2, "unit": "m/s", "norm": "l2"}
    assert Task("depth").to_dict() == {"name": "depth", "kind": "depth"}


@EVERY
def test_distances_from_a_teacher_are_zero_where_they_agree_and_symmetric_means_of_errors(task):
    logits, teacher = (torch.randn(2, task.channels, 3, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert task.distance(teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    expected = {
        "flow": (logits - teacher).norm(dim=1).mean(),
        "wind": (logits - teacher).square().mean(),
        "height": (logits - teacher).abs().mean(),
        "albedo": (logits - teacher).abs().mean(),
    }
    if task.name in expected:
        assert task.distance(logits, teacher).item() == pytest.approx(expected[task.name].item(), rel=1e-6)
    else:
        assert task.distance(logits, teacher).item() > 0


def test_a_task_takes_its_kind_from_its_name_and_channels_from_its_classes():
    assert Task("normals").kind == "normals" and Task("normals").channels == 3
    assert (SEG.channels, SEG.metric, SEG.higher_is_better, SEG.unit) == (3, "miou", True, "%")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "my task", "kind": "depth"}, "letters, digits and underscores"),
        ({"name": "", "kind": "depth"}, "letters, digits and underscores"),
        ({"name": "../up", "kind": "depth"}, "letters, digits and underscores"),
        ({"name": "allow_pickle", "kind": "depth"}, "no task can be called 'allow_pickle', which has another meaning"),
        ({"name": "image", "kind": "depth"}, "no task can be called 'image', which is a column of every table: rename"),
        ({"name": "split", "kind": "depth"}, "no task can be called 'split'"),
        ({"name": "dpth"}, r"unknown kind 'dpth'; choose one of segmentation, depth"),
        ({"name": "segmentation"}, "at least two classes"),
        ({"name": "seg", "kind": "segmentation", "classes": ("one",)}, "at least two classes"),
        (
            {"name": "seg", "kind": "segmentation", "classes": ("a", "b"), "colours": ((0, 0, 0),)},
            "2 classes but 1 colours",
        ),
        ({"name": "depth", "unit": "km"}, "unit is a setting of the kind regression, not of depth"),
        ({"name": "depth", "channels": 2}, "channels is a setting of the kind regression"),
        ({"name": "depth", "norm": "l2"}, "norm is a setting of the kind regression"),
        ({"name": "h", "kind": "regression", "range": (2, 1)}, r"range \(2, 1\); give \[lowest, highest\]"),
        ({"name": "h", "kind": "regression", "range": 3}, r"range 3; give \[lowest, highest\]"),
        ({"name": "h", "kind": "regression", "range": (0, math.inf)}, "range .*lowest, highest"),
        ({"name": "h", "kind": "regression", "channels": -1}, "channels -1; give a whole number"),
        ({"name": "h", "kind": "regression", "channels": 1.5}, r"channels 1\.5; give a whole number"),
        ({"name": "h", "kind": "regression", "norm": "L3"}, "norm 'L3'; use l1 or l2"),
    ],
)
def test_task_refuses_with_the_remedy(arguments, message):
    with pytest.raises(InputError, match=message):
        Task(**arguments)


@EVERY
def test_a_task_survives_json(task):
    again = Task.from_dict(json.loads(json.dumps(task.to_dict())))
    assert again == task and hash(again) == hash(task)


def test_select_keeps_the_order_asked():
    assert list(select_tasks(TASKS, "normals,seg")) == ["normals", "seg"]
    assert list(select_tasks(TASKS, ["depth"])) == ["depth"]
    assert select_tasks(TASKS, "all") == TASKS and list(select_tasks(TASKS, "all")) == list(TASKS)


def test_select_names_the_nearest_task():
    with pytest.raises(InputError, match=r"unknown task 'normal'; did you mean 'normals'"):
        select_tasks(TASKS, "depth,normal")


def test_select_lists_all_tasks_where_none_is_near():
    with pytest.raises(InputError) as caught:
        select_tasks({"depth": TASKS["depth"], "seg": SEG}, "zzz")
    assert "did you mean" not in str(caught.value) and "depth, seg" in str(caught.value)


def test_select_refuses_a_task_given_twice():
    with pytest.raises(InputError, match="'depth' is given twice"):
        select_tasks(TASKS, "depth,seg,depth")


# Colours ------------------------------------------------------------------------------------------------


def test_segmentation_takes_the_tasks_colours_and_black_for_invalid():
    picture = colourise(SEG, np.array([[0, 1], [2, -1]]))
    assert picture.dtype == np.uint8
    assert picture.tolist() == [[[255, 0, 0], [0, 255, 0]], [[1, 2, 3], [0, 0, 0]]]


def test_classes_without_colours_get_different_ones_and_none_is_black():
    colours = class_colours(20)
    assert len({tuple(c) for c in colours.tolist()} | {(0, 0, 0)}) == 21
    plain = Task("seg", "segmentation", classes=("a", "b"))
    assert colourise(plain, np.array([[0, 1]])).tolist() == [colours[:2].tolist()]


def test_normals_map_minus_one_to_one_onto_the_colour_range():
    values = np.array([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]).reshape(3, 1, 4)
    assert colourise(TASKS["normals"], values).tolist() == [
        [[255, 127, 127], [0, 127, 127], [127, 255, 127], [0, 0, 0]]
    ]


def test_rgb_maps_are_scaled_and_clipped_and_nan_is_black():
    values = np.array([[0.0, 2.0], [0.5, -1.0], [1.0, np.nan]]).reshape(3, 1, 2)
    assert colourise(TASKS["autoencoder"], values).tolist() == [[[0, 127, 255], [255, 0, 0]]]


@pytest.mark.parametrize("shape", [(1, 3), (1, 1, 3)])
def test_gray_maps_run_from_low_to_high(shape):
    picture = colourise(TASKS["texture"], np.array([0.2, 0.4, 0.3]).reshape(shape))
    assert picture.shape == (1, 3, 3)
    assert picture[0, :2].tolist() == [[0] * 3, [255] * 3]
    assert np.abs(picture[0, 2].astype(int) - 127.5).max() < 2


def test_flow_is_coloured_by_direction_and_length():
    right, down, left, none = (2.0, 0.0), (0.0, 2.0), (-1.0, 0.0), (0.0, 0.0)
    values = np.array([right, down, left, none, (np.nan, 0.0)], np.float32).T[:, None]
    picture = colourise(TASKS["flow"], values)[0].tolist()
    assert picture[0] == [255, 0, 0] and picture[3:] == [[255, 255, 255], [0, 0, 0]]
    assert picture[1] == [127, 255, 0]  # a quarter of the circle from red
    assert picture[2] == [127, 255, 255]  # the opposite hue, half as long
    assert colourise(TASKS["flow"], values, limits=(0, 4))[0, 0].tolist() == [255, 127, 127]


def test_a_regression_is_coloured_over_its_range():
    height = colourise(TASKS["height"], np.array([[-1.0, 2.0, -9.0, np.nan]], np.float32))[0].tolist()
    own = colourise(Task("h", "regression"), np.array([[-1.0, 2.0]], np.float32))[0].tolist()
    assert height[:2] == own and height[2] == height[0] and height[3] == [0, 0, 0]
    colours = Task("c", "regression", channels=3, range=(-1, 1))
    assert colourise(colours, np.array([-1.0, 0.0, 1.0]).reshape(3, 1, 1)).tolist() == [[[0, 127, 255]]]


def test_limits_fix_the_colour_range_and_clip():
    narrow = colourise(TASKS["edges"], np.array([[0.0, 0.5, 1.0]]), limits=(0.5, 1.0))
    assert narrow.tolist() == [[[0] * 3, [0] * 3, [255] * 3]]
    alone = colourise(TASKS["depth"], np.array([[2.0]]), limits=(1.0, 3.0))
    among = colourise(TASKS["depth"], np.array([[1.0, 2.0, 3.0]]))
    assert alone[0, 0].tolist() == among[0, 1].tolist()


@pytest.mark.parametrize(("kind", "mark"), [("depth", 0.0), ("disparity", 0.0), ("edges", -1.0), ("texture", np.nan)])
def test_invalid_pixels_are_black_and_outside_the_range(kind, mark):
    values = np.array([[0.5, 1.0, 0.75]], np.float32)
    with_invalid = colourise(TASKS[kind], np.append(values, [[mark]], axis=1).astype(np.float32))
    assert with_invalid[0, 3].tolist() == [0, 0, 0]
    assert with_invalid[:, :3].tolist() == colourise(TASKS[kind], values).tolist()


@pytest.mark.parametrize(("kind", "mark"), [("depth", 0.0), ("edges", -1.0), ("keypoints", np.nan)])
def test_a_map_with_nothing_valid_is_black(kind, mark):
    assert not colourise(TASKS[kind], np.full((2, 3), mark)).any()


@EVERY
def test_every_kind_can_be_coloured(task):
    logits, target, _ = sample(task)
    for values in (task.activate(logits)[0], target[0]):
        picture = colourise(task, values.numpy())
        assert picture.shape == (4, 5, 3) and picture.dtype == np.uint8 and picture.any()


@EVERY
@pytest.mark.parametrize("limits", [None, (0.25, 2.0)])
def test_bands_have_the_colours_of_the_whole(task, limits, monkeypatch):
    logits, _, _ = sample(task)
    values = task.activate(logits).numpy()[0]
    whole = colourise(task, values, limits)
    monkeypatch.setattr(colours, "_BAND", 7)  # a row of the 4 x 5 pixels
    assert whole.shape == (4, 5, 3) and np.array_equal(colourise(task, values, limits), whole)


def test_colours_of_a_large_map_take_little_memory():
    values = np.linspace(1, 2, 4_000_000, dtype=np.float32).reshape(2000, 2000)
    colourise(TASKS["depth"], values[:2])  # loads matplotlib
    tracemalloc.start()
    try:
        assert colourise(TASKS["depth"], values).nbytes == 12_000_000
        assert tracemalloc.get_traced_memory()[1] < 80_000_000  # 20 bytes per pixel; at once they would be 80
    finally:
        tracemalloc.stop()
