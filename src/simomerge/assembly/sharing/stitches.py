"""Stitches: affine maps, in closed form, from the hidden states of shared blocks to those of the experts of a branch.

Where a group of tasks splits after a block, let x be a token that the shared blocks give and z the token that an expert
of the branch has there. The stitch of the branch is::

    argmin_{A, b}  sum_n sum_t || z_t[n] - A x[n] - b ||^2 + ridge || A - I ||^2

With several experts the mean of their tokens gives the same map, so the code regresses on the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from simomerge.assembly.realign.blocks import call_of
from simomerge.assembly.realign.normal_equations import NormalEquations
from simomerge.assembly.realign.sums import FALLBACK_RIDGE, RIDGES
from simomerge.assembly.realign.systems import tokens
from simomerge.core import distributed
from simomerge.core.caution import warn
from simomerge.core.errors import InputError
from simomerge.core.machine import autocast
from simomerge.core.modes import evaluating
from simomerge.core.progress import progress
from simomerge.datasets.groups import SHARE, held_out
from simomerge.datasets.pictures import image_batches
from simomerge.merging.tree import Group
from simomerge.models.encoders import TreeEncoder
from simomerge.models.model import SimoModel


@dataclass(frozen=True)
class StitchFit:
    """A fitted stitch.

    Attributes:
        weight, bias: (C, C) and (C,), float64.
        ridge: The chosen ridge, in units of the mean diagonal of the Gram matrix.
        r2: R^2 of the stitched tokens as a prediction of the experts', on held-out images; NaN without any.
        r2_before: The same without the stitch.
        shortcoming: Why the images do not suffice, as a sentence; empty if they do.
    """

    weight: Tensor
    bias: Tensor
    ridge: float
    r2: float
    r2_before: float
    shortcoming: str = ""


Known = dict[tuple[tuple[Group, int], ...], StitchFit]
"""Stitches by their path: the groups from the first block to the branch, with the last block of each."""


KEPT_BYTES = 1 << 30
"""Memory for the experts' tokens that `ExpertTokens` keeps, on the device that computes them."""


class ExpertTokens:
    """Keeps the experts' tokens before a block, for several trees that are fitted to the same images.

    Args:
        limit: Bytes that are kept; what is more is computed when it is needed.
    """

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self.limit, self._kept = limit, dict[tuple[str, int, int], Tensor]()

    def get(self, key: tuple[str, int, int], compute: Callable[[], Tensor]) -> Tensor:
        """The tokens of a task's expert before a block, (B, n, C) float32, for the batch that begins at an image."""
        if key not in self._kept:
            found = compute()
            if sum(tokens.nbytes for tokens in self._kept.values()) + found.nbytes > self.limit:
                return found
            self._kept[key] = found
        return self._kept[key]


@torch.no_grad()
def fit_stitches(
    model: SimoModel,
    experts: Mapping[str, SimoModel],
    images: Any,
    known: Known | None = None,
    hold_out: bool = False,
    batch_size: int = 32,
    kept: ExpertTokens | None = None,
) -> dict[str, StitchFit]:
    """Fit all stitches of a model whose encoder is a tree, in place, from the first blocks to the last.

    Args:
        model: With a `TreeEncoder`. The weights of its blocks stay as they are.
        experts: By task.
        images: As `simomerge.datasets.pictures.as_images` gives them, without labels.
        known: Stitches that an earlier call found for the same images. They are used again, and new ones are added,
            unless own blocks have low rank: their shared weights depend on the whole tree.
        hold_out: Leave the held-out images out of the solution, and not only out of the choice of the ridge.
        kept: Tokens of the experts that earlier calls have computed for the same images and batch size.

    Returns:
        The fits by the name of their node.

    Warns:
        UserWarning: There are too few images for a stitch, which therefore stays near the identity.
    """
    encoder: Any = model.encoder
    tree, found = encoder.tree, dict[str, StitchFit]()
    known = {} if known is None or encoder.rank is not None else known
    for block in sorted({node.first for node in tree.nodes if node.parent is not None}):
        places = [place for place, node in enumerate(tree.nodes) if node.first == block and node.parent is not None]
        keys = {place: path_key(encoder, place) for place in places}
        missing = [place for place in places if keys[place] not in known]
        if missing:
            sums = _sums(model, experts, images, missing, batch_size, kept or ExpertTokens(limit=0))
            known |= {keys[place]: _solved(sums[place], hold_out) for place in missing}
        for place in places:
            fit = found[tree.nodes[place].name] = known[keys[place]]
            stitch = encoder.nodes[place][0].stitch
            stitch.weight.copy_(fit.weight)
            stitch.bias.copy_(fit.bias)
    if short := next((fit.shortcoming for fit in found.values() if fit.shortcoming), ""):
        warn(short)
    return found


