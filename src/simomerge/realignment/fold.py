"""Fold: re-alignment in closed form, from unlabelled images, without adding a parameter.

What the merged encoder gives a head differs from what its own expert's encoder gave it, mostly by a linear map. A
ridge regression from merged to expert features, shrunk towards the identity, finds it; being linear, it disappears
into the head's first layer. With W the weights of that layer, x a token's merged features and z those of the expert::

    argmin_A  sum_n || z[n] - A x[n] - b ||^2 + ridge || A - I ||^2,   then  W <- W A,  c <- c + W b

Ridge regression is linear in its targets, so the same W A comes from regressing what the layer itself computes, with
W' - W penalised, which is what is done here: O outputs instead of C channels. docs/fold.md has the derivation.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from simomerge.datasets.pictures import as_images
from simomerge.devices import autocast
from simomerge.encoders import Features
from simomerge.errors import InputError
from simomerge.heads.projections import Moments, Projection, input_projections, joined
from simomerge.heads.resize import resize
from simomerge.model import SimoModel
from simomerge.progress import Progress, silent
from simomerge.realignment.experts import check_heads, matching_experts, observe
from simomerge.realignment.normal_equations import NormalEquations
from simomerge.realignment.record import after

Variant = Literal["per-tap", "cross-tap"]
VARIANTS: tuple[Variant, ...] = ("per-tap", "cross-tap")

RIDGES: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, math.inf)
"""Ridges that ``ridge="auto"`` tries, in units of the mean diagonal of the Gram matrix. Infinity leaves the head."""

HELD_OUT = 4
"""Every fourth image is held out to choose the ridge; it takes part in the final solution."""

FALLBACK_RIDGE = 1e-1
"""Of a single image, which leaves none to hold out."""


@dataclass(frozen=True)
class Fit:
    """How well a fold repairs one task, on images that its maps were not solved on.

    Attributes:
        ridge: the one chosen, in units of the mean diagonal of the Gram matrix.
        r2: R^2 of what the head's first layer computes, against the expert's, after the fold; 1 is the expert.
        r2_before: the same before the fold; negative where merged features are worse than a constant.
    """

    ridge: float
    r2: float
    r2_before: float


@dataclass(frozen=True)
class _Part:
    """One regression target: a projection of one head, or one tap's part of it."""

    task: str
    index: int
    projection: Projection  # as the head has it, possibly widened with zeros
    system: tuple[tuple[int, ...], bool, int]  # the inputs: taps, whether their CLS tokens too, the grid
    columns: slice  # of the system's outputs


