"""Loss weightings of joint training, the baselines of merging; their names are in `simomerge.training.choices`.

Some look at the gradients of the task losses on the encoder, which all tasks share. Their papers combine gradients; a
weighted sum of gradients is the gradient of the weighted sum of the losses. So each method here only needs the inner
products of the gradients, a (T, T) matrix, and returns one weight per task. The mean weight is 1, so that no method
changes the step size. Each step costs one more backward pass per task.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

_Value = Callable[[np.ndarray], float]
_Slope = Callable[[np.ndarray], np.ndarray]


class Weighting(nn.Module):
    """The unweighted mean of the task losses (the paper's joint MTL), and the base class of all weightings.

    The parameters and buffers of a weighting are saved in the state of its training.

    Args:
        tasks: Number of tasks.
        seed: Seed of random weights.
        epoch: Steps of one epoch.

    Example:
        >>> float(Weighting(2)(torch.tensor([1.0, 3.0])))
        2.0
    """

    step: Tensor

    def __init__(self, tasks: int, seed: int = 0, epoch: int = 100) -> None:
        super().__init__()
        self.tasks, self.seed, self.epoch = tasks, seed, epoch
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def weights(self) -> Tensor:
        """Weights (T,) of this step; their mean is 1."""
        return torch.ones(self.tasks, device=self.step.device)

    def forward(self, losses: Tensor) -> Tensor:
        """Task losses (T,) -> one loss."""
        total = (self.weights().to(losses) * losses).mean()
        self.step += 1
        return total


class Uncertainty(Weighting):
    """Homoscedastic uncertainty: ``mean exp(-s_t) L_t + s_t`` with one learned ``s_t`` per task.

    Source: "Multi-Task Learning Using Uncertainty to Weigh Losses" (arXiv 1705.07115), with ``s = log sigma^2`` and
    without the constant factor 1/2.
    """

    def __init__(self, tasks: int, seed: int = 0, epoch: int = 100) -> None:
        super().__init__(tasks, seed, epoch)
        self.log_variance = nn.Parameter(torch.zeros(tasks))

    def forward(self, losses: Tensor) -> Tensor:
        return (torch.exp(-self.log_variance) * losses + self.log_variance).mean()


class RandomWeights(Weighting):
    """Random loss weighting: the weights of each step are the softmax of standard normal numbers.

    Source: "Reasonable Effectiveness of Random Weighting" (arXiv 2111.10603).
    """

    def weights(self) -> Tensor:
        # The seed depends on the step, so that a resumed run draws the same weights.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.step))
        return self.tasks * torch.softmax(torch.randn(self.tasks, generator=generator), 0)


class DynamicAverage(Weighting):
    """Dynamic weight average: a task whose loss falls more slowly than the others' gets more weight.

    ``w_t = T softmax_t(r_t / 2)``, where ``r_t`` is the ratio of the task's mean losses in the last two epochs; 1 in
    the first two epochs.

    Source: "End-to-End Multi-Task Learning with Attention" (arXiv 1803.10704).
    """

    sums: Tensor

    def __init__(self, tasks: int, seed: int = 0, epoch: int = 100) -> None:
        super().__init__(tasks, seed, epoch)
        self.register_buffer("sums", torch.zeros(3, tasks))  # loss sums of this epoch and the two before

    def weights(self) -> Tensor:
        if int(self.step) < 2 * self.epoch:
            return super().weights()
        return self.tasks * torch.softmax(self.sums[1] / self.sums[2].clamp(min=1e-12) / 2, 0)

    def forward(self, losses: Tensor) -> Tensor:
        if int(self.step) and int(self.step) % self.epoch == 0:
            self.sums = torch.stack([torch.zeros_like(self.sums[0]), self.sums[0], self.sums[1]])
        self.sums[0] += losses.detach().to(self.sums)
        return super().forward(losses)


class GradientWeighting(Weighting):
    """A weighting that gets the inner products of the gradients before every step."""

    def __init__(self, tasks: int, seed: int = 0, epoch: int = 100) -> None:
        super().__init__(tasks, seed, epoch)
        self.current = super().weights()

    @abstractmethod
    def solve(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        """Inner products of the gradients (T, T) and losses (T,) -> weights (T,) of at least 0; all float64."""

    def look(self, gram: Tensor, losses: Tensor) -> None:
        """Choose the weights of this step from the inner products (T, T) and the losses (T,)."""
        products = gram.cpu().double().numpy()
        scale = float(np.trace(products)) / self.tasks
        if np.isfinite(scale) and scale > 0:
            found = self.solve(products / scale, losses.detach().cpu().double().numpy())
            self.current = torch.from_numpy(self.tasks * found / found.sum()).float()

    def weights(self) -> Tensor:
        return self.current


class GradNorm(GradientWeighting):
    """Gradients of equal norm, but larger for tasks that learn more slowly.

    The weights move by at most ``rate`` per step, until the norm of task t's weighted gradient is the mean norm times
    ``r_t^1.5``. ``r_t`` is the ratio of the task's loss to its first loss, divided by the mean ratio of all tasks. In
    the paper the weights are trained by Adam, with gradients on the last shared layer.

    Source: "GradNorm: Gradient Normalization for Adaptive Loss Balancing" (arXiv 1711.02257).
    """

    rate, power = 0.025, 1.5
    first: Tensor
    kept: Tensor

    def __init__(self, tasks: int, seed: int = 0, epoch: int = 100) -> None:
        super().__init__(tasks, seed, epoch)
        self.register_buffer("first", torch.zeros(tasks))
        self.register_buffer("kept", torch.ones(tasks))

    def solve(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        if not self.first.any():
            self.first.copy_(torch.from_numpy(losses))
        kept, norms = self.kept.cpu().double().numpy(), np.sqrt(np.diag(gram).clip(min=0))
        rates = losses / self.first.cpu().double().numpy().clip(min=1e-12)
        wanted = (kept * norms).mean() * (rates / max(rates.mean(), 1e-12)) ** self.power
        moved = kept - self.rate * np.sign(kept * norms - wanted) * norms / max(norms.max(), 1e-12)
        moved = moved.clip(min=1e-3)
        self.kept.copy_(torch.from_numpy(self.tasks * moved / moved.sum()))
        return self.kept.cpu().double().numpy()


class PCGrad(GradientWeighting):
    """Each gradient loses its component against every gradient that it conflicts with, in random order.

    Source: "Gradient Surgery for Multi-Task Learning" (arXiv 2001.06782), algorithm 1.
    """

    def solve(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        # The seed contains the step, so that a resumed run uses the same order.
        rng = np.random.default_rng([self.seed, int(self.step)])
        projected = np.eye(self.tasks)  # row t: the projected gradient of task t as a sum of the original ones
        for row in projected:
            own = int(row.argmax())
            for other in rng.permutation(self.tasks):
                if other != own and (product := row @ gram[other]) < 0:
                    row[other] -= product / gram[other, other]
        return projected.sum(0)


class CAGrad(GradientWeighting):
    """The direction near the mean gradient that gives the most to the task that gains least.

    The direction is ``g_0 + c |g_0| g_w / |g_w|`` with c = 0.4. ``g_0`` is the mean gradient, ``g_w`` the sum weighted
    by the w on the simplex that minimises ``g_w . g_0 + c |g_0| |g_w|``.

    Source: "Conflict-Averse Gradient Descent for Multi-task Learning" (arXiv 2110.14048), algorithm 1.
    """

    c = 0.4

    def solve(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        mean = np.full(self.tasks, 1 / self.tasks)
        reach = self.c * np.sqrt(max(mean @ gram @ mean, 0.0))

        def worst(w: np.ndarray) -> float:
            return float(w @ gram @ mean + reach * np.sqrt(max(w @ gram @ w, 0.0)))

        w = _minimise_on_simplex(worst, lambda w: gram @ mean + reach * gram @ w / _norm(gram, w), mean)
        return mean + reach * w / _norm(gram, w)


class NashMTL(GradientWeighting):
    """The Nash bargaining solution: the product of the tasks' gains, ``g_t . sum_s a_s g_s``, is maximal.

    The weights solve ``G a = 1 / a``, so they minimise ``a' G a / 2 - sum log a``. This function is convex, and
    Newton's method finds its minimum. The paper solves a sequence of programs instead, every few training steps. A task
    without a gradient has no gain, and the others bargain without it.

    Source: "Multi-Task Learning as a Bargaining Game" (arXiv 2202.01017), claim 3.1.
    """

    def solve(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        norms = np.sqrt(np.diag(gram).clip(min=0))
        some, found = norms > 0, np.zeros(self.tasks)
        # For gradients of norm one, so that the regularisation does not depend on the units of the losses.
        found[some] = self._bargain(gram[np.ix_(some, some)] / np.outer(norms[some], norms[some])) / norms[some]
        return found

    def _bargain(self, gram: np.ndarray) -> np.ndarray:
        gram = gram + 1e-9 * np.eye(len(gram))
        a = 1 / np.sqrt(np.diag(gram))
        for _ in range(100):
            slope = gram @ a - 1 / a
            newton: np.ndarray = np.linalg.solve(gram + np.diag(1 / a**2), slope)
            decrement = max(float(slope @ newton), 0.0) ** 0.5
            a = a - newton / (1 + decrement)  # the damping keeps all weights positive
            if decrement < 1e-10:
                break
        return a


def _norm(gram: np.ndarray, w: np.ndarray) -> float:
    return max(float(np.sqrt(max(w @ gram @ w, 0.0))), 1e-12)


def _minimise_on_simplex(value: _Value, slope: _Slope, start: np.ndarray) -> np.ndarray:
    """Minimum of a convex function on the simplex, by projected gradient descent with backtracking."""
    w, step = start, 1.0
    for _ in range(200):
        here, down = value(w), slope(w)
        while True:
            there = _onto_simplex(w - step * down)
            moved = there - w
            if value(there) <= here + down @ moved + (moved @ moved) / (2 * step) or step < 1e-12:
                break
            step /= 2
        w, step = there, step * 1.5
        if np.abs(moved).max() < 1e-9:
            break
    return w


def _onto_simplex(v: np.ndarray) -> np.ndarray:
    """Projection onto the simplex: the nearest weights that are at least 0 and sum to 1."""
    descending = np.sort(v)[::-1]
    over = (np.cumsum(descending) - 1) / np.arange(1, len(v) + 1)
    return np.maximum(v - over[np.nonzero(descending > over)[0][-1]], 0)