def path_key(encoder: TreeEncoder, place: int) -> tuple[tuple[Group, int], ...]:
    """What determines the hidden states that reach a node, and its stitch."""
    steps = [encoder.tree.nodes[step] for step in encoder.tree.path(place)]
    return (*((node.tasks, node.last) for node in steps[:-1]), (steps[-1].tasks, 0))


def _sums(
    model: SimoModel,
    experts: Mapping[str, SimoModel],
    images: Any,
    places: Sequence[int],
    batch_size: int,
    kept: ExpertTokens,
) -> dict[int, list[NormalEquations]]:
    """For each of these nodes, which start at one block, the sums of its regression: [solved on, held out]."""
    encoder: Any = model.encoder
    nodes = {place: encoder.tree.nodes[place] for place in places}
    width = {place: encoder.nodes[place][0].stitch.in_features for place in places}
    device = next(model.parameters()).device
    where = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    sums = {place: [NormalEquations.empty(width[place], width[place], where) for _ in range(2)] for place in places}
    needed = {task: experts[task] for node in nodes.values() for task in node.tasks}
    block, done, out = next(iter(nodes.values())).first, 0, set(held_out(images))
    batches = image_batches(images, batch_size, start=distributed.rank(), step=distributed.processes())
    for indices, batch in batches:
        batch, judged = model.fit(batch.to(device)), torch.tensor([index in out for index in indices])
        with evaluating(model, *needed.values()), autocast(device):
            wanted = {
                task: kept.get((task, block, indices[0]), partial(_tokens_before, expert, block, batch))
                for task, expert in needed.items()
            }
            given = {
                parent: _rows(call_of(encoder.nodes[place][0], partial(model.encode, batch, nodes[place].tasks)).hidden)
                for parent, place in {nodes[place].parent: place for place in places}.items()
            }
        for place, node in nodes.items():
            x, z = given[node.parent], torch.stack([wanted[task] for task in node.tasks]).mean(0)
            for part, chosen in zip(sums[place], (~judged, judged), strict=True):
                if chosen.any():
                    part.add(x[chosen], x.new_zeros(int(chosen.sum()), 0), (z - x)[chosen], z[chosen])
        done += len(indices)
        progress(f"stitches at block {block}", min(done * distributed.processes(), len(images)), len(images), "")
    for pair in sums.values():
        for part in pair:
            part.gather()
    return sums


def _tokens_before(expert: SimoModel, block: int, batch: Tensor) -> Tensor:
    return _rows(call_of(expert.encoder.layout.units[block - 1], partial(expert.encode, batch)).hidden)


def _rows(hidden: Tensor) -> Tensor:
    """Tokens (B, N, C) or maps (B, C, h, w) -> float32 tokens (B, n, C)."""
    return (tokens(hidden) if hidden.ndim == 4 else hidden).float()


def _solved(sums: Sequence[NormalEquations], hold_out: bool) -> StitchFit:
    """The stitch with the ridge that fits the held-out images best, from the other images or from all."""
    train, judged = sums
    total = train if hold_out else train + judged
    if not torch.isfinite(total.xx).all() or not torch.isfinite(total.rr).all():
        raise InputError("a stitch has features that are not finite; a model or an image is damaged.")
    penalties = torch.ones_like(total.x)
    identity = (torch.zeros_like(total.xr.T), torch.zeros_like(total.r))

    def solution(sums: NormalEquations, ridge: float) -> tuple[Tensor, Tensor]:
        return identity if math.isinf(ridge) else sums.solve(ridge, penalties)

    chosen, r2, before = FALLBACK_RIDGE, math.nan, math.nan
    if train.images and judged.images:
        spread = float(judged.spread().sum())
        errors = {ridge: float(judged.error(*solution(train, ridge)).sum()) for ridge in RIDGES}
        chosen = min(RIDGES, key=lambda ridge: (errors[ridge], -ridge))
        r2, before = ((1 - errors[ridge] / spread if spread else math.nan) for ridge in (chosen, math.inf))
    weight, bias = solution(total, chosen)
    eye = torch.eye(len(total.x), dtype=weight.dtype, device=weight.device)
    return StitchFit(weight + eye, bias, chosen, r2, before, _shortcoming(train + judged, judged))


def _shortcoming(total: NormalEquations, judged: NormalEquations) -> str:
    if not judged.images:
        return (
            f"too few images ({int(total.images)}) to hold one out: the stitches use a ridge of {FALLBACK_RIDGE:g} and"
            f" stay near the identity; give at least {round(1 / SHARE)}."
        )
    if total.tokens < len(total.x):
        return (
            f"{int(total.images)} images give {int(total.tokens)} tokens for a stitch of {len(total.x)} channels: it"
            " stays near the identity; give more images."
        )
    return ""
