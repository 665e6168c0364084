"""Running statistics of batch norms: averaged over the experts, never extrapolated, never part of a distance."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from simomerge.checkpoints import open_checkpoint, write_safetensors
from simomerge.core.errors import InputError
from simomerge.merging import (
    TaskArithmetic,
    TaskVectorStream,
    available,
    get_method,
    interpolate,
    merge_state_dicts,
    negate,
    sampled_distances,
    with_experts,
)
from simomerge.merging.disk.compress import compress, restore
from simomerge.merging.disk.diff import diff_on_disk
from simomerge.relations.geometry import geometry

MEAN, VARIANCE, COUNT = "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"
BASE = {
    "conv.weight": np.arange(12, dtype=np.float32).reshape(3, 4) / 8 - 0.5,
    MEAN: np.array([1, -1, 0], np.float32),
    VARIANCE: np.array([4, 1000, 1], np.float32),
    COUNT: np.array(7),
}
TASKS = {"depth": (0.25, 2), "normals": (1e-6, 4), "seg": (0.5, 6)}
EXPERTS: dict[str, dict[str, np.ndarray]] = {
    task: {
        "conv.weight": BASE["conv.weight"] + np.float32(0.1 * index) * np.sin(np.arange(12, dtype=np.float32) * index)
        .reshape(3, 4).astype(np.float32),
        MEAN: np.full(3, mean, np.float32),
        VARIANCE: np.full(3, variance, np.float32),
        COUNT: np.array(500),
    }
    for index, (task, (variance, mean)) in enumerate(TASKS.items(), start=1)
}  # fmt: skip


def some(*tasks: str) -> dict[str, dict[str, np.ndarray]]:
    return {task: EXPERTS[task] for task in tasks}


def average(*tasks: str) -> dict[str, np.ndarray]:
    return {
        name: np.mean([EXPERTS[task][name].astype(np.float64) for task in tasks], axis=0).astype(np.float32)
        for name in (MEAN, VARIANCE)
    }


@pytest.mark.parametrize("name", [name for name, method in available().items() if not method.needs_data])
@pytest.mark.parametrize("schedule", [None, (0.5,), (3.0,)])
def test_every_method_averages_them(name: str, schedule: Any) -> None:
    more = {"scale": 3.0} if "scale" in get_method(name).__dataclass_fields__ else {}
    given = some("depth", "normals") if name == "slerp" else EXPERTS
    merged = merge_state_dicts(BASE, given, name, schedule, **more)
    expected = {key: BASE[key] for key in (MEAN, VARIANCE)} if name == "zero-shot" else average(*given)
    for key, values in expected.items():
        np.testing.assert_array_equal(merged[key], values)
    assert merged[COUNT] == 7


def test_weights_of_experts_are_their_shares() -> None:
    a, b = EXPERTS["depth"], EXPERTS["seg"]
    pair = some("depth", "seg")
    cases: list[tuple[dict[str, Any], str, dict[str, Any], float]] = [
        (BASE, "weighted-average", {"weight": {"depth": 3.0, "seg": 1.0}}, 0.25),
        (BASE, "task-arithmetic", {"scale": {"depth": 3.0, "seg": 1.0}}, 0.25),
        (BASE, "slerp", {"t": 0.25}, 0.25),
        (BASE, "emr", {"task": "depth"}, 0.0),
        (BASE, "tall-mask", {"task": "seg"}, 1.0),
    ]
    for base, method, parameters, share in cases:
        merged = merge_state_dicts(base, pair, method, **parameters)
        for name in (MEAN, VARIANCE):
            expected = ((1 - share) * a[name].astype(np.float64) + share * b[name]).astype(np.float32)
            np.testing.assert_array_equal(merged[name], expected)
    nothing = merge_state_dicts(BASE, pair, "task-arithmetic", scale=0.0)
    np.testing.assert_array_equal(nothing[VARIANCE], BASE[VARIANCE])


def test_algebra_does_not_extrapolate_them() -> None:
    a, b = EXPERTS["depth"], EXPERTS["seg"]
    for name in (MEAN, VARIANCE):
        np.testing.assert_array_equal(negate(BASE, a)[name], BASE[name])
        np.testing.assert_array_equal(interpolate(a, b, 3.0)[name], b[name])
        np.testing.assert_array_equal(interpolate(a, b, -3.0)[name], a[name])
        np.testing.assert_array_equal(interpolate(a, b, 0.5)[name], (a[name] + b[name]) / 2)


@pytest.mark.parametrize("method", ["average", "task-arithmetic"])
def test_an_expert_added_or_removed_later(method: str) -> None:
    two, three = (merge_state_dicts(BASE, some(*tasks), method) for tasks in (("depth", "seg"), EXPERTS))
    added = dict(with_experts(two, BASE, method, ["depth", "seg"], add=some("normals")))
    removed = dict(with_experts(three, BASE, method, list(EXPERTS), remove=some("normals")))
    for found, expected in ((added, three), (removed, two)):
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-4)
        assert (found[VARIANCE] >= 0).all()


def test_no_distance_counts_them(tmp_path: Path) -> None:
    wild = {**EXPERTS["depth"], MEAN: np.full(3, 1e6, np.float32), VARIANCE: np.full(3, 1e9, np.float32)}
    files = {
        name: write_safetensors(tmp_path / f"{name}.safetensors", tensors)
        for name, tensors in (("base", BASE), ("usual", EXPERTS["depth"]), ("wild", wild))
    }
    change = np.linalg.norm(EXPERTS["depth"]["conv.weight"] - BASE["conv.weight"])
    differences = diff_on_disk(files["base"], files["wild"])
    assert [one.name for one in differences] == ["all", "conv.weight"]
    assert math.isclose(differences[0].distance, change, rel_tol=1e-6)
    assert diff_on_disk(files["usual"], files["wild"], files["base"])[0].distance == 0
    assert math.isclose(geometry(BASE, {"depth": wild}).all.norms[0], change, rel_tol=1e-6)
    relative = change / np.linalg.norm(BASE["conv.weight"])
    assert math.isclose(sampled_distances(TaskVectorStream(BASE, {"depth": wild}))["depth"], relative, rel_tol=1e-5)


def test_a_compressed_folder_restores_them_exactly(tmp_path: Path) -> None:
    files = {
        name: write_safetensors(tmp_path / f"{name}.safetensors", tensors)
        for name, tensors in {"base": BASE, **EXPERTS}.items()
    }
    base = files.pop("base")
    compress(base, files, tmp_path / "compressed")
    for task in TASKS:
        restore(tmp_path / "compressed", task, tmp_path / f"{task}-again.safetensors")
        restored = open_checkpoint(tmp_path / f"{task}-again.safetensors")
        for name in (MEAN, VARIANCE):
            np.testing.assert_array_equal(restored[name], EXPERTS[task][name])
        assert list(restored) == list(open_checkpoint(base))


def test_values_that_are_not_finite_are_found() -> None:
    broken = {**EXPERTS["depth"], VARIANCE: np.array([1, np.nan, 1], np.float32)}
    with pytest.raises(InputError, match=r"'bn\.running_var' of the expert 'depth' holds NaN"):
        merge_state_dicts(BASE, {"depth": broken, "seg": EXPERTS["seg"]}, "average")
    with pytest.raises(InputError, match=r"'bn\.running_var' of the base holds NaN"):
        merge_state_dicts({**BASE, VARIANCE: broken[VARIANCE]}, some("depth"), "task-arithmetic")


def test_a_merged_network_predicts_numbers() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    experts = {}
    for task in TASKS:
        expert = copy.deepcopy(base)
        for name, buffer in expert.named_buffers():
            if name.endswith("running_var"):
                buffer.mul_(0.3 + 0.2 * torch.rand_like(buffer))
        experts[task] = expert.state_dict()
    merged = copy.deepcopy(base)
    merged.load_state_dict(merge_state_dicts(base.state_dict(), experts, TaskArithmetic(scale=1.0)))
    lowest = min(float(expert["1.running_var"].min()) for expert in experts.values())
    assert float(merged.state_dict()["1.running_var"].min()) >= lowest
    assert torch.isfinite(merged(torch.rand(1, 3, 8, 8))).all()
