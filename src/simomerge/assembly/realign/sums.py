"""The fold of all heads of a merged model: sums over images, then a solution for each head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simomerge.assembly.realign.agreement import Agreement
from simomerge.assembly.realign.layout import FoldLayout
from simomerge.assembly.realign.normal_equations import NormalEquations
from simomerge.assembly.realign.systems import Solver, System, moved
from simomerge.assembly.realign.teacher import observe
from simomerge.core import distributed
from simomerge.core.errors import InputError
from simomerge.core.machine import autocast
from simomerge.core.modes import evaluating
from simomerge.datasets.groups import SHARE
from simomerge.models.encoders import Features
from simomerge.models.heads.projections import Moments, Projection, joined
from simomerge.models.model import SimoModel

RIDGES: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, math.inf)
"""Ridges that "auto" tries, in units of the mean diagonal of the Gram matrix. Infinity leaves the head unchanged."""

ROUNDING = 1e-3
"""Relative difference of two distances that may come from rounding alone."""

FALLBACK_RIDGE = 1e-1
"""The ridge if there are too few images to hold one out."""


@dataclass(frozen=True)
class Fit:
    """How well a fold corrects one task, measured on held-out images.

    Both R^2 are means over the task's regressions: one per tap of a projection (per tap), or one per projection (cross
    tap).

    Attributes:
        ridge: The chosen ridge, in units of the mean diagonal of the Gram matrix.
        r2: R^2 of the output of the head's first layer as a prediction of the expert's, after the fold. 1 equals the
            expert.
        r2_before: The same before the fold; negative if merged features predict worse than a constant.
    """

    ridge: float
    r2: float
    r2_before: float


@dataclass(frozen=True)
class HeadTargets:
    """A batch of images with the outputs of the experts' first layers (`FoldLayout.targets`).

    Attributes:
        images: Float (B, 3, H, W).
        targets: See `FoldLayout.targets`.
        held_out: Which of the images are held out, bool (B,).
        last: Index of the last of the images.
    """

    images: Tensor
    targets: list[Tensor]
    held_out: Tensor
    last: int = 0


@dataclass(frozen=True)
class Folded:
    """A fold of all heads.

    Attributes:
        model: The model with folded heads; it shares the encoder with the merged model.
        fits: How well each head fits.
        sums: The sums of the regression.
        before, after: By task, the distance of the predictions from the expert's on held-out images, before and after
            a fold on all other images. Empty if it was not measured.
    """

    model: SimoModel
    fits: dict[str, Fit]
    sums: HeadSums
    before: dict[str, float]
    after: dict[str, float]

    @property
    def kept(self) -> list[str]:
        """Tasks whose heads stay as they were, because the fold would move them away from their experts."""
        unchanged = [task for task, fit in self.fits.items() if fit.ridge == math.inf]
        return [task for task in unchanged if self.after and self.after[task] > (1 + ROUNDING) * self.before[task]]


class HeadSums:
    """Sums over images for the fold of all heads: add images with `add`, then `solve`.

    Args:
        layout: The parts and systems of the merged model. The model is not changed.
    """

    def __init__(self, layout: FoldLayout) -> None:
        self.layout = layout
        self.channels = layout.model.encoder.channels
        device = next(layout.model.parameters()).device
        device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        self.equations: dict[System, list[NormalEquations]] = {  # system -> [solved on, held out]
            system: [NormalEquations.empty(sum(system.widths(self.channels)), width, device) for _ in range(2)]
            for system, width in layout.outputs.items()
        }
        self._first: Tensor | None = None
        self.all_alike = True  # whether all images so far have the same features

    def add(self, features: Features, targets: Sequence[Tensor], held_out: Tensor) -> None:
        """Add a batch of images.

        Args:
            features: Features of the merged encoder.
            targets: The result of `FoldLayout.targets` for the same images.
            held_out: Which of the images are held out, bool (B,).
        """
        self._compare(features.of(next(iter(self.layout.projections))).maps[0])
        for system, (target, residual) in self.layout.residuals(features, targets).items():
            patches, cls = system.inputs(features)
            for sums, chosen in zip(self.equations[system], (~held_out, held_out), strict=True):
                if chosen.any():
                    sums.add(patches[chosen], cls[chosen], residual[chosen], target[chosen])

    def _compare(self, maps: Tensor) -> None:
        means = maps.float().mean((2, 3))
        self._first = means[0] if self._first is None else self._first
        self.all_alike = self.all_alike and torch.allclose(means, self._first.expand_as(means), rtol=1e-4, atol=1e-6)

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, to save them."""
        found = {
            f"sums/{index}/{name}": torch.as_tensor(value, dtype=torch.float64)
            for index, sums in enumerate(self._all())
            for name, value in vars(sums).items()
        }
        first = {} if self._first is None else {"first": self._first}
        return {**found, **first, "alike": torch.tensor(self.all_alike)}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `tensors` gave. Raises KeyError or RuntimeError if they belong to other sums."""
        for index, sums in enumerate(self._all()):
            for name, value in vars(sums).items():
                saved = tensors[f"sums/{index}/{name}"]
                setattr(sums, name, value.copy_(saved) if isinstance(value, Tensor) else float(saved))
        device = next(self.layout.model.parameters()).device
        self._first = tensors["first"].to(device) if "first" in tensors else None
        self.all_alike = bool(tensors["alike"])

    def gather(self) -> None:
        """Add up the sums of all processes, so that each process has the totals."""
        if distributed.processes() < 2:
            return
        for sums in self._all():
            sums.gather()
        self.all_alike = False  # this process has compared only its own images

    @property
    def images(self) -> int:
        """Number of images that were added."""
        return int(sum(sums.images for sums in next(iter(self.equations.values()))))

    @property
    def has_held_out(self) -> bool:
        """Whether at least one image is held out."""
        return all(sums.images > 0 for sums in self._all())

    def shortcoming(self) -> str:
        """Why the images do not suffice for a good map, as a sentence; empty if they do."""
        pairs = list(self.equations.values())
        widest = max((train + held_out for train, held_out in pairs), key=lambda total: len(total.x))
        if all((train + held_out).unit == 0 for train, held_out in pairs):
            return "all images give the same features: only the heads' biases were folded."
        if not self.has_held_out:
            return (
                f"too few images ({self.images}) to hold one out: the fold uses a ridge of {FALLBACK_RIDGE:g}, and its"
                f" fit is unknown; give at least {round(1 / SHARE)}."
            )
        if self.images > 1 and self.all_alike:
            return (
                f"all {self.images} images give the same features, so the fold learns no more than from one image; give"
                " images like those that the model will be used on."
            )
        if widest.tokens < len(widest.x):
            return (
                f"{self.images} images give {int(widest.tokens)} tokens for a map of {len(widest.x)} inputs: the fold"
                " stays close to the unfolded head; give more images."
            )
        return ""

    def solve(self, ridge: float | str = "auto") -> tuple[dict[str, nn.Module], dict[str, Fit]]:
        """New, folded heads, and how well each fits.

        Args:
            ridge: In units of the mean diagonal of the Gram matrix. "auto" takes the best of `RIDGES` on the held-out
                images, for each head.

        Raises:
            InputError: There are no images, or features are not finite.
        """
        fits = self.choose(ridge)
        return self.heads({task: fit.ridge for task, fit in fits.items()}), fits

    def choose(self, ridge: float | str = "auto") -> dict[str, Fit]:
        """The ridge of each task and how well its head fits; see `solve`."""
        if not self.images:
            raise InputError("the fold has no image; give at least one.")
        if not all(torch.isfinite(sums.xx).all() and torch.isfinite(sums.rr).all() for sums in self._all()):
            raise InputError("the fold has features that are not finite; a model or an image is damaged.")
        return self._choose(RIDGES if ridge == "auto" else (float(ridge),))

    def heads(self, ridges: Mapping[str, float], hold_out: bool = False) -> dict[str, nn.Module]:
        """New heads for the given ridges.

        Args:
            ridges: By task.
            hold_out: Leave out the held-out images, so that these can judge the heads.
        """
        equations = {system: train if hold_out else train + out for system, (train, out) in self.equations.items()}
        solved, source = self._solve_all(ridges, equations), self.layout.model.encoder.source
        return {
            task: self._head(task, solved, self._moments(equations, source(task))) for task in self.layout.projections
        }

    def _all(self) -> Iterator[NormalEquations]:
        return (sums for pair in self.equations.values() for sums in pair)

    def _choose(self, ridges: Sequence[float]) -> dict[str, Fit]:
        """The ridge of each task with the best fit on the held-out images."""
        tasks = list(self.layout.projections)
        if not self.has_held_out:
            given = ridges[0] if len(ridges) == 1 else FALLBACK_RIDGE
            return dict.fromkeys(tasks, Fit(given, math.nan, math.nan))
        solvers = {system: Solver(train, system, self.channels) for system, (train, _) in self.equations.items()}
        held_out = {system: solver.in_coordinates(self.equations[system][1]) for system, solver in solvers.items()}
        r2 = {ridge: self._held_out_r2(ridge, solvers, held_out) for ridge in {*ridges, math.inf}}
        chosen = {task: max(ridges, key=lambda ridge: r2[ridge][task]) for task in tasks}
        return {task: Fit(ridge, r2[ridge][task], r2[math.inf][task]) for task, ridge in chosen.items()}

    def _held_out_r2(
        self, ridge: float, solvers: Mapping[System, Solver], held_out: Mapping[System, NormalEquations]
    ) -> dict[str, float]:
        """R^2 per task on the held-out images, the mean over the task's parts."""
        found: dict[str, list[float]] = {task: [] for task in self.layout.projections}
        for system, solver in solvers.items():
            weights, bias = solver.solve(ridge)
            error, spread = held_out[system].error(weights, bias), held_out[system].spread()
            for part in self.layout.parts:
                if part.system == system:
                    total = float(spread[part.columns].sum())
                    left = float(error[part.columns].sum())
                    found[part.task].append(1 - left / total if total > 0 else (1.0 if left == 0 else -math.inf))
        return {task: sum(values) / len(values) for task, values in found.items()}

    def _solve_all(self, ridges: Mapping[str, float], equations: Mapping[System, NormalEquations]) -> list[Projection]:
        """The new projection of every part."""
        solvers = {system: Solver(sums, system, self.channels) for system, sums in equations.items()}
        solutions: dict[Any, tuple[Tensor, Tensor]] = {}
        solved = []
        for part in self.layout.parts:
            key = (part.system, ridges[part.task])
            if key not in solutions:
                weights, bias = solvers[part.system].solve(ridges[part.task])
                solutions[key] = solvers[part.system].expanded(weights), bias
            weights, bias = solutions[key]
            solved.append(moved(part, weights[part.columns], bias[part.columns], self.channels))
        return solved

    def _head(self, task: str, solved: Sequence[Projection], moments: Moments) -> nn.Module:
        projections = []
        for index in range(len(self.layout.projections[task])):
            pieces = [
                projection
                for part, projection in zip(self.layout.parts, solved, strict=True)
                if (part.task, part.index) == (task, index)
            ]
            projections.append(joined(pieces))
        head: Any = self.layout.model.heads[task]
        return head.with_projections(projections, moments).eval()

    def _moments(self, equations: Mapping[System, NormalEquations], source: str) -> Moments:
        maps: dict[int, tuple[Tensor, Tensor]] = {}
        cls: dict[int, tuple[Tensor, Tensor]] = {}
        for system, sums in equations.items():
            if system.source != source:
                continue
            widths = system.widths(self.channels)
            pieces = list(zip(sums.mean.split(widths), sums.variance.split(widths), strict=True))
            maps |= dict(zip(system.maps, pieces, strict=False))
            cls |= dict(zip(system.cls, pieces[len(system.maps) :], strict=True))
        return Moments(maps, cls)


