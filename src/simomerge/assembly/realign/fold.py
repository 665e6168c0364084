"""Fold: re-alignment in closed form, from unlabelled images, without adding a parameter.

What the merged encoder gives a head differs from what its own expert's encoder gave it, mostly by a linear map. A
ridge regression from merged to expert features, shrunk towards the identity, finds it; being linear, it disappears
into the head's first layer. With W the weights of that layer, x a token's merged features and z those of the expert::

    argmin_A  sum_n || z[n] - A x[n] - b ||^2 + ridge || A - I ||^2,   then  W <- W A,  c <- c + W b

Ridge regression is linear in its targets, so the same W A comes from regressing what the layer itself computes, with
W' - W penalised, which is what is done here: O outputs instead of C channels. docs/fold.md has the derivation.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from simomerge.assembly.realign.fold_systems import Part, Solver, System, moved, tokens
from simomerge.assembly.realign.normal_equations import NormalEquations
from simomerge.assembly.realign.record import after
from simomerge.assembly.realign.teacher import check_heads, evaluating, matching_experts, observe
from simomerge.core import distributed
from simomerge.core.errors import InputError
from simomerge.core.machine import autocast
from simomerge.datasets.pictures import as_images
from simomerge.models.encoders import Features
from simomerge.models.heads.projections import Moments, Projection, input_projections, joined
from simomerge.models.model import SimoModel

Variant = Literal["per-tap", "cross-tap"]
VARIANTS: tuple[Variant, ...] = ("per-tap", "cross-tap")

RIDGES: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, math.inf)
"""Ridges that ``ridge="auto"`` tries, in units of the mean diagonal of the Gram matrix. Infinity leaves the head."""

HELD_OUT = 4
"""Every fourth image is held out to choose the ridge; it takes part in the final solution."""

FALLBACK_RIDGE = 1e-1
"""Where no image is left to hold out."""


@dataclass(frozen=True)
class Fit:
    """How well a fold repairs one task, on images that its maps were not solved on.

    Both are the mean over the regressions of the task: per tap one for each tap of a projection, cross tap one for each
    projection.

    Attributes:
        ridge: the one chosen, in units of the mean diagonal of the Gram matrix.
        r2: R^2 of what the head's first layer computes, against the expert's, after the fold; 1 is the expert.
        r2_before: the same before the fold; negative where merged features are worse than a constant.
    """

    ridge: float
    r2: float
    r2_before: float


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
        self.sums = self._empty_sums()  # system -> [solved on, held out]
        self._first: Tensor | None = None
        self.all_alike = True  # whether every image so far gave the features of the first

    def _parts(self) -> list[Part]:
        parts: list[Part] = []
        widths: dict[System, int] = {}
        for task, projections in self.projections.items():
            for index, projection in enumerate(projections):
                for piece in projection.split() if self.variant == "per-tap" else [projection]:
                    system = self._system(task, piece)
                    first = widths.get(system, 0)
                    widths[system] = first + len(piece.bias)
                    parts.append(Part(task, index, piece, system, slice(first, widths[system])))
        return parts

    def _system(self, task: str, piece: Projection) -> System:
        if self.variant == "per-tap":
            return System(tuple(sorted(piece.maps)), tuple(sorted(piece.cls)), piece.grid)
        head: Any = self.model.heads[task]
        taps = tuple(range(len(self.model.encoder.channels))) if getattr(head, "widens", False) else piece.taps
        # Taps of one stride have one grid: then all projections share one system, and its equations.
        strides = self.model.encoder.strides
        return System(taps, taps if piece.cls else (), strides.index(strides[piece.grid]))

    def _empty_sums(self) -> dict[System, list[NormalEquations]]:
        device = next(self.model.parameters()).device
        device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        outputs: dict[System, int] = {}
        for part in self.parts:
            outputs[part.system] = part.columns.stop
        channels = self.model.encoder.channels
        return {
            system: [NormalEquations.empty(sum(system.widths(channels)), width, device) for _ in range(2)]
            for system, width in outputs.items()
        }

    def targets(self, experts: Mapping[str, Features]) -> list[Tensor]:
        """What each part should give: computed from the expert's features, (B, n, O) per part."""
        return [tokens(part.projection(experts[part.task])) for part in self.parts]

    def add(self, features: Features, targets: Sequence[Tensor], indices: Sequence[int]) -> None:
        """Count a batch of images.

        Args:
            features: the merged encoder's.
            targets: of `targets`, in the same order.
            indices: of the images; they decide which are held out.
        """
        held_out = torch.tensor([index % HELD_OUT == HELD_OUT - 1 for index in indices])
        self._compare(features.maps[0])
        by_system: dict[System, list[tuple[Part, Tensor]]] = {}
        for part, target in zip(self.parts, targets, strict=True):
            by_system.setdefault(part.system, []).append((part, target))
        for system, members in by_system.items():
            patches, cls = system.inputs(features)
            target = torch.cat([value for _, value in members], 2)
            residual = target - torch.cat([tokens(part.projection(features)) for part, _ in members], 2)
            for sums, chosen in zip(self.sums[system], (~held_out, held_out), strict=True):
                if chosen.any():
                    sums.add(patches[chosen], cls[chosen], residual[chosen], target[chosen])

    def _compare(self, maps: Tensor) -> None:
        means = maps.float().mean((2, 3))
        self._first = means[0] if self._first is None else self._first
        self.all_alike = self.all_alike and torch.allclose(means, self._first.expand_as(means), rtol=1e-4, atol=1e-6)

    def gather(self) -> None:
        """Add up the sums of all processes, where there are several; each then goes on with the same totals."""
        if distributed.processes() < 2:
            return
        for pair in self.sums.values():
            for sums in pair:
                counts = torch.tensor([sums.tokens, sums.images], dtype=torch.float64, device=sums.x.device)
                distributed.add_up(counts, sums.x, sums.xx, sums.r, sums.rr, sums.xr, sums.u, sums.uu)
                sums.tokens, sums.images = counts.tolist()
        self.all_alike = False  # this process knows its own images only

    @property
    def images(self) -> int:
        """How many images were counted."""
        return int(sum(sums.images for sums in next(iter(self.sums.values()))))

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
        check_ridge(ridge)
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
        solvers = {system: Solver(pair[0], system, self.model.encoder.channels) for system, pair in self.sums.items()}
        judges = {system: solver.seen(self.sums[system][1]) for system, solver in solvers.items()}
        r2 = {ridge: self._held_out_r2(ridge, solvers, judges) for ridge in {*ridges, math.inf}}
        chosen = {task: max(ridges, key=lambda ridge: r2[ridge][task]) for task in self.projections}
        fits = {task: Fit(ridge, r2[ridge][task], r2[math.inf][task]) for task, ridge in chosen.items()}
        return chosen, fits

    def _held_out_r2(
        self, ridge: float, solvers: Mapping[System, Solver], judges: Mapping[System, NormalEquations]
    ) -> dict[str, float]:
        """R^2 per task, the mean over its parts."""
        found: dict[str, list[float]] = {task: [] for task in self.projections}
        for system, solver in solvers.items():
            weights, bias = solver.solve(ridge)
            error, spread = judges[system].error(weights, bias), judges[system].spread()
            for part in self.parts:
                if part.system == system:
                    total = float(spread[part.columns].sum())
                    left = float(error[part.columns].sum())
                    found[part.task].append(1 - left / total if total > 0 else (1.0 if left == 0 else -math.inf))
        return {task: sum(values) / len(values) for task, values in found.items()}

    def _solve_all(self, ridges: Mapping[str, float]) -> list[Projection]:
        """The new projection of every part, from all images."""
        solvers = {
            system: Solver(train + held_out, system, self.model.encoder.channels)
            for system, (train, held_out) in self.sums.items()
        }
        solutions: dict[Any, tuple[Tensor, Tensor]] = {}
        solved = []
        for part in self.parts:
            key = (part.system, ridges[part.task])
            if key not in solutions:
                weights, bias = solvers[part.system].solve(ridges[part.task])
                solutions[key] = solvers[part.system].expanded(weights), bias
            weights, bias = solutions[key]
            solved.append(moved(part, weights[part.columns], bias[part.columns], self.model.encoder.channels))
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
        for system, (train, held_out) in self.sums.items():
            total = train + held_out
            widths = system.widths(self.model.encoder.channels)
            pieces = list(zip(total.mean.split(widths), total.variance.split(widths), strict=True))
            maps |= dict(zip(system.maps, pieces, strict=False))
            cls |= dict(zip(system.cls, pieces[len(system.maps) :], strict=True))
        return Moments(maps, cls)


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
    """A model that shares the encoder, with folded heads; how well each fits; and the sums it was solved from."""
    fold = Fold(model, variant)
    device = next(model.parameters()).device
    for batch in seen:
        with evaluating(model), autocast(device):
            features = model.encode(batch.images)
        fold.add(features, batch.targets, batch.indices)
    fold.gather()
    heads, fits = fold.solve(ridge)
    return SimoModel(model.encoder, model.tasks, heads, dict(model.provenance)), fits, fold


