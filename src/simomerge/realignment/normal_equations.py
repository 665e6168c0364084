"""Ridge regression from sums: one pass over the tokens of any number of images, then a solution in closed form.

Tokens of an image share its CLS token, so of the design matrix only the patch part is ever multiplied per token; all
that involves a CLS token takes one product per image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class NormalEquations:
    """Sums of a regression of residuals ``r`` (what a linear map still lacks) on inputs ``x``, in float64.

    With D inputs per token (the patch's channels, then the CLS tokens' ones) and O outputs.

    Attributes:
        tokens, images: how many were counted.
        x (D,), xx (D, D): sums of the inputs and their products.
        r (O,), rr (O,), xr (D, O): sums of the residuals, their squares and their products with the inputs.
        u (O,), uu (O,): sums and squares of the targets themselves, for R^2.
    """

    tokens: float
    images: float
    x: Tensor
    xx: Tensor
    r: Tensor
    rr: Tensor
    xr: Tensor
    u: Tensor
    uu: Tensor

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: Any = None) -> NormalEquations:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        d, o = inputs, outputs
        return cls(0.0, 0.0, zeros(d), zeros(d, d), zeros(o), zeros(o), zeros(d, o), zeros(o), zeros(o))

    def add(self, patches: Tensor, cls: Tensor, residual: Tensor, target: Tensor) -> None:
        """Count a batch: patches (B, n, D_z), CLS tokens (B, D_c), residual and target (B, n, O)."""
        images, places, width = patches.shape
        z, c = patches.to(self.x).flatten(0, 1), cls.to(self.x)
        r, u = residual.to(self.x), target.to(self.x)
        z_sum, r_sum = z.view(images, places, width).sum(1), r.sum(1)
        self.tokens += images * places
        self.images += images
        self.x[:width] += z_sum.sum(0)
        self.x[width:] += places * c.sum(0)
        self.xx[:width, :width] += _gram(z)
        self.xx[:width, width:] += (between := z_sum.T @ c)
        self.xx[width:, :width] += between.T
        self.xx[width:, width:] += places * _gram(c)
        self.xr[:width] += z.T @ r.flatten(0, 1)
        self.xr[width:] += c.T @ r_sum
        self.r += r_sum.sum(0)
        self.rr += r.square().sum((0, 1))
        self.u += u.sum((0, 1))
        self.uu += u.square().sum((0, 1))

    def __add__(self, other: NormalEquations) -> NormalEquations:
        return NormalEquations(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def mean(self) -> Tensor:
        """(D,): of every input."""
        return self.x / self.tokens

    @property
    def variance(self) -> Tensor:
        """(D,): of every input."""
        return (self.xx.diagonal() / self.tokens - self.mean.square()).clamp(min=0)

    def solve(self, ridge: float, penalties: Tensor) -> tuple[Tensor, Tensor]:
        """The map that best explains the residuals: weights (O, D) and biases (O,).

        ``argmin sum ||r - W x - b||^2 + lambda sum_d penalties[d] ||W[:, d]||^2``, the bias not being penalised.

        Args:
            ridge: lambda in units of the mean diagonal of the centred Gram matrix.
            penalties: (D,).
        """
        mean = self.mean
        gram = self.xx - self.tokens * torch.outer(mean, mean)
        unit = float(gram.diagonal().mean())
        if not unit > 1e-12 * max(1.0, float(self.xx.diagonal().mean())):  # all tokens are the same: only a bias
            return torch.zeros_like(self.xr.T), self.r / self.tokens
        gram.diagonal().add_(ridge * unit * penalties)
        factor = torch.linalg.cholesky(gram)
        weights = torch.cholesky_solve(self.xr - torch.outer(mean, self.r), factor).T
        return weights, self.r / self.tokens - weights @ mean

    def error(self, weights: Tensor, bias: Tensor) -> Tensor:
        """(O,): sum over the tokens of ``(r - W x - b)^2``."""
        quadratic = ((weights @ self.xx) * weights).sum(1)
        linear = (weights * self.xr.T).sum(1)
        offset = bias * (self.tokens * bias + 2 * (weights @ self.x) - 2 * self.r)
        return (self.rr - 2 * linear + quadratic + offset).clamp(min=0)

    def spread(self) -> Tensor:
        """(O,): sum over the tokens of ``(u - mean u)^2``: what an R^2 of 0 leaves."""
        return (self.uu - self.u.square() / max(self.tokens, 1.0)).clamp(min=0)


def _gram(rows: Tensor) -> Tensor:
    """rows^T rows; numpy's product of a matrix with its own transpose does half the work of torch's."""
    if rows.device.type != "cpu":
        return rows.T @ rows
    array = rows.numpy()
    return torch.from_numpy(array.T @ array)