@torch.no_grad()
def fold_heads(
    model: SimoModel,
    targets: Iterable[HeadTargets],
    variant: str = "per-tap",
    ridge: float | str = "auto",
    agreement: Agreement | None = None,
    sums: HeadSums | None = None,
) -> Folded:
    """Fold the heads of a merged model so that their first layers match those of the experts.

    Args:
        agreement: The experts' predictions for the held-out images, once ``targets`` has ended. With it, a head whose
            predictions would be further from the expert's after the fold stays as it was.
        sums: The sums over all images, if they are known; then there need be no ``targets``.
    """
    sums = sums or head_sums(model, targets, variant)
    fits = sums.choose(ridge)
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    if agreement is not None and sums.has_held_out:
        judged = sums.heads({task: fit.ridge for task, fit in fits.items()}, hold_out=True)
        before, after = agreement.distances(model), agreement.distances(with_heads(model, judged))
        for task, fit in fits.items():
            if after[task] > before[task] and fit.ridge < math.inf:
                fits[task] = Fit(math.inf, fit.r2_before, fit.r2_before)
    heads = sums.heads({task: fit.ridge for task, fit in fits.items()})
    return Folded(with_heads(model, heads), fits, sums, before, after)


@torch.no_grad()
def head_sums(
    model: SimoModel,
    targets: Iterable[HeadTargets],
    variant: str = "per-tap",
    sums: HeadSums | None = None,
    note: Callable[[int], None] = lambda last: None,
) -> HeadSums:
    """The sums for the fold of all heads of a merged model, over the images of all processes.

    Args:
        sums: Sums of earlier images of this process, to continue from.
        note: Called after each batch with the index of its last image.
    """
    sums = sums or HeadSums(FoldLayout(model, variant))
    device = next(model.parameters()).device
    for batch in targets:
        with evaluating(model), autocast(device):
            features = model.encode(batch.images)
        sums.add(features, batch.targets, batch.held_out)
        note(batch.last)
    sums.gather()
    return sums


def with_heads(model: SimoModel, heads: Mapping[str, nn.Module]) -> SimoModel:
    """A model with other heads that shares the encoder."""
    return SimoModel(model.encoder, model.tasks, heads, dict(model.provenance))


def head_targets(
    model: SimoModel,
    experts: Mapping[str, SimoModel],
    images: Any,
    variant: str = "per-tap",
    batch_size: int = 32,
    agreement: Agreement | None = None,
    start: int = 0,
) -> Iterator[HeadTargets]:
    """The targets of `fold_heads`, which the experts compute batch by batch. A list of them serves several merges.

    Args:
        model: Any merge of the experts, with the experts' heads.
        experts: By task.
        images: As `simomerge.datasets.pictures.as_images` gives them.
        agreement: Receives the experts' predictions for the held-out images.
        start: The first image of this process's share, to go on after an interruption.
    """
    layout = FoldLayout(model, variant)
    for batch in observe(experts, images, batch_size, "fold", shared=True, start=start):
        if agreement is not None:
            agreement.add(batch)
        yield HeadTargets(batch.images, layout.targets(batch.features), batch.held_out, batch.indices[-1])