class Fold:
    """The fold of all heads of one merged model: count images with `add`, then `solve`.

    Args:
        model: the merged model; it stays as it is.
        variant: "per-tap" (each tap repaired from the same tap) or "cross-tap" (from all taps).

    Raises:
        InputError: a head without declared projections, or an unknown variant.
    """

    def __init__(self, model: SimoModel, variant: Variant = "per-tap") -> None:
        if variant not in VARIANTS:
            raise InputError(f"fold variant {variant!r}: use one of {', '.join(VARIANTS)}.")
        self.model = model
        self.variant = variant
        self.projections = {name: input_projections(head, name) for name, head in model.heads.items()}
        self.parts = self._parts()
        self.sums: dict[Any, list[NormalEquations]] = {}  # system -> [solved on, held out]

    def _parts(self) -> list[_Part]:
        parts: list[_Part] = []
        widths: dict[Any, int] = {}
        for task, projections in self.projections.items():
            for index, projection in enumerate(projections):
                for piece in self._pieces(projection):
                    system = (tuple(sorted(piece.maps)), bool(piece.cls), piece.grid)
                    first = widths.get(system, 0)
                    widths[system] = first + len(piece.bias)
                    parts.append(_Part(task, index, piece, system, slice(first, widths[system])))
        return parts

    def _pieces(self, projection: Projection) -> list[Projection]:
        if self.variant == "per-tap":
            return projection.split()
        return [projection.widened(self.model.encoder.channels)]

    def targets(self, experts: Mapping[str, Features]) -> list[Tensor]:
        """What each part should give: computed from the expert's features, (B, n, O) per part."""
        return [_tokens(part.projection(experts[part.task])) for part in self.parts]

    def add(self, features: Features, targets: Sequence[Tensor], indices: Sequence[int]) -> None:
        """Count a batch of images.

        Args:
            features: the merged encoder's.
            targets: of `targets`, in the same order.
            indices: of the images; they decide which are held out.
        """
        held_out = torch.tensor([index % HELD_OUT == HELD_OUT - 1 for index in indices])
        by_system: dict[Any, list[tuple[_Part, Tensor]]] = {}
        for part, target in zip(self.parts, targets, strict=True):
            by_system.setdefault(part.system, []).append((part, target))
        for system, members in by_system.items():
            patches, cls = _inputs(features, system)
            target = torch.cat([value for _, value in members], 2)
            residual = target - torch.cat([_tokens(part.projection(features)) for part, _ in members], 2)
            if system not in self.sums:
                width = patches.shape[2] + cls.shape[1]
                device = "cpu" if patches.device.type == "mps" else patches.device  # which has no float64
                self.sums[system] = [NormalEquations.empty(width, target.shape[2], device) for _ in range(2)]
            for sums, chosen in zip(self.sums[system], (~held_out, held_out), strict=True):
                if chosen.any():
                    sums.add(patches[chosen], cls[chosen], residual[chosen], target[chosen])

    def gather(self) -> None:
        """Add up the sums of all processes, where there are several; each then goes on with the same totals."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        from accelerate.utils import reduce

        for pair in self.sums.values():
            for sums in pair:
                device = sums.x.device
                counts = torch.tensor([sums.tokens, sums.images], dtype=torch.float64, device=device)
                sums.tokens, sums.images = reduce(counts, "sum").tolist()
                for name in ("x", "xx", "r", "rr", "xr", "u", "uu"):
                    setattr(sums, name, reduce(getattr(sums, name), "sum"))

    @property
    def images(self) -> int:
        """How many images were counted."""
        return int(sum(sums.images for sums in next(iter(self.sums.values())))) if self.sums else 0

    def solve(self, ridge: float | Literal["auto"] = "auto") -> tuple[dict[str, nn.Module], dict[str, Fit]]:
        """The folded heads, new ones, and how well each fits.

        Args:
            ridge: in units of the mean diagonal of the Gram matrix; "auto" takes, for each head, the one of `RIDGES`
                that does best on the held-out images.

        Raises:
            InputError: no images, or features that are not finite.
        """
        if not self.images:
            raise InputError("the fold has seen no image; give at least one.")
        if not all(torch.isfinite(sums.xx).all() and torch.isfinite(sums.rr).all() for sums in self._all()):
            raise InputError("the fold met features that are not finite; a model or an image is damaged.")
        if ridge != "auto" and not ridge >= 0:
            raise InputError(f"ridge {ridge}: use a number of at least 0, or 'auto'.")
        chosen, fits = self._choose(RIDGES if ridge == "auto" else (float(ridge),))
        solved = self._solve_all(chosen)
        heads = {task: self._head(task, solved) for task in self.projections}
        return heads, fits

    def _all(self) -> Iterator[NormalEquations]:
        return (sums for pair in self.sums.values() for sums in pair)

    def _choose(self, ridges: Sequence[float]) -> tuple[dict[str, float], dict[str, Fit]]:
        """For each task the ridge of the best held-out fit."""
        if any(sums.images == 0 for sums in self._all()):
            given = ridges[0] if len(ridges) == 1 else FALLBACK_RIDGE
            return dict.fromkeys(self.projections, given), dict.fromkeys(
                self.projections, Fit(given, math.nan, math.nan)
            )
        r2 = {ridge: self._held_out_r2(ridge) for ridge in {*ridges, math.inf}}
        chosen = {task: max(ridges, key=lambda ridge: r2[ridge][task]) for task in self.projections}
        fits = {task: Fit(ridge, r2[ridge][task], r2[math.inf][task]) for task, ridge in chosen.items()}
        return chosen, fits

    def _held_out_r2(self, ridge: float) -> dict[str, float]:
        """R^2 per task, the mean over its parts."""
        found: dict[str, list[float]] = {task: [] for task in self.projections}
        for system, (train, held_out) in self.sums.items():
            weights, bias = _solution(train, ridge, system, self.model)
            error, spread = held_out.error(weights, bias), held_out.spread()
            for part in self.parts:
                if part.system == system:
                    total = float(spread[part.columns].sum())
                    left = float(error[part.columns].sum())
                    found[part.task].append(1 - left / total if total > 0 else (1.0 if left == 0 else -math.inf))
        return {task: sum(values) / len(values) for task, values in found.items()}

    def _solve_all(self, ridges: Mapping[str, float]) -> list[Projection]:
        """The new projection of every part, from all images."""
        totals = {system: train + held_out for system, (train, held_out) in self.sums.items()}
        solutions: dict[Any, tuple[Tensor, Tensor]] = {}
        solved = []
        for part in self.parts:
            key = (part.system, ridges[part.task])
            if key not in solutions:
                solutions[key] = _solution(totals[part.system], ridges[part.task], part.system, self.model)
            weights, bias = solutions[key]
            solved.append(_moved(part, weights[part.columns], bias[part.columns], self.model.encoder.channels))
        return solved

    def _head(self, task: str, solved: Sequence[Projection]) -> nn.Module:
        projections = []
        for index in range(len(self.projections[task])):
            pieces = [
                projection
                for part, projection in zip(self.parts, solved, strict=True)
                if (part.task, part.index) == (task, index)
            ]
            projections.append(joined(pieces))
        head: Any = self.model.heads[task]
        return head.with_projections(projections, self._moments()).eval()

    def _moments(self) -> Moments:
        maps: dict[int, tuple[Tensor, Tensor]] = {}
        cls: dict[int, tuple[Tensor, Tensor]] = {}
        for (taps, has_cls, _grid), (train, held_out) in self.sums.items():
            total = train + held_out
            widths = _widths([self.model.encoder.channels[tap] for tap in taps], has_cls)
            pieces = zip(total.mean.split(widths), total.variance.split(widths), strict=True)
            for position, piece in enumerate(pieces):
                (maps if position < len(taps) else cls)[taps[position % len(taps)]] = piece
        return Moments(maps, cls)


def _widths(widths: Sequence[int], has_cls: bool) -> list[int]:
    return [*widths, *(widths if has_cls else ())]


def _tokens(maps: Tensor) -> Tensor:
    """(B, C, h, w) to (B, n, C)."""
    return maps.flatten(2).transpose(1, 2)


def _inputs(features: Features, system: tuple[tuple[int, ...], bool, int]) -> tuple[Tensor, Tensor]:
    """The patches (B, n, D_z) and CLS tokens (B, D_c) that a system reads."""
    taps, has_cls, grid = system
    size = (features.maps[grid].shape[-2], features.maps[grid].shape[-1])
    patches = torch.cat([_tokens(resize(features.maps[tap].float(), size)) for tap in taps], 2)
    cls = torch.cat([features.cls[tap].float() for tap in taps], 1) if has_cls else patches.new_zeros(len(patches), 0)
    return patches, cls


def _solution(
    sums: NormalEquations, ridge: float, system: tuple[tuple[int, ...], bool, int], model: SimoModel
) -> tuple[Tensor, Tensor]:
    """Weights and biases to add to the heads'; none for an infinite ridge."""
    if math.isinf(ridge):
        return torch.zeros_like(sums.xr.T), torch.zeros_like(sums.r)
    # An image gives one CLS token but n patches: what n equal rows seem to prove about it is one observation.
    patches = sum(model.encoder.channels[tap] for tap in system[0])
    penalties = torch.ones_like(sums.x)
    penalties[patches:] = sums.tokens / max(sums.images, 1.0)
    return sums.solve(ridge, penalties)


