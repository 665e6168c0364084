"""Weightings that look at the losses only."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn


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

    def __init__(self, tasks: int, seed: int = 0, epoch: int = 100) -> None:
        super().__init__()
        self.tasks, self.seed, self.epoch = tasks, seed, epoch

    def forward(self, losses: Tensor) -> Tensor:
        """Task losses (T,) -> one loss."""
        return losses.mean()


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


class StepWeighting(Weighting):
    """A weighting with new weights at every step."""

    step: Tensor

    def __init__(self, tasks: int, seed: int = 0, epoch: int = 100) -> None:
        super().__init__(tasks, seed, epoch)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    @abstractmethod
    def weights(self) -> Tensor:
        """Weights (T,) of this step; their mean is 1."""

    def forward(self, losses: Tensor) -> Tensor:
        total = (self.weights().to(losses) * losses).mean()
        self.step += 1
        return total


class RandomWeights(StepWeighting):
    """Random loss weighting: the weights of each step are the softmax of standard normal numbers.

    Source: "Reasonable Effectiveness of Random Weighting" (arXiv 2111.10603).
    """

    def weights(self) -> Tensor:
        # The seed depends on the step, so that a resumed run draws the same weights.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.step))
        return self.tasks * torch.softmax(torch.randn(self.tasks, generator=generator), 0)


class DynamicAverage(StepWeighting):
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
            return torch.ones_like(self.sums[0])
        return self.tasks * torch.softmax(self.sums[1] / self.sums[2].clamp(min=1e-12) / 2, 0)

    def forward(self, losses: Tensor) -> Tensor:
        if int(self.step) and int(self.step) % self.epoch == 0:
            self.sums = torch.stack([torch.zeros_like(self.sums[0]), self.sums[0], self.sums[1]])
        total = super().forward(losses)
        self.sums[0] += losses.detach().to(self.sums)
        return total
