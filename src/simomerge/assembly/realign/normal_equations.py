"""Ridge regression from sums: one pass over the tokens of any number of images, then a solution in closed form.

All tokens of an image share its CLS token. Products with the CLS token are therefore computed once per image, and only
the patch part of the design matrix is multiplied per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from simomerge.core import distributed

LEAST_RIDGE = 1e-11
"""Used instead of 0, because with fewer tokens than inputs the equations have no unique solution."""


@dataclass
class NormalEquations:
    """Sums for the regression of residuals ``r`` (target minus current output) on inputs ``x``, in float64.

    D is the number of inputs per token (the patch's channels, then those of the CLS tokens), O that of outputs.

    Attributes:
        tokens, images: Number of tokens and images in the sums.
        x (D,), xx (D, D): Sums of the inputs and of their products.
        r (O,), rr (O,), xr (D, O): Sums of the residuals, of their squares, and of their products with the inputs.
        u (O,), uu (O,): Sums of the targets and of their squares, for R^2.
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
        """Add a batch: patches (B, n, D_z), CLS tokens (B, D_c), residual and target (B, n, O)."""
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

    def gather(self) -> None:
        """Add up the sums of all processes, so that each process has the totals."""
        if distributed.processes() < 2:
            return
        counts = torch.tensor([self.tokens, self.images], dtype=torch.float64, device=self.x.device)
        distributed.add_up(counts, self.x, self.xx, self.r, self.rr, self.xr, self.u, self.uu)
        self.tokens, self.images = counts.tolist()

    @property
    def mean(self) -> Tensor:
        """(D,): mean of every input."""
        return self.x / self.tokens

    @property
    def variance(self) -> Tensor:
        """(D,): variance of every input."""
        return (self.xx.diagonal() / self.tokens - self.mean.square()).clamp(min=0)

    @property
    def unit(self) -> float:
        """The unit of a ridge: the mean diagonal of the centred Gram matrix; 0 if all tokens are equal."""
        mean = float(self.variance.mean() * self.tokens)
        return mean if mean > 1e-12 * float(self.xx.diagonal().mean()) else 0.0

    def solve(self, ridge: float, penalties: Tensor, unit: float | None = None) -> tuple[Tensor, Tensor]:
        """The map that best explains the residuals: weights (O, D) and biases (O,).

        ``argmin sum ||r - W x - b||^2 + ridge * unit * sum_d penalties[d] ||W[:, d]||^2``; b is not penalised.

        Args:
            ridge: In units of ``unit``.
            penalties: (D,).
            unit: The unit of these sums by default.
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
        """An orthonormal basis (D_c, k) of the span of the CLS tokens, if the k images are fewer than D_c; else None.

        A ridge solution lies in this span, so k coordinates suffice instead of D_c: for a ViT-B with four taps and 64
        images, 64 instead of 3,072. The basis comes from random combinations of the columns of the centred Gram matrix,
        whose rank is at most k.

        Args:
            patches: Number of inputs that belong to patches; these come first.
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
        """(O,): sum over the tokens of ``(u - mean u)^2``, the error at an R^2 of 0."""
        return (self.uu - self.u.square() / max(self.tokens, 1.0)).clamp(min=0)


def _gram(rows: Tensor) -> Tensor:
    """rows^T rows; numpy's product of a matrix with its own transpose does half the work of torch's."""
    if rows.device.type != "cpu":
        return rows.T @ rows
    array = rows.numpy()
    return torch.from_numpy(array.T @ array)