def _moved(part: _Part, weights: Tensor, bias: Tensor, channels: Sequence[int]) -> Projection:
    """The part's projection with a solution added."""
    old = part.projection
    taps, has_cls, _ = part.system
    pieces = weights.split(_widths([channels[tap] for tap in taps], has_cls), 1)
    maps = {tap: (old.maps[tap].double() + piece).to(old.bias) for tap, piece in zip(taps, pieces, strict=False)}
    cls = {
        tap: (old.cls[tap].double() + piece).to(old.bias) for tap, piece in zip(taps, pieces[len(taps) :], strict=False)
    }
    return Projection(maps, cls, (old.bias.double() + bias).to(old.bias), old.grid)


@dataclass(frozen=True)
class Seen:
    """A batch of images with what the experts' first layers make of them (`Fold.targets`)."""

    indices: list[int]
    images: Tensor
    targets: list[Tensor]


@torch.no_grad()
def fold_heads(
    model: SimoModel, seen: Iterable[Seen], variant: Variant = "per-tap", ridge: float | Literal["auto"] = "auto"
) -> tuple[SimoModel, dict[str, Fit], Fold]:
    """A model of the same encoder with folded heads, how well each fits, and the sums it was solved from."""
    fold = Fold(model, variant)
    device = next(model.parameters()).device
    model.eval()
    for batch in seen:
        with autocast(device):
            features = model.encode(batch.images)
        fold.add(features, batch.targets, batch.indices)
    fold.gather()
    heads, fits = fold.solve(ridge)
    return SimoModel(model.encoder, model.tasks, heads, model.provenance).eval(), fits, fold


