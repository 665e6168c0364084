"""Weightings by the tasks' gradients on the encoder, which all tasks share.

Each needs the gradients' inner products only, a small matrix: what these methods do to gradients in the papers is a
weighted sum of them, and here a weighted sum of the losses. The weights' mean is 1, so that the step is no method's
choice. A step costs one backward pass per task more.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from simomerge.training.weighting.losses import Weighting

_Value = Callable[[np.ndarray], float]
_Slope = Callable[[np.ndarray], np.ndarray]


class GradientWeighting(Weighting):
    """A weighting that is shown the gradients' inner products before every step."""

    looks_at_gradients = True

    def __init__(self, tasks: int, seed: int = 0, epoch: int = 100) -> None:
        super().__init__(tasks, seed, epoch)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.current = torch.ones(tasks)

    step: Tensor

    @abstractmethod
    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        """Inner products of the tasks' gradients (T, T) and losses (T,) -> weights (T,), none below 0; float64."""

    def look(self, gram: Tensor, losses: Tensor) -> None:
        """Choose the weights of this step."""
        products = gram.double().cpu().numpy()
        scale = float(np.trace(products)) / self.tasks
        if np.isfinite(scale) and scale > 0:
            found = self.weights(products / scale, losses.detach().double().cpu().numpy())
            self.current = torch.from_numpy(self.tasks * found / found.sum()).float()
        self.step += 1

    def forward(self, losses: Tensor) -> Tensor:
        return (self.current.to(losses) * losses).mean() if self.training else losses.mean()


class GradNorm(GradientWeighting):
    """Gradients of like length, but longer for tasks that learn more slowly.

    The weights move, by at most ``rate`` a step, until the length of task t's weighted gradient is the mean length
    times ``r_t^1.5``, with r_t its loss over its first loss, over the tasks' mean of that. In the paper Adam moves
    them, and the gradients are those of the last shared layer.

    Source: "GradNorm: Gradient Normalization for Adaptive Loss Balancing" (arXiv 1711.02257).
    """

    rate, power = 0.025, 1.5

    def __init__(self, tasks: int, seed: int = 0, epoch: int = 100) -> None:
        super().__init__(tasks, seed, epoch)
        self.register_buffer("first", torch.zeros(tasks, dtype=torch.float64))
        self.register_buffer("kept", torch.ones(tasks, dtype=torch.float64))

    first: Tensor
    kept: Tensor

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        if not int(self.step):
            self.first.copy_(torch.from_numpy(losses))
        kept, lengths = self.kept.cpu().numpy(), np.sqrt(np.diag(gram).clip(min=0))
        rates = losses / self.first.cpu().numpy().clip(min=1e-12)
        wanted = (kept * lengths).mean() * (rates / max(rates.mean(), 1e-12)) ** self.power
        moved = kept - self.rate * np.sign(kept * lengths - wanted) * lengths / max(lengths.max(), 1e-12)
        moved = moved.clip(min=1e-3)
        self.kept.copy_(torch.from_numpy(self.tasks * moved / moved.sum()))
        return self.kept.cpu().numpy()


class PCGrad(GradientWeighting):
    """From every gradient what opposes another's is taken away: its projection on the others, one after the other in
    random order.

    Source: "Gradient Surgery for Multi-Task Learning" (arXiv 2001.06782), algorithm 1.
    """

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        # Of the step, not of a generator's state: a run that was killed goes on with the same order.
        rng = np.random.default_rng([self.seed, int(self.step)])
        parts = np.eye(self.tasks)  # what each gradient has become, in terms of those there were
        for part in parts:
            own = int(part.argmax())
            for other in rng.permutation(self.tasks):
                if other != own and (product := part @ gram[other]) < 0:
                    part[other] -= product / gram[other, other]
        return parts.sum(0)


class CAGrad(GradientWeighting):
    """The direction near the mean gradient in which the task that gains least gains most.

    ``g_0 + c |g_0| g_w / |g_w|``, with g_w the sum of the gradients by the weights w on the simplex at which
    ``g_w . g_0 + c |g_0| |g_w|`` is least; c = 0.4.

    Source: "Conflict-Averse Gradient Descent for Multi-task Learning" (arXiv 2110.14048), algorithm 1.
    """

    c = 0.4

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        mean = np.full(self.tasks, 1 / self.tasks)
        reach = self.c * np.sqrt(max(mean @ gram @ mean, 0.0))

        def worst(w: np.ndarray) -> float:
            return float(w @ gram @ mean + reach * np.sqrt(max(w @ gram @ w, 0.0)))

        w = _least_on_simplex(worst, lambda w: gram @ mean + reach * gram @ w / _length(gram, w), mean)
        return mean + reach * w / _length(gram, w)


class NashMTL(GradientWeighting):
    """The bargain in which the tasks' gains, ``g_t . sum_s a_s g_s``, have the greatest product.

    Its weights solve ``G a = 1 / a``, and so make ``a' G a / 2 - sum log a`` least. That is convex, and Newton's steps
    find it (the paper solves a sequence of programs instead, and only every few steps of the training).

    Source: "Multi-Task Learning as a Bargaining Game" (arXiv 2202.01017), claim 3.1.
    """

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        gram = gram + 1e-9 * np.eye(self.tasks)
        a = 1 / np.sqrt(np.diag(gram))
        for _ in range(100):
            slope = gram @ a - 1 / a
            newton: np.ndarray = np.linalg.solve(gram + np.diag(1 / a**2), slope)
            decrement = max(float(slope @ newton), 0.0) ** 0.5
            a = a - newton / (1 + decrement)  # of that length a step cannot leave the positive numbers
            if decrement < 1e-10:
                break
        return a


def _length(gram: np.ndarray, w: np.ndarray) -> float:
    return max(float(np.sqrt(max(w @ gram @ w, 0.0))), 1e-12)


def _least_on_simplex(value: _Value, slope: _Slope, start: np.ndarray) -> np.ndarray:
    """Where a convex function of weights that sum to 1 is least, by projected gradients with backtracking."""
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
    """The nearest weights that sum to 1, none below 0."""
    sorted_ = np.sort(v)[::-1]
    over = (np.cumsum(sorted_) - 1) / np.arange(1, len(v) + 1)
    return np.maximum(v - over[np.nonzero(sorted_ > over)[0][-1]], 0)
