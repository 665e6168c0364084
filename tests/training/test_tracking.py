"""Trackers: what they receive, and that nothing is tracked by default."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import tracking as accelerates
from accelerate.utils import LoggerType

from simomerge.cli import cli
from simomerge.core.errors import DivergedError, InputError
from simomerge.datasets import DenseDataset
from simomerge.models.model import SimoModel
from simomerge.training import tracking
from simomerge.training.lpft import finetune
from simomerge.training.pool import WorkerPool
from simomerge.training.settings import TrainSettings
from simomerge.training.tracking import track

from . import jobs

SETTINGS = TrainSettings(steps=20, batch_size=4, lr=1e-2, encoder_lr=1e-3, validate_every=10)


class Recorder(accelerates.GeneralTracker):
    """Replaces TensorBoard in accelerate's table of trackers."""

    name = "tensorboard"
    requires_logging_directory = True
    runs: list[Recorder]

    def __init__(self, run_name: str, logging_dir: str, **kwargs: Any) -> None:
        super().__init__()
        self.run_name, self.folder, self.records, self.config, self.ended = run_name, Path(logging_dir), [], {}, False
        self.runs.append(self)

    @property
    def tracker(self) -> Any:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.records.append((step, values))

    def finish(self) -> None:
        self.ended = True


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The runs that a tracker received; the tracker counts as installed."""
    Recorder.runs = []
    monkeypatch.setitem(accelerates.LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
    monkeypatch.setattr(accelerates, "get_available_trackers", lambda: [LoggerType("tensorboard")])
    monkeypatch.setattr(tracking, "find_spec", lambda name: name == "tensorboard" or None)
    return Recorder.runs


def trained(make_model: Callable[..., SimoModel], rooms: DenseDataset, label: str = "expert depth seed 0") -> SimoModel:
    data = rooms.select(["depth"])
    model = make_model(data.tasks).requires_grad_(True)
    finetune(model, data, SETTINGS, data.take(4), label=label)
    return model


def test_a_tracker_receives_losses_and_rates_and_changes_nothing(
    runs: list[Recorder], make_model: Callable[..., SimoModel], rooms: DenseDataset, tmp_path: Path
) -> None:
    with track(["tensorboard"], tmp_path / "logs"):
        tracked = trained(make_model, rooms)
    plain = trained(make_model, rooms)
    (run,) = runs  # none for the second
    assert run.ended and run.folder == tmp_path / "logs" / "expert-depth-seed-0"
    assert run.config["lr"] == 1e-2 and None not in run.config.values()
    assert [step for step, _ in run.records] == [10, 10, 20, 20]
    first, validation = run.records[0][1], run.records[1][1]
    assert set(first) == {"loss", "loss/depth", "lr/encoder", "lr/heads", "images_per_second"}
    assert first["lr/heads"] == pytest.approx(10 * first["lr/encoder"]) and first["loss"] == first["loss/depth"]
    assert set(validation) == {"validation/loss"} and validation["validation/loss"] > 0
    weights = plain.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in tracked.state_dict().items())


def test_a_run_ends_when_its_training_fails(
    runs: list[Recorder],
    make_model: Callable[..., SimoModel],
    rooms: DenseDataset,
    tmp_path: Path,
) -> None:
    data = rooms.select(["depth"])

    def broken(model: SimoModel, batch: Any) -> dict[str, torch.Tensor]:
        return {"depth": model(batch["image"])["depth"].mean() * float("nan")}

    with pytest.raises(DivergedError, match="lower the learning rate"), track(["tensorboard"], tmp_path):
        finetune(make_model(data.tasks).requires_grad_(True), data, SETTINGS, losses=broken)
    assert [run.ended for run in runs] == [True] and tracking.current() is None


def test_worker_processes_use_the_trackers_of_their_parent(runs: list[Recorder], tmp_path: Path) -> None:
    with track(["tensorboard"], tmp_path), WorkerPool(2) as pool:
        assert pool.run([(jobs.reports_to, {})] * 2) == [tracking.Tracking(("tensorboard",), tmp_path)] * 2
    with WorkerPool(2) as pool:
        assert pool.run([(jobs.reports_to, {})]) == [None]


def test_unknown_and_missing_trackers_are_refused_before_any_work(runs: list[Recorder], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="wandb is not installed: pip install wandb"), track(["wandb"], tmp_path):
        raise AssertionError
    with (
        pytest.raises(InputError, match="unknown tracker 'mlflow'; choose among: tensorboard"),
        track(["mlflow"], tmp_path),
    ):
        raise AssertionError
    with pytest.raises(InputError, match="--track does nothing under --method fold"):
        command = ["realign", "model", "a=b", "--images", "photos", "--track", "tensorboard", "-o", str(tmp_path / "o")]
        cli.main(command, standalone_mode=False)


def test_nothing_is_tracked_by_default(
    runs: list[Recorder], make_model: Callable[..., SimoModel], rooms: DenseDataset, tmp_path: Path
) -> None:
    with track([], tmp_path / "logs"):
        trained(make_model, rooms)
    assert runs == [] and not (tmp_path / "logs").exists()