def see(
    model: SimoModel,
    experts: Mapping[str, SimoModel],
    images: Any,
    variant: Variant = "per-tap",
    batch_size: int = 32,
) -> Iterator[Seen]:
    """What `fold_heads` reads, computed by the experts batch after batch; a list of it serves several merges.

    Args:
        model: any merge of the experts, whose heads are still theirs.
    """
    fold = Fold(model, variant)
    for batch in observe(experts, images, batch_size, "fold", True):
        yield Seen(batch.indices, batch.images, fold.targets(batch.features))


def realign_fold(
    model: SimoModel,
    experts: Mapping[str, SimoModel],
    images: Any,
    variant: Variant = "per-tap",
    count: int | None = None,
    ridge: float | Literal["auto"] = "auto",
    batch_size: int = 32,
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
    check_ridge(ridge)
    experts = matching_experts(model, experts)
    check_heads(model, experts)
    source = as_images(images, count)
    batches = see(model, experts, source, variant, batch_size)
    result, fits, fold = fold_heads(model, batches, variant, ridge)
    _warn_if_poor(fold)
    result = SimoModel(copy.deepcopy(model.encoder), model.tasks, dict(result.heads.items())).eval()
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
                "seconds": round(time.monotonic() - began, 2),
                "ridge": {task: fit.ridge if math.isfinite(fit.ridge) else "none" for task, fit in fits.items()},
                "r2_before": {task: _rounded(fit.r2_before) for task, fit in fits.items()},
                "r2": {task: _rounded(fit.r2) for task, fit in fits.items()},
            },
        ),
    }
    return result


