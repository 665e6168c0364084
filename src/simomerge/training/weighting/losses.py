"""Weightings by what the losses are, or by nothing at all."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Weighting(nn.Module):
    """Losses by task -> one loss. What it learns or remembers is saved with the training it belongs to.

    Args:
        tasks: how many.
        seed: of what is drawn.
        epoch: steps of one epoch.
    """

    def __init__(self, tasks: int, seed: int = 0, epoch: int = 100) -> None:
        super().__init__()
        self.tasks, self.seed, self.epoch = tasks, seed, epoch

    looks_at_gradients = False

    def forward(self, losses: Tensor) -> Tensor:
        """Losses (T,) -> their unweighted mean (the paper's joint MTL)."""
        return losses.mean()


class Uncertainty(Weighting):
    """Homoscedastic uncertainty: ``mean exp(-s_t) L_t + s_t`` with one learned ``s_t`` per task.

    Source: "Multi-Task Learning Using Uncertainty to Weigh Losses" (arXiv 1705.07115), with ``s = log sigma^2`` and the
    constant factor of a half left out.
    """

    def __init__(self, tasks: int, seed: int = 0, epoch: int = 100) -> None:
        super().__init__(tasks, seed, epoch)
        self.log_variance = nn.Parameter(torch.zeros(tasks))

    def forward(self, losses: Tensor) -> Tensor:
        return (torch.exp(-self.log_variance) * losses + self.log_variance).mean()


class DynamicAverage(Weighting):
    """Dynamic weight average: tasks whose loss falls more slowly than the others' count more.

    ``w_t = T softmax_t(r_t / 2)``, ``r_t`` the ratio of the task's mean losses in the last two epochs; at first 1.

    Source: "End-to-End Multi-Task Learning with Attention" (arXiv 1803.10704).
    """

    def __init__(self, tasks: int, seed: int = 0, epoch: int = 100) -> None:
        super().__init__(tasks, seed, epoch)
        self.register_buffer("sums", torch.zeros(3, tasks))  # of this epoch, the last and the one before
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    sums: Tensor
    step: Tensor

    def weights(self) -> Tensor:
        """Of every task, (T,); their mean is 1."""
        if int(self.step) < 2 * self.epoch:
            return torch.ones_like(self.sums[0])
        return self.tasks * torch.softmax(self.sums[1] / self.sums[2].clamp(min=1e-12) / 2, 0)

    def forward(self, losses: Tensor) -> Tensor:
        if not self.training:
            return losses.mean()
        if int(self.step) and int(self.step) % self.epoch == 0:
            self.sums = torch.stack([torch.zeros_like(self.sums[0]), self.sums[0], self.sums[1]])
        total = (self.weights() * losses).mean()
        self.sums[0] += losses.detach().to(self.sums)
        self.step += 1
        return total


class RandomWeights(Weighting):
    """Random loss weighting: at every step the softmax of standard normal numbers.

    Source: "Reasonable Effectiveness of Random Weighting" (arXiv 2111.10603).
    """

    def __init__(self, tasks: int, seed: int = 0, epoch: int = 100) -> None:
        super().__init__(tasks, seed, epoch)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    step: Tensor

    def weights(self) -> Tensor:
        """Of every task at this step, (T,); their mean is 1."""
        # Of the step, not of a generator's state: a run that was killed goes on with the same weights.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.step))
        return self.tasks * torch.softmax(torch.randn(self.tasks, generator=generator), 0)

    def forward(self, losses: Tensor) -> Tensor:
        if not self.training:
            return losses.mean()
        total = (self.weights().to(losses) * losses).mean()
        self.step += 1
        return total
