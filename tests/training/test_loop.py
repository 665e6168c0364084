"""The training loop: optimisation, early stopping, the saved state, and resuming."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from simomerge.checkpoints import open_checkpoint
from simomerge.core.errors import DivergedError, InputError
from simomerge.core.machine import PRECISION
from simomerge.core.progress import show_progress
from simomerge.datasets.batches import training_batches
from simomerge.training.loop import Losses, Objective, _Losses, _seeded, fit, validation_loss
from simomerge.training.optimizer import make_optimizer
from simomerge.training.settings import TrainSettings
from simomerge.training.state import TrainingState, TrainLog


class Points:
    """A small regression problem; ``role`` distinguishes training from validation samples."""

    def __init__(self, count: int = 24, role: int = 0) -> None:
        generator = torch.Generator().manual_seed(role)
        self.x = torch.randn(count, 3, generator=generator)
        self.y = torch.sin(self.x.sum(1, keepdim=True)) + 5
        self.role = role

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index], "role": torch.tensor(self.role)}


class Scalar(nn.Module):
    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([value]))


class WithEncoder(nn.Module):
    """A module with the names of a SimoModel, so that the encoder can have its own learning rate."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.ModuleDict({"backbone": nn.Linear(3, 8)})
        self.head = nn.Sequential(nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder["backbone"](x))


