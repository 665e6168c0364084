"""Sums over tokens of several encoders' features of the same places: covariances and CKA without keeping a feature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class TokenSums:
    """Of several feature sets side by side, float64 and on the CPU: memory does not depend on the number of images.

    Attributes:
        widths: channels of each set.
        tokens: how many were counted.
        total: sum of the tokens, (all channels,).
        products: sum of their outer products, (all channels, all channels).
    """

    widths: tuple[int, ...]
    tokens: int
    total: Tensor
    products: Tensor

    @classmethod
    def empty(cls, *widths: int) -> TokenSums:
        width = sum(widths)
        return cls(widths, 0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64))

    def add(self, maps: Sequence[Tensor]) -> None:
        """Count the tokens of one map (B, C, h, w) per set, of the same images."""
        rows = torch.cat(list(maps), 1).permute(0, 2, 3, 1).flatten(0, 2).double().cpu()
        self.tokens += len(rows)
        self.total += rows.sum(0)
        self.products += rows.T @ rows

    @property
    def mean(self) -> Tensor:
        return self.total / self.tokens

    def covariance(self, mean: Tensor | None = None) -> list[list[Tensor]]:
        """The blocks (set, set) of the covariance about a mean, the tokens' own by default."""
        own = self.mean
        mean = own if mean is None else mean
        full = self.products / self.tokens - torch.outer(own, own) + torch.outer(own - mean, own - mean)
        return [list(rows.split(self.widths, 1)) for rows in full.split(self.widths)]


def cka(xx: Tensor, zx: Tensor, zz: Tensor) -> float:
    """Linear centred kernel alignment (Kornblith et al., arXiv 1905.00414) from covariances; NaN where one is zero.

    Args:
        xx, zz: of either set of features, (C, C) and (D, D).
        zx: between them, (D, C).

    Example:
        >>> eye = torch.eye(2)
        >>> round(cka(eye, eye, eye), 6)
        1.0
    """
    size = float(torch.linalg.norm(xx) * torch.linalg.norm(zz))
    return float(torch.linalg.norm(zx)) ** 2 / size if size > 0 else float("nan")
