"""Two processes under torchrun give the results of one: training, caches, folds, metrics, recipes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simomerge.core import distributed
from simomerge.core.distributed import share
from simomerge.core.errors import InputError
from simomerge.recipes.search import search_recipe
from simomerge.training.sharding import sharded

SCRIPT = Path(__file__).parent / "together.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(command: list[str], processes: int) -> str:
    launcher = TORCHRUN if processes > 1 else [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="session")
def together(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[int, Path]]:
    """``together(jobs...)``: number of processes -> the folder of their results."""

    def run(*jobs: str) -> dict[int, Path]:
        folders = {}
        for processes in (1, 2):
            folders[processes] = tmp_path_factory.mktemp(f"by{processes}")
            printed = start([str(SCRIPT), str(folders[processes]), str(tiny_base), *jobs], processes)
            assert f'"processes": {processes}' in printed
        return folders

    return run


@pytest.fixture(scope="session")
def left(together: Callable[..., dict[int, Path]]) -> dict[int, Path]:
    return together("train", "realigned", "distilled", "judge", "probe_and_tune")


def found(folders: dict[int, Path], name: str) -> tuple[Any, Any]:
    """Results of one process, and of two processes, which must be bit-identical to each other."""
    alone = torch.load(folders[1] / f"{name}-0.pt", weights_only=False)
    first, second = (torch.load(folders[2] / f"{name}-{rank}.pt", weights_only=False) for rank in (0, 1))
    for one, two in zip(leaves(first), leaves(second), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(two)), name
    return alone, first


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() if key != "seconds" for leaf in leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def close(alone: Any, shared: Any, tolerance: float) -> None:
    mine, theirs = leaves(alone), leaves(shared)
    assert len(mine) == len(theirs)
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(
            torch.as_tensor(two).double(), torch.as_tensor(one).double(), rtol=tolerance, atol=tolerance, equal_nan=True
        )


@pytest.mark.parametrize("weighting", ["uncertainty", "nash"])
def test_training_on_shares_of_a_batch_equals_training_on_the_batch(left: dict[int, Path], weighting: str) -> None:
    alone, shared = found(left, f"train-{weighting}")
    close(alone["log"]["validation"], shared["log"]["validation"], 1e-6)
    assert alone["log"]["best_step"] == shared["log"]["best_step"] and shared["log"]["samples"] == 35
    same_weights(alone["model"], shared["model"])


def same_weights(alone: dict[str, Any], shared: dict[str, Any]) -> None:
    """Equal after five steps of 1e-3, up to rounding, which depends on the processor.

    AdamW makes full steps even if a gradient is rounding only, so that a few entries may differ by a step.
    """
    for name, value in alone.items():
        difference = (shared[name].double() - value.double()).abs()
        assert int((difference > 1e-4).sum()) <= max(2, 0.1 * difference.numel()), name
        if not name.endswith("k_proj.bias"):  # has no effect in attention: its gradient is rounding only
            assert float(difference.median()) < 1e-4, name
    every = torch.cat([(shared[name].double() - value.double()).abs().flatten() for name, value in alone.items()])
    assert float(every.median()) < 1e-5 and float((every > 1e-4).double().mean()) < 0.01


def test_features_are_byte_identical(left: dict[int, Path]) -> None:
    files = sorted(path.name for path in (left[1] / "features").iterdir())
    assert files == sorted(path.name for path in (left[2] / "features").iterdir()) and "map3.npy" in files
    for name in files:
        assert (left[1] / "features" / name).read_bytes() == (left[2] / "features" / name).read_bytes(), name
    assert len(np.load(left[2] / "features" / "map0.npy")) == 11


def test_realignments_are_those_of_one_process(left: dict[int, Path]) -> None:
    alone, shared = found(left, "realigned")
    close(alone, shared, 3e-6)  # sums of shares are rounded differently; how much depends on the processor


@pytest.mark.parametrize("predictions", ["stored", "live"])
def test_distillation_is_that_of_one_process(left: dict[int, Path], predictions: str) -> None:
    alone, shared = found(left, f"distilled-{predictions}")
    assert alone["record"]["best_step"] == shared["record"]["best_step"]
    close(alone["record"]["distance_ratio"], shared["record"]["distance_ratio"], 1e-4)
    same_weights(alone["model"], shared["model"])


def test_all_processes_make_as_many_steps_as_the_first_has_time_for(left: dict[int, Path]) -> None:
    _, shared = found(left, "within")  # the weights of both processes are equal to the last bit
    assert set(shared) == {"model", "steps"}


def test_metrics_equal_those_of_one_process(left: dict[int, Path]) -> None:
    alone, shared = found(left, "judge")
    assert set(shared["scores"]) == {
        *("segmentation", "depth", "normals", "edges", "texture", "keypoints", "autoencoder"),
    }
    close(alone, shared, 1e-6)


def test_all_processes_use_one_temporary_folder(left: dict[int, Path]) -> None:
    alone, shared = found(left, "lpft")
    same_weights(alone, shared)


@pytest.mark.slow
def test_a_recipe_in_two_processes_has_the_metrics_of_one(together: Callable[..., dict[int, Path]]) -> None:
    alone, shared = found(together("recipe"), "recipe")
    for row, metrics in alone.items():  # each row is a chain of trainings, in which rounding grows
        for task, metric in (("depth", "abs_err"), ("normals", "mean_angle")):
            close(metrics[task][0][metric], shared[row][task][0][metric], 1e-5 if row == "experts" else 1e-3)


@pytest.fixture(scope="session")
def divided(together: Callable[..., dict[int, Path]]) -> dict[int, Path]:
    return together("shard", "shard_realigned", "weightings")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "offload"])
def test_a_divided_model_trains_like_a_whole_one(divided: dict[int, Path], name: str) -> None:
    alone, shared = found(divided, f"shard-{name}")
    close(alone["log"]["validation"], shared["log"]["validation"], 1e-6)
    assert alone["log"]["best_step"] == shared["log"]["best_step"]
    same_weights(alone["model"], shared["model"])


@pytest.mark.slow
def test_a_training_resumes_on_another_number_of_processes(divided: dict[int, Path], tiny_base: Path) -> None:
    states = {processes: folder / "killed.safetensors" for processes, folder in divided.items()}
    content = {processes: file.read_bytes() for processes, file in states.items()}
    assert content[1] != content[2]
    straight = torch.load(divided[1] / "shard-plain-0.pt", weights_only=False)
    for processes, other in ((1, 2), (2, 1)):
        states[processes].write_bytes(content[other])
        start([str(SCRIPT), str(divided[processes]), str(tiny_base), "resume"], processes)
        resumed = torch.load(divided[processes] / "resumed-0.pt", weights_only=False)
        assert resumed["log"]["steps"] == 5 and resumed["log"]["samples"] == 35
        close(straight["log"]["validation"], resumed["log"]["validation"], 1e-6)
        same_weights(straight["model"], resumed["model"])


@pytest.mark.slow
def test_realignments_of_a_divided_model_are_those_of_a_whole_one(divided: dict[int, Path]) -> None:
    alone, shared = found(divided, "shard-realigned")
    close(alone["scores"], shared["scores"], 1e-4)  # after a training
    close(alone["start"], shared["start"], 1e-6)
    close(alone["fold"], shared["fold"], 3e-6)
    for name in ("adapters", "lora", "stored", "live"):
        same_weights(alone[name], shared[name])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adapters", "lora"])
def test_training_inside_the_encoder_is_that_of_one_process(divided: dict[int, Path], method: str) -> None:
    alone, shared = found(divided, "shard-realigned")
    same_weights(alone[f"whole {method}"], shared[f"whole {method}"])


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["pcgrad", "cagrad", "gradnorm"])
def test_gradient_weightings_are_those_of_one_process(divided: dict[int, Path], weighting: str) -> None:
    alone, shared = found(divided, f"train-{weighting}")
    close(alone["log"]["validation"], shared["log"]["validation"], 1e-6)
    same_weights(alone["model"], shared["model"])


def test_one_process_cannot_divide_a_model() -> None:
    with pytest.raises(InputError, match=r"--shard divides .* only one\. Start .*`torchrun --nproc-per"), sharded():
        pass
    with pytest.raises(InputError, match=r"--offload .*: give --shard too"), sharded(False, offload=True):
        pass


@pytest.mark.slow
def test_commands_write_and_print_once(tiny_base: Path, tmp_path: Path) -> None:
    model, again = tmp_path / "model", tmp_path / "again"
    train = ["-m", "simomerge", "train", "--task", "depth", "--base", str(tiny_base), "--count", "16"]
    train += [
        "--val-count",
        "8",
        "--steps",
        "2",
        "--probe-steps",
        "2",
        "--batch-size",
        "4",
        "--shard",
        "-o",
        str(model),
    ]
    assert start(train, 2).count("Model: ") == 1
    assert start(["-m", "simomerge", "evaluate", str(model), "--count", "5"], 2).count("abs_err") == 1
    heads = ["-m", "simomerge", "realign", str(model), "--method", "heads", "--steps", "2", "--count", "8"]
    assert start([*heads, "-o", str(again)], 2).count("Model: ") == 1
    assert (model / "simo.json").is_file() and (again / "simo.json").is_file()


def test_a_folder_that_a_process_does_not_see_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_LOOKS", 1)
    distributed.check_seen(tmp_path)
    with pytest.raises(InputError, match=r"1 of 1 processes do not see the folder .*absent.*disk that all machines"):
        distributed.check_seen(tmp_path / "absent")


def test_other_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed._check_versions()
    monkeypatch.setattr(distributed, "from_first", lambda value: {**value, "torch": "0.1"})
    with pytest.raises(InputError, match=r"process 0 on .* has torch .* instead of 0.1; install the same versions"):
        distributed._check_versions()


def test_the_share_of_a_single_process_is_the_list() -> None:
    assert share([1, 2, 3]) == [1, 2, 3]


def test_a_search_refuses_torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="on each machine with the same --storage, not by torchrun"):
        search_recipe("any.yaml", tmp_path)