def see(
    model: SimoModel,
    experts: Mapping[str, SimoModel],
    images: Any,
    variant: Variant = "per-tap",
    batch_size: int = 32,
    progress: Progress = silent,
) -> Iterator[Seen]:
    """What `fold_heads` reads, computed by the experts batch after batch; a list of it serves several merges.

    Args:
        model: any merge of the experts, whose heads are still theirs.
    """
    fold = Fold(model, variant)
    for batch in observe(experts, images, batch_size, "fold", progress):
        yield Seen(batch.indices, batch.images, fold.targets(batch.features))


def realign_fold(
    model: SimoModel,
    experts: Mapping[str, SimoModel],
    images: Any,
    variant: Variant = "per-tap",
    count: int | None = None,
    ridge: float | Literal["auto"] = "auto",
    batch_size: int = 32,
    progress: Progress = silent,
) -> SimoModel:
    """Fold the linear part of the mismatch between merged features and heads into the heads, from unlabelled images.

    One pass: every image goes through the merged encoder and each expert's; what is kept are sums, whose size depends
    on the encoder's width alone. Under torchrun each process takes its share of the images.

    Args:
        model: a merged model whose heads are still the experts'; it stays as it is. Adapters may be in its encoder.
        experts: by task, those it was merged from.
        images: a folder of pictures, a sequence of images, or a dataset (its labels are not read).
        variant: "per-tap" keeps every shape; "cross-tap" repairs each tap from all of them, by which a DPT head's 1x1
            projections grow to read all taps.
        count: of the images; all by default.
        ridge: strength of the shrinkage towards the identity; "auto" chooses it for each head on every fourth image.

    Returns:
        A new model with the same encoder weights; its provenance has the ridge and the held-out R^2 by task.

    Raises:
        InputError: heads that are not the experts', that declare no projections, or no readable image.

    Warns:
        UserWarning: fewer tokens than the map has inputs, or images that are all alike: the fold then stays near the
            unfolded head.

    Example:
        >>> model = realign_fold(model, experts, "photos/", count=64)     # doctest: +SKIP
    """
    began = time.monotonic()
    experts = matching_experts(model, experts)
    check_heads(model, experts)
    source = as_images(images, count)
    batches = see(model, experts, source, variant, batch_size, progress)
    result, fits, fold = fold_heads(model, batches, variant, ridge)
    _warn_if_poor(fold)
    result.provenance = {
        **model.provenance,
        "realign": after(
            model,
            {
                "method": "fold",
                "variant": variant,
                "unlabelled_images": fold.images,
                "labelled_images": 0,
                "steps": 0,
                "trained_parameters": 0,
                "seconds": time.monotonic() - began,
                "ridge": {task: fit.ridge if math.isfinite(fit.ridge) else "none" for task, fit in fits.items()},
                "r2_before": {task: _rounded(fit.r2_before) for task, fit in fits.items()},
                "r2": {task: _rounded(fit.r2) for task, fit in fits.items()},
            },
        ),
    }
    return result


def _rounded(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _warn_if_poor(fold: Fold) -> None:
    for train, held_out in fold.sums.values():
        total = train + held_out
        if float(total.variance.sum()) < 1e-9 * float(total.mean.square().sum()):
            warnings.warn("all images give the same features: only the heads' biases were folded.", stacklevel=3)
            return
        if total.tokens < len(total.x):
            warnings.warn(
                f"{int(total.images)} images give {int(total.tokens)} tokens for a map of {len(total.x)} inputs: the"
                " fold stays close to the unfolded head; give more images.",
                stacklevel=3,
            )
            return
