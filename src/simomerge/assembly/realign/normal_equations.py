"""Ridge regression from sums: one pass over the tokens of any number of images, then a solution in closed form.

Tokens of an image share its CLS token, so of the design matrix only the patch part is ever multiplied per token; all
that involves a CLS token takes one product per image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

LEAST_RIDGE = 1e-11
"""Stands for 0: with fewer tokens than inputs the equations have no unique solution, and float64 no digit to spare."""


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

    @property
    def unit(self) -> float:
        """What a ridge is measured in: the mean diagonal of the centred Gram matrix; 0 where all tokens are alike."""
        mean = float(self.variance.mean() * self.tokens)
        return mean if mean > 1e-12 * float(self.xx.diagonal().mean()) else 0.0

    def solve(self, ridge: float, penalties: Tensor, unit: float | None = None) -> tuple[Tensor, Tensor]:
        """The map that best explains the residuals: weights (O, D) and biases (O,).

        ``argmin sum ||r - W x - b||^2 + ridge * unit * sum_d penalties[d] ||W[:, d]||^2``, b not being penalised.

        Args:
            ridge: in units of ``unit``.
            penalties: (D,).
            unit: this one's own by default.
        """
        unit = self.unit if unit is None else unit
        mean = self.mean
        if not unit:
            return torch.zeros_like(self.xr.T), self.r / self.tokens
        gram = self.xx - self.tokens * torch.outer(mean, mean)
        gram.diagonal().add_(max(ridge, LEAST_RIDGE) * unit * penalties)
        factor = torch.linalg.cholesky(gram)
        weights = torch.cholesky_solve(self.xr - torch.outer(mean, self.r), factor).T
        return weights, self.r / self.tokens - weights @ mean

    def cls_basis(self, patches: int) -> Tensor | None:
        """Orthonormal (D_c, k) that span what the CLS tokens vary in, where k, the images, are fewer than D_c.

        A ridge solution has no part outside of it, so it can be found among k coordinates instead of D_c: at the width
        of a ViT-B with four taps and 64 images 64 instead of 3,072. Found from random combinations of the columns of
        the centred Gram matrix, which has at most that rank.

        Args:
            patches: how many of the inputs are patches' (the first).
        """
        count, width = int(self.images), len(self.x) - patches
        if count >= width:
            return None
        mean = self.mean[patches:]
        gram = self.xx[patches:, patches:] - self.tokens * torch.outer(mean, mean)
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(width, count, dtype=torch.float64, generator=generator).to(gram.device)
        return torch.linalg.qr(gram @ probes)[0]

    def in_basis(self, patches: int, basis: Tensor | None) -> NormalEquations:
        """The same sums of inputs whose CLS part is given in the coordinates of a basis."""
        if basis is None:
            return self
        across = self.xx[:patches, patches:] @ basis
        corner = basis.T @ self.xx[patches:, patches:] @ basis
        return replace(
            self,
            x=torch.cat([self.x[:patches], self.x[patches:] @ basis]),
            xx=torch.cat([torch.cat([self.xx[:patches, :patches], across], 1), torch.cat([across.T, corner], 1)]),
            xr=torch.cat([self.xr[:patches], basis.T @ self.xr[patches:]]),
        )

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
