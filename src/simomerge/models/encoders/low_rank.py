"""Own blocks as low-rank differences to weights that all branches share.

At a block where the tasks have split into m groups, a linear layer computes for group g::

    y = W x + U_g (V_g x) + b_g

``W`` (out, in) is in memory once; ``U_g`` (out, rank) and ``V_g`` (rank, in) are the group's own. See docs/sharing.md
for the choice of ``W``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simomerge.core.errors import InputError

ROUNDS = 2
"""Rounds over the groups in `shared_and_factors`. With two groups the first one gives the optimum; with more, the
second one still gains something, and further ones little."""


class Factors(nn.Module):
    """A difference ``up @ down`` (out, in) that is added to what a linear layer gives. It starts at zero.

    Args:
        layer: The layer. It gets a forward hook, and keeps the names of its tensors.
        rank: At least 1.
    """

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        weight: Any = layer.weight
        self.down = nn.Parameter(weight.new_zeros(rank, weight.shape[1]))
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        layer.register_forward_hook(self.added)  # a bound method: a deep copy of the layer calls its own copy

    def added(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of the layer."""
        return output + F.linear(F.linear(args[0], self.down), self.up)


def check_rank(rank: Any) -> None:
    """Raise InputError if this cannot be a rank."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        raise InputError(f"the branch rank is {rank!r}: give a whole number of at least 0.")


def low_rank_layers(units: Mapping[str, nn.Module], linear: Sequence[str], rank: int) -> dict[str, list[str]]:
    """The layers of each unit that are stored as low-rank differences: those of which this saves memory.

    Args:
        units: The blocks or stages by their names in the backbone.
        linear: The names of the linear layers in them.
        rank: Of the differences.

    Returns:
        Unit -> the names of its layers in it.

    Raises:
        InputError: A unit has convolutions, or no linear layer.
    """
    found = {}
    for unit, module in units.items():
        own = [name.removeprefix(f"{unit}.") for name in linear if name.startswith(f"{unit}.")]
        parts = module.named_modules(prefix=unit)
        convolution = next((name for name, part in parts if isinstance(part, nn.modules.conv._ConvNd)), "")
        if convolution or not own:
            what = f"{convolution} is a convolution" if convolution else f"{unit} has no linear layer"
            raise InputError(
                f"a branch rank needs blocks whose weights are in linear layers, and {what}: leave the rank out, and"
                " own blocks are stored in full."
            )
        found[unit] = [name for name in own if _saves(module.get_submodule(name).weight, rank)]
    return found


def _saves(weight: Any, rank: int) -> bool:
    return rank * sum(weight.shape) < weight.numel()


def own_parameters(unit: nn.Module, layers: Sequence[str], rank: int) -> int:
    """The number of parameters in a unit that are a branch's own, if these layers are low-rank differences."""
    weights: list[Any] = [unit.get_submodule(name).weight for name in layers]
    shared = sum(weight.numel() for weight in weights)
    return sum(p.numel() for p in unit.parameters()) - shared + rank * sum(sum(weight.shape) for weight in weights)


@torch.no_grad()
def shared_and_factors(weights: Sequence[Tensor], rank: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Shared weights and low-rank differences that are near given weights.

    They minimise ``sum_g || W_g - W - U_g V_g ||^2``, one group after the other. For given differences the best W is
    the mean of all ``W_g - U_g V_g``. With this W put in, the best difference of one group for given others is, by the
    theorem of Eckart and Young, a truncated singular value decomposition::

        U_g V_g = svd_rank( W_g - mean of the other W_h - U_h V_h )

    With two groups this is the optimum. It depends on the order of three or more groups, but little.

    Args:
        weights: ``W_g`` (out, in), one per group, at least two.
        rank: Of the differences; less than the full rank of the weights.

    Returns:
        W in the dtype of the weights; and, for each group, U (out, rank) and V (rank, in).

    Raises:
        InputError: A weight is not finite.

    Example:
        >>> one, other = torch.eye(3), torch.eye(3) + torch.outer(torch.ones(3), torch.tensor([1.0, 2.0, 3.0]))
        >>> shared, factors = shared_and_factors([one, other], rank=1)
        >>> torch.allclose(shared + factors[1][0] @ factors[1][1], other, atol=1e-5)
        True
    """
    device = torch.device("cpu") if weights[0].device.type == "mps" else weights[0].device  # MPS has no float64
    exact = [weight.to(device, torch.float64) for weight in weights]
    if not all(weight.isfinite().all() for weight in exact):
        raise InputError("an own block has weights that are not finite; an expert is damaged.")
    rests, count = list(exact), len(exact)
    for _ in range(ROUNDS if rank else 0):
        for group, weight in enumerate(exact):
            others = sum(rest for other, rest in enumerate(rests) if other != group) / (count - 1)
            up, down = truncated(weight - others, rank)
            rests[group] = weight - up @ down
    shared = (torch.stack(rests).mean(0)).to(weights[0])
    factors = [truncated(weight - shared.to(weight), rank) for weight in exact]
    return shared, [(up.to(shared), down.to(shared)) for up, down in factors]


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The truncated singular value decomposition of a float64 matrix (out, in).

    The singular vectors are the eigenvectors of the smaller Gram matrix, which is several times faster than the
    decomposition itself. Both factors have the square roots of the singular values, so that they are trained and
    rounded alike.

    Returns:
        Two factors (out, rank) and (rank, in), whose product is the nearest matrix of this rank.
    """
    if matrix.shape[0] > matrix.shape[1]:
        down, up = truncated(matrix.T, rank)
        return up.T, down.T
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)[:, :rank]
    rows = vectors.T @ matrix
    roots = rows.norm(dim=1).sqrt()
    return vectors * roots, rows / roots.clamp_min(torch.finfo(rows.dtype).tiny)[:, None]


def errors(wanted: Tensor, shared: Tensor, factors: Factors | None) -> tuple[float, float]:
    """The squared differences of wanted weights from shared ones: without the factors, and with them."""
    difference = wanted.cpu().double() - shared.detach().cpu().double()
    left = difference
    if factors is not None:
        up, down = (each.detach().cpu().double() for each in (factors.up, factors.down))
        left = difference - up @ down
    return float(difference.square().sum()), float(left.square().sum())
