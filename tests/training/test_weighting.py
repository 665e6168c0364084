"""Weightings of a joint model's losses against their formulas, and through a training that is killed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from simomerge.errors import InputError
from simomerge.training import WEIGHTINGS, TrainSettings, fit
from simomerge.training.weighting import DynamicAverage, RandomWeights, Uncertainty, weighting

LOSSES = torch.tensor([0.5, 2.0, 4.0])


def test_equal_is_the_mean() -> None:
    assert float(weighting("equal", 3)(LOSSES)) == pytest.approx(6.5 / 3)


def test_uncertainty_is_its_formula_and_its_gradient() -> None:
    module = weighting("uncertainty", 3)
    assert isinstance(module, Uncertainty)
    with torch.no_grad():
        module.log_variance.copy_(torch.tensor([0.0, 1.0, -1.0]))
    losses = LOSSES.clone().requires_grad_()
    total = module(losses)
    expected = (0.5 + (2 * math.exp(-1) + 1) + (4 * math.e - 1)) / 3
    assert float(total.detach()) == pytest.approx(expected)
    total.backward()
    assert losses.grad is not None and module.log_variance.grad is not None
    torch.testing.assert_close(losses.grad, torch.tensor([1, math.exp(-1), math.e]) / 3)
    expected_gradient = torch.tensor([1 - 0.5, 1 - 2 * math.exp(-1), 1 - 4 * math.e]) / 3
    torch.testing.assert_close(module.log_variance.grad, expected_gradient)


def test_dynamic_average_compares_the_last_two_epochs() -> None:
    module = weighting("dwa", 3, epoch=2)
    assert isinstance(module, DynamicAverage)
    epochs = [[1.0, 1.0, 1.0], [0.5, 1.0, 2.0], [0.5, 0.5, 0.5]]
    for losses in (epochs[0], epochs[0], epochs[1], epochs[1]):
        assert float(module(torch.tensor(losses))) == pytest.approx(sum(losses) / 3)  # weights of 1 in the first two
    ratios = [math.exp(r / 2) for r in (0.5, 1.0, 2.0)]
    weights = [3 * r / sum(ratios) for r in ratios]
    total = float(module(torch.tensor(epochs[2])))
    assert total == pytest.approx(sum(w * 0.5 for w in weights) / 3)
    assert module.weights().tolist() == pytest.approx(weights) and sum(weights) == pytest.approx(3)
    state = module.state_dict()
    again = weighting("dwa", 3, epoch=2)
    again.load_state_dict(state)
    assert torch.equal(again(LOSSES), module(LOSSES))


def test_random_weights_depend_on_the_step_alone() -> None:
    module, other = weighting("random", 3, seed=5), weighting("random", 3, seed=6)
    assert isinstance(module, RandomWeights) and isinstance(other, RandomWeights)
    first = module.weights()
    assert float(first.mean()) == pytest.approx(1) and float(first.min()) > 0
    assert not torch.allclose(first, other.weights())
    assert float(module(LOSSES)) == pytest.approx(float((first * LOSSES).mean()))
    assert not torch.allclose(first, module.weights())
    drawn = torch.stack([module.weights() for _ in range(400) if module(LOSSES) is not None])
    assert (drawn.mean(0) - 1).abs().max() < 0.15  # in expectation all count alike


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_one_task_alone_is_its_own_loss_at_first(name: str) -> None:
    assert float(weighting(name, 1)(torch.tensor([0.7]))) == pytest.approx(0.7)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(InputError, match="'gradnorm'; choose one of: equal, uncertainty, dwa, random"):
        weighting("gradnorm", 2)


class Twins(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        return {"x": x, "a": x.sum()[None], "b": 10 * x[:1]}


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_killed_training_goes_on_with_the_same_weights(
    float32: None, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(state: Path | None, stop: int = 0) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})

        def losses(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {task: (model[task](batch["x"]) - batch[task]).square().mean() for task in ("a", "b")}

        def progress(label: str, done: int, total: int, note: str) -> None:
            if stop and done >= stop:
                raise KeyboardInterrupt

        settings = TrainSettings(steps=40, batch_size=4, lr=0.05, seed=3)
        fit(model, losses, Twins(), settings, state_file=state, progress=progress, weighting=weighting(name, 2, 3, 3))
        assert not any("loss_weighting" in key for key in model.state_dict())
        return dict(model.state_dict())

    whole = train(None)
    always: Callable[..., None] = lambda self, log, seconds=20.0: self.save(log)  # noqa: E731
    monkeypatch.setattr("simomerge.training.loop._State.save_once_in_a_while", always)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "state.pt", stop=20)
    resumed = train(tmp_path / "state.pt")
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, rtol=1e-6, atol=1e-7)