def check_ridge(ridge: Any) -> None:
    """Raises InputError where a ridge is neither "auto" nor a number of at least 0."""
    if ridge != "auto" and not (isinstance(ridge, (int, float)) and ridge >= 0):
        raise InputError(f"ridge {ridge!r}: use a number of at least 0, or 'auto'.")


def _rounded(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _warn_if_poor(fold: Fold) -> None:
    if all((train + held_out).unit == 0 for train, held_out in fold.sums.values()):
        warnings.warn("all images give the same features: only the heads' biases were folded.", stacklevel=3)
        return
    if any(held_out.images == 0 for _, held_out in fold.sums.values()):
        warnings.warn(
            f"too few images ({fold.images}) to hold one out: a ridge of {FALLBACK_RIDGE:g} was taken, and how well the"
            f" fold fits is not known; give at least {HELD_OUT}.",
            stacklevel=3,
        )
        return
    if fold.images > 1 and fold.all_alike:
        warnings.warn(
            f"all {fold.images} images give the same features: the fold knows no more than from one; give images of"
            " what the model will see.",
            stacklevel=3,
        )
        return
    widest = max((train + held_out for train, held_out in fold.sums.values()), key=lambda total: len(total.x))
    if widest.tokens < len(widest.x):
        warnings.warn(
            f"{fold.images} images give {int(widest.tokens)} tokens for a map of {len(widest.x)} inputs: the fold stays"
            " close to the unfolded head; give more images.",
            stacklevel=3,
        )
