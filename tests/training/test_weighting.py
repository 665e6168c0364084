"""Loss weightings, compared with their formulas, and in a training that is killed and resumed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from simomerge.core.errors import InputError
from simomerge.core.progress import show_progress
from simomerge.training.choices import WEIGHTINGS, find
from simomerge.training.loop import Objective, _gradient_products, fit
from simomerge.training.settings import TrainSettings
from simomerge.training.state import TrainingState
from simomerge.training.weighting import (
    CAGrad,
    DynamicAverage,
    GradientWeighting,
    GradNorm,
    NashMTL,
    RandomWeights,
    Uncertainty,
    Weighting,
)

LOSSES = torch.tensor([0.5, 2.0, 4.0])


def weighting(name: str, *settings: int, **more: int) -> Weighting:
    return find("loss weighting", WEIGHTINGS, name)(*settings, **more)


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


def test_random_weights_depend_on_the_step_only() -> None:
    module, other = weighting("random", 3, seed=5), weighting("random", 3, seed=6)
    assert isinstance(module, RandomWeights) and isinstance(other, RandomWeights)
    first = module.weights()
    assert float(first.mean()) == pytest.approx(1) and float(first.min()) > 0
    assert not torch.allclose(first, other.weights())
    assert float(module(LOSSES)) == pytest.approx(float((first * LOSSES).mean()))
    assert not torch.allclose(first, module.weights())
    drawn = torch.stack([module.weights() for _ in range(400) if module(LOSSES) is not None])
    assert (drawn.mean(0) - 1).abs().max() < 0.15  # in expectation all tasks have equal weight


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_the_first_loss_of_a_single_task_is_not_changed(name: str) -> None:
    assert float(weighting(name, 1)(torch.tensor([0.7]))) == pytest.approx(0.7)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(InputError, match="'gradnrom'; choose one of: equal, uncertainty, dwa, random, gradnorm"):
        weighting("gradnrom", 2)


# Gradients ----------------------------------------------------------------------------------------------


def gradients(seed: int, tasks: int = 4, conflict: bool = True) -> np.ndarray:
    """Gradients (tasks, 6) of very different norms; with ``conflict`` some point against each other."""
    rng = np.random.default_rng(seed)
    found = rng.standard_normal((tasks, 6)) * rng.uniform(0.1, 10, (tasks, 1))
    return found if conflict else np.abs(found)


def shown(name: str, vectors: np.ndarray, seed: int = 0) -> np.ndarray:
    """The weights that a weighting chooses for these gradients."""
    module = weighting(name, len(vectors), seed)
    assert isinstance(module, GradientWeighting)
    module.look(torch.from_numpy(vectors @ vectors.T), torch.ones(len(vectors)))
    return module.current.double().numpy()


BY_GRADIENT = [name for name in WEIGHTINGS if isinstance(weighting(name, 1), GradientWeighting)]


@pytest.mark.parametrize("name", BY_GRADIENT)
@pytest.mark.parametrize("conflict", [True, False])
def test_weights_by_gradients_have_mean_one_and_do_not_depend_on_the_unit(name: str, conflict: bool) -> None:
    for seed in range(10):
        vectors = gradients(seed, conflict=conflict)
        weights = shown(name, vectors)
        assert weights.mean() == pytest.approx(1, abs=1e-6) and weights.min() >= 0
        np.testing.assert_allclose(shown(name, 1e-4 * vectors), weights, rtol=1e-3, atol=1e-5)
        if name != "pcgrad":  # its order is random
            order = np.array([2, 0, 3, 1])
            np.testing.assert_allclose(shown(name, vectors[order]), weights[order], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_orthogonal_gradients_of_one_norm_get_equal_weights(name: str) -> None:
    np.testing.assert_allclose(shown(name, np.eye(3)), 1, atol=1e-6)


@pytest.mark.parametrize("name", BY_GRADIENT)
@pytest.mark.parametrize("vectors", [np.zeros((2, 3)), np.array([[np.nan, 1], [1, 1]]), np.array([[1.0, 0], [-1, 0]])])
def test_degenerate_gradients_give_finite_weights(name: str, vectors: np.ndarray) -> None:
    np.testing.assert_allclose(shown(name, vectors), 1, atol=1e-4)


def test_pcgrad_equals_its_algorithm_on_the_gradients() -> None:
    for seed in range(20):
        vectors = gradients(seed)
        rng = np.random.default_rng([seed, 0])
        changed = vectors.copy()
        for i, one in enumerate(changed):
            for j in rng.permutation(len(vectors)):
                if i != j and one @ vectors[j] < 0:
                    one -= one @ vectors[j] / (vectors[j] @ vectors[j]) * vectors[j]
        expected = changed.sum(0)
        ours = shown("pcgrad", vectors, seed=seed) @ vectors
        np.testing.assert_allclose(ours / np.linalg.norm(ours), expected / np.linalg.norm(expected), atol=1e-5)
    np.testing.assert_allclose(shown("pcgrad", gradients(0, conflict=False)), 1, atol=1e-6)


def test_cagrad_maximises_the_least_gain_near_the_mean() -> None:
    """Compare with the primal problem; CAGrad solves the dual."""
    for seed in range(10):
        vectors = gradients(seed) / 10
        mean = vectors.mean(0)
        ours = CAGrad(4).solve(vectors @ vectors.T, np.ones(4)) @ vectors
        assert np.linalg.norm(ours - mean) <= 0.4 * np.linalg.norm(mean) * (1 + 1e-6)
        assert (vectors @ ours).min() == pytest.approx(greatest_least_gain(vectors, mean), rel=2e-3, abs=1e-6)


def greatest_least_gain(vectors: np.ndarray, mean: np.ndarray) -> float:
    """The maximum of the smallest gain of a task, within 0.4 |g_0| of g_0."""
    found = minimize(
        lambda x: -x[-1],
        np.append(mean, (vectors @ mean).min()),
        method="SLSQP",
        constraints=[
            {"type": "ineq", "fun": lambda x: vectors @ x[:-1] - x[-1]},
            {"type": "ineq", "fun": lambda x: 0.16 * mean @ mean - ((x[:-1] - mean) ** 2).sum()},
        ],
        options={"maxiter": 500, "ftol": 1e-12},
    )
    return float(found.x[-1])


def test_nash_mtl_solves_its_equation() -> None:
    for seed in range(20):
        vectors = gradients(seed)
        weights = NashMTL(4).solve(vectors @ vectors.T, np.ones(4))
        np.testing.assert_allclose(vectors @ (weights @ vectors) * weights, 1, rtol=1e-4)  # G a = 1 / a
        assert weights.min() > 0
    np.testing.assert_allclose(NashMTL(2).solve(np.diag([4.0, 0.25]), np.ones(2)), [0.5, 2], rtol=1e-6)


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e4, 1e6])
def test_nash_mtl_does_not_depend_on_the_unit_of_a_loss(factor: float) -> None:
    vectors, units = gradients(3), np.array([factor, 1, 1, 1])
    wanted, found = (
        NashMTL(4).solve(v @ v.T / np.trace(v @ v.T), np.ones(4)) for v in (vectors, vectors * units[:, None])
    )
    share = found * units
    np.testing.assert_allclose(share / share.sum(), wanted / wanted.sum(), rtol=1e-5)


def test_a_task_without_a_gradient_does_not_stop_the_others_in_nash_mtl() -> None:
    vectors = gradients(0)
    some = NashMTL(3).solve(vectors[:3] @ vectors[:3].T, np.ones(3))
    vectors[3] = 0
    np.testing.assert_allclose(NashMTL(4).solve(vectors @ vectors.T, np.ones(4)), [*some, 0], rtol=1e-6)


def test_gradnorm_equalises_the_norms_and_favours_the_slow_task() -> None:
    module = weighting("gradnorm", 2)
    assert isinstance(module, GradNorm)
    gram = torch.diag(torch.tensor([9.0, 1.0]))
    for _ in range(2):
        module.look(gram, torch.tensor([1.0, 1.0]))
    assert 0 < float(module.current[0]) < 1 < float(module.current[1])
    for _ in range(500):
        module.look(gram, torch.tensor([1.0, 1.0]))
    lengths = module.current * torch.tensor([3.0, 1.0])
    assert float(lengths[0] / lengths[1]) == pytest.approx(1, abs=0.2)
    for _ in range(
        500
    ):  # half of the first loss remains for the first task, a quarter for the second: the first is the slow one
        module.look(gram, torch.tensor([0.5, 0.25]))
    lengths = module.current * torch.tensor([3.0, 1.0])
    assert float(lengths[0] / lengths[1]) == pytest.approx((0.5 / 0.25) ** 1.5, rel=0.2)


def test_the_gradient_products_are_those_of_the_encoder() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": nn.Linear(4, 3), "a": nn.Linear(3, 1), "b": nn.Linear(3, 2)})
    x = torch.randn(5, 4)
    losses = {task: model[task](model["encoder"](x)).square().mean() for task in ("a", "b")}
    found = _gradient_products(list(model["encoder"].parameters()), torch.stack(list(losses.values())), model.zero_grad)
    losses = {task: model[task](model["encoder"](x)).square().mean() for task in ("a", "b")}
    rows = []
    for task in ("a", "b"):
        model.zero_grad()
        losses[task].backward(retain_graph=True)
        rows.append(torch.cat([p.grad.flatten() for p in model["encoder"].parameters() if p.grad is not None]))
    torch.testing.assert_close(found.float(), torch.stack(rows) @ torch.stack(rows).T)
    with pytest.raises(InputError, match="the encoder is frozen"):
        _gradient_products([], torch.zeros(2), model.zero_grad)


class Twins(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        return {"x": x, "a": x.sum()[None], "b": 10 * x[:1]}


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_resumed_training_uses_the_same_weights(
    float32: None, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(state: Path | None, stop: int = 0) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})

        def losses(model: nn.ModuleDict, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {
                task: (model[task](model["encoder"](batch["x"])) - batch[task]).square().mean() for task in ("a", "b")
            }

        def progress(label: str, done: int, total: int, note: str) -> None:
            if stop and done >= stop:
                raise KeyboardInterrupt

        settings = TrainSettings(steps=40, batch_size=4, lr=0.05, seed=3)
        with show_progress(progress):
            objective = Objective(losses, weighting=weighting(name, 2, 3, 3))
            fit(model, objective, Twins(), settings, state_file=state)
        assert not any("loss_weighting" in key for key in model.state_dict())
        return dict(model.state_dict())

    uninterrupted = train(None)
    always: Callable[..., None] = lambda self, log, seconds=20.0: self.save(log)  # noqa: E731
    monkeypatch.setattr(TrainingState, "save_once_in_a_while", always)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "state.safetensors", stop=20)
    resumed = train(tmp_path / "state.safetensors")
    for key, value in uninterrupted.items():
        torch.testing.assert_close(resumed[key], value, rtol=1e-6, atol=1e-7)