def regression(module: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    error = module(batch["x"]) - batch["y"]
    return {"square": error.square().mean(), "absolute": error.abs().mean()}


def jitter(sample: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
    return {**sample, "x": sample["x"] + 0.1 * torch.from_numpy(generator.standard_normal(3)).float()}


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


# Optimisation -------------------------------------------------------------------------------------------


def test_training_finds_the_minimum_of_a_quadratic() -> None:
    module, target = Scalar(), 3.0
    losses = lambda module, batch: {"q": (module.w - target).square().sum()}  # noqa: E731
    log = fit(module, losses, Points(), TrainSettings(150, 4, lr=0.2))
    assert abs(float(module.w.detach()) - target) < 0.02
    assert (log.steps, log.samples, log.validation, log.best_step) == (150, 600, [], 0)
    assert log.losses["q"] < 1e-3 and log.seconds > 0
    assert not module.training


def test_training_equals_adamw_with_one_cycle_and_clipping() -> None:
    """Compare with a loop in plain torch: parameter groups, warm-up, clipping, mean of the task losses."""
    steps, clip = 30, 0.5
    settings = TrainSettings(steps, 8, lr=2e-2, encoder_lr=5e-3, weight_decay=0.1, warmup=0.3, clip=clip, seed=4)
    trained, reference = WithEncoder(), WithEncoder()
    fit(trained, regression, Points(), settings, transform=jitter)

    backbone, last, norm = reference.encoder["backbone"], reference.head[2], reference.head[1]
    groups = [
        {"params": [backbone.weight], "lr": 5e-3, "weight_decay": 0.1},
        {"params": [backbone.bias], "lr": 5e-3, "weight_decay": 0.0},
        {"params": [norm.weight, norm.bias, last.bias], "lr": 2e-2, "weight_decay": 0.0},
        {"params": [last.weight], "lr": 2e-2, "weight_decay": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups)
    peaks = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps + 1, pct_start=0.3)
    rates, norms = [], []
    reference.train()
    for batch in training_batches(Points(), 8, steps, seed=4, transform=jitter):
        parts = regression(reference, batch)
        ((parts["square"] + parts["absolute"]) / 2).backward()
        norms.append(float(nn.utils.clip_grad_norm_(reference.parameters(), clip)))
        rates.append(optimizer.param_groups[3]["lr"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert min(norms) < clip < max(norms) or min(norms) > clip  # clipping has an effect
    assert rates[0] < 2e-2 / 20 and np.argmax(rates) in (8, 9) and rates[-1] < 1e-3  # and so has the warm-up
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value, atol=2e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("change", [{"clip": 0.05}, {"warmup": 0.5}, {"weight_decay": 0.5}, {"seed": 1}, {"lr": 1e-2}])
def test_every_setting_has_an_effect(change: dict[str, Any]) -> None:
    finals = []
    for changed in ({}, change):
        module = WithEncoder()
        settings = {"steps": 6, "batch_size": 8, "lr": 2e-2, **changed}
        fit(module, regression, Points(), TrainSettings(**settings))
        finals.append(module.head[2].weight.detach())
    assert not torch.allclose(*finals, atol=1e-6)


def test_frozen_parameters_are_not_touched() -> None:
    module = WithEncoder()
    module.encoder.requires_grad_(False)
    before = weights(module)
    fit(module, regression, Points(), TrainSettings(5, 8, lr=0.1))
    after = module.state_dict()
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("encoder"), name


def test_nothing_to_train_is_an_error() -> None:
    module = WithEncoder().requires_grad_(False)
    with pytest.raises(InputError, match="nothing to train"):
        fit(module, regression, Points(), TrainSettings(2))


def test_progress_shows_steps_and_losses() -> None:
    module, lines = WithEncoder(), []
    with show_progress(lambda *a: lines.append(a)):
        fit(module, regression, Points(), TrainSettings(25, 8), label="regress")
    assert [line[:3] for line in lines] == [("regress", 10, 25), ("regress", 20, 25), ("regress", 25, 25)]
    assert "square " in lines[0][3] and "img/s" in lines[0][3]


# Validation and early stop ------------------------------------------------------------------------------


def climbing(module: Scalar, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The training loss increases w without end; the validation loss has its minimum at 1."""
    return {"w": (module.w - 1).square().sum() if batch["role"].float().mean() > 0 else -module.w.sum()}


def judged(module: nn.Module, losses: Losses, data: Any, batch_size: int = 32) -> float:
    return validation_loss(_Losses(module, Objective(losses), torch.device("cpu")), data, batch_size)


def test_training_stops_when_validation_is_flat_and_keeps_the_best_weights() -> None:
    module = Scalar()
    settings = TrainSettings(400, 4, lr=0.05, validate_every=5, patience=3)
    lines: list[Any] = []
    with show_progress(lambda *a: lines.append(a)):
        log = fit(module, climbing, Points(), settings, Points(6, role=1))
    losses = dict(log.validation)
    assert list(losses) == list(range(5, log.steps + 1, 5))
    assert log.best_step == min(losses, key=losses.get) and losses[log.best_step] < 0.05
    assert log.steps == log.best_step + 15 < 400
    assert judged(module, climbing, Points(6, role=1)) == pytest.approx(losses[log.best_step], abs=1e-7)
    assert lines[-1][1:3] == (400, 400) and f"stopped at step {log.steps}" in lines[-1][3]


def test_the_last_step_is_validated_and_can_be_the_best() -> None:
    module = Scalar()
    settings = TrainSettings(13, 4, lr=0.01, validate_every=5, patience=3)
    log = fit(module, climbing, Points(), settings, Points(6, role=1))
    assert [step for step, _ in log.validation] == [5, 10, 13] and log.best_step == log.steps == 13


def test_validation_is_the_mean_over_samples_whatever_the_batches() -> None:
    module = WithEncoder().eval()
    data, losses = Points(10), regression
    expected = judged(module, losses, data, batch_size=10)
    assert judged(module, losses, data, batch_size=4) == pytest.approx(expected, rel=1e-5)
    module.train()
    before = weights(module)
    judged(module, losses, data)
    assert module.training
    assert_same(before, module.state_dict())  # validation does not change running statistics


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_task_and_step(value: float) -> None:
    module, calls = WithEncoder(), []

    def losses(module: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        calls.append(1)
        good = module(batch["x"]).square().mean()
        return {"normals": good, "depth": good * (value if len(calls) == 20 else 1.0)}

    with pytest.raises(InputError, match=rf"expert: the loss of 'depth' is {value} at step 20; lower the learning"):
        fit(module, losses, Points(), TrainSettings(40, 8), label="expert")


# Resuming ----------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def killed_at(step: int) -> Callable[..., None]:
    def progress(label: str, done: int, total: int, note: str = "") -> None:
        if done >= step:
            raise Killed

    return progress


@pytest.fixture
def eager_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingState, "save_once_in_a_while", lambda self, log: self.save(log))


SETTINGS = TrainSettings(40, 8, lr=1e-2, warmup=0.2, validate_every=7, patience=4, seed=3)


def train(state_file: Path | None, progress: Callable[..., None] | None = None) -> tuple[dict[str, Tensor], TrainLog]:
    module = WithEncoder()
    module.encoder["backbone"].bias.requires_grad_(False)
    with show_progress(progress):
        log = fit(module, regression, Points(), SETTINGS, Points(9, 1), jitter, state_file)
    return weights(module), log


@pytest.mark.usefixtures("eager_state")
@pytest.mark.parametrize("step", [10, 20, 30, 40])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(step: int, tmp_path: Path) -> None:
    expected, straight = train(None)
    with pytest.raises(Killed):
        train(tmp_path / "deep" / "state.safetensors", killed_at(step))
    got, log = train(tmp_path / "deep" / "state.safetensors")
    assert_same(expected, got)
    assert (log.steps, log.samples, log.best_step) == (straight.steps, straight.samples, straight.best_step)
    assert log.validation == straight.validation and log.seconds > 0


@pytest.mark.usefixtures("eager_state")
def test_a_run_killed_twice_resumes_twice(tmp_path: Path) -> None:
    expected, _ = train(None)
    steps: list[int] = []
    for step in (10, 30):
        with pytest.raises(Killed):
            train(tmp_path / "state.safetensors", killed_at(step))
    got, _ = train(tmp_path / "state.safetensors", lambda label, done, total, note="": steps.append(done))
    assert_same(expected, got)
    assert min(steps) >= 30  # finished steps are not repeated


def train_with_dropout(
    state_file: Path | None = None, progress: Callable[..., None] | None = None, drawn: int = 0, seed: int = 3
) -> dict[str, Tensor]:
    """The weights after a training with dropout, before which other work draws some random numbers."""
    module = WithEncoder()
    module.head.insert(1, nn.Dropout(0.3))
    torch.rand(drawn)
    with show_progress(progress):
        fit(module, regression, Points(), replace(SETTINGS, seed=seed), Points(9, 1), None, state_file)
    return weights(module)


@pytest.mark.usefixtures("eager_state")
def test_dropout_depends_on_the_seed_and_not_on_earlier_work_or_a_kill(tmp_path: Path) -> None:
    expected = train_with_dropout()
    assert_same(expected, train_with_dropout(drawn=5))
    with pytest.raises(Killed):
        train_with_dropout(tmp_path / "state.safetensors", killed_at(20))
    assert_same(expected, train_with_dropout(tmp_path / "state.safetensors", drawn=3))
    assert not torch.equal(expected["head.3.weight"], train_with_dropout(seed=4)["head.3.weight"])


def test_each_step_and_process_draws_its_own_numbers_and_the_callers_go_on_as_before() -> None:
    drawn, before = [], torch.get_rng_state()
    for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)):
        with _seeded(key, torch.device("cpu")):
            drawn.append(torch.rand(1).item())
    assert len(set(drawn[:4])) == 4 and drawn[4] == drawn[0]
    assert torch.equal(torch.get_rng_state(), before)


def broken_at(step: int) -> Losses:
    """Finite losses whose gradients are infinite at one step, so that the weights are NaN after it."""
    calls = []

    def losses(module: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        found = regression(module, batch)
        if module.training:
            calls.append(1)
        if module.training and len(calls) == step:
            found["square"].register_hook(lambda gradient: gradient * float("inf"))
        return found

    return losses


@pytest.mark.usefixtures("eager_state")
@pytest.mark.parametrize("validate_every", [0, 7, 13])
def test_a_diverged_training_keeps_its_last_finite_state_and_goes_on_from_it(
    tmp_path: Path, validate_every: int
) -> None:
    settings, state = replace(SETTINGS, validate_every=validate_every), tmp_path / "state.safetensors"
    straight, module = WithEncoder(), WithEncoder()
    fit(straight, regression, Points(), settings, Points(9, 1))
    with pytest.raises(
        DivergedError, match="training: the weights became NaN or infinite by step 13; lower the lea"
    ) as e:
        fit(module, broken_at(13), Points(), settings, Points(9, 1), state_file=state)
    assert (e.value.step, e.value.kept, e.value.best_step) == (13, validate_every == 7, 7 if validate_every == 7 else 0)
    saved = open_checkpoint(state)
    assert all(np.isfinite(saved[name]).all() for name in saved)
    assert json.loads(bytes(saved["log"].tolist()))["steps"] == 12
    again = WithEncoder()
    log = fit(again, regression, Points(), settings, Points(9, 1), state_file=state)
    assert log.steps == settings.steps
    assert_same(weights(straight), weights(again))


def test_a_training_that_diverges_before_it_is_saved_starts_from_the_beginning(tmp_path: Path) -> None:
    for step in (4, 40):  # 40: no loss is computed after it
        with pytest.raises(DivergedError, match="lower the learning rate"):
            fit(
                WithEncoder(),
                broken_at(step),
                Points(),
                replace(SETTINGS, validate_every=0),
                None,
                None,
                tmp_path / "s",
            )
        assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("eager_state")
def test_a_run_that_stopped_early_does_not_resume(tmp_path: Path) -> None:
    settings = TrainSettings(400, 4, lr=0.05, validate_every=5, patience=3)
    ends = []
    for _ in range(2):
        module = Scalar()
        state = tmp_path / "state.safetensors"
        log = fit(module, climbing, Points(), settings, Points(6, role=1), state_file=state)
        ends.append((float(module.w.detach()), log.steps, log.best_step, log.validation))
    assert ends[0] == ends[1]


@pytest.mark.usefixtures("eager_state")
def test_the_state_holds_no_frozen_weights_and_no_code(tmp_path: Path) -> None:
    train(tmp_path / "state.safetensors")
    names = set(open_checkpoint(tmp_path / "state.safetensors"))
    module = "weights/module."
    assert f"{module}encoder.backbone.weight" in names and f"{module}encoder.backbone.bias" not in names
    assert f"{module}head.1.running_mean" in names and "exp_avg/module.head.0.weight" not in names
    assert list(tmp_path.iterdir()) == [tmp_path / "state.safetensors"]


def test_the_best_weights_are_a_copy() -> None:
    module = WithEncoder()
    state = TrainingState(module, None, None, None)
    state.keep_best()
    kept = copy.deepcopy(state.best)
    with torch.no_grad():
        module.head[2].weight.add_(1)
    assert kept is not None and state.best is not None
    assert_same(kept, state.best)


# Settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("validate_every", -1),
        ("patience", 0),
        ("lr", 0.0),
        ("lr", -1e-3),
        ("lr", float("nan")),
        ("encoder_lr", -1e-3),
        ("encoder_lr", 0.0),
        ("weight_decay", -0.1),
        ("clip", 0.0),
        ("warmup", -0.1),
        ("warmup", 1.0),
    ],
)
def test_a_setting_out_of_its_range_is_named(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"training: {name} must be .*, got {value}"):
        TrainSettings(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("warmup", 0.0), ("validate_every", 0), ("steps", 1), ("clip", 1e9)])
def test_a_setting_at_the_edge_of_its_range_trains(name: str, value: float) -> None:
    module = WithEncoder()
    before = weights(module)
    fit(module, regression, Points(), TrainSettings(**{"steps": 2, "batch_size": 100, name: value}))
    assert not torch.equal(before["head.2.weight"], module.head[2].weight)


# Learning rates of the encoder --------------------------------------------------------------------------


class Deep(nn.Module):
    """Names of a SimoModel whose encoder has an embedding, three blocks and a final norm."""

    def __init__(self) -> None:
        super().__init__()
        backbone = nn.Module()
        backbone.embeddings = nn.Linear(2, 2, bias=False)
        backbone.layers = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(3)])
        backbone.norm = nn.LayerNorm(2, bias=False)
        self.encoder = nn.ModuleDict({"backbone": backbone})
        self.head = nn.Linear(2, 1, bias=False)


def rates(settings: TrainSettings) -> dict[str, float]:
    module = Deep()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    optimizer = make_optimizer(dict(module.named_parameters()), settings)
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_the_learning_rate_decays_from_the_last_block_to_the_first() -> None:
    found = rates(TrainSettings(lr=1e-2, encoder_lr=8e-3, layer_decay=0.5))
    assert {name.removeprefix("encoder.backbone."): lr for name, lr in found.items()} == {
        "embeddings.weight": 2e-3,
        "layers.0.weight": 2e-3,
        "layers.1.weight": 4e-3,
        "layers.2.weight": 8e-3,
        "norm.weight": 8e-3,
        "head.weight": 1e-2,
    }
    assert rates(TrainSettings(lr=1e-2, layer_decay=0.5))["encoder.backbone.layers.1.weight"] == 5e-3
    assert set(rates(TrainSettings(lr=1e-2)).values()) == {1e-2}


def test_trainings_of_one_process_may_differ_in_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head trains in bfloat16 where an encoder with depthwise convolutions trains in float32."""
    found = []

    def losses(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        output = model(batch["x"])
        found.append(output.dtype)
        return {"a": output.square().mean()}

    for precision in ("bf16", "fp32", "bf16"):
        monkeypatch.setenv(PRECISION, precision)
        fit(nn.Linear(2, 1), losses, [{"x": torch.ones(2)}] * 4, TrainSettings(steps=1))
    assert found == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_a_damaged_state_is_named_with_the_remedy(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    file.write_bytes(b"not a state")
    with pytest.raises(InputError, match=r"state.safetensors: cannot resume .*; remove it to train from the start"):
        train(file)
    fit(Scalar(), climbing, Points(), TrainSettings(10, 4), state_file=tmp_path / "other.safetensors")
