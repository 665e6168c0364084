"""Tasks: their output channels, losses, metrics, units and colours.

A `Task` is data (a name, a kind, class names) and goes into ``simo.json``. A `Kind` is the behaviour that all tasks of
one sort share; the table `KINDS` holds them. Code that depends on the kind of a task asks here: training for the loss,
evaluation for the metric, the report for the colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from simomerge.core.errors import InputError
from simomerge.core.schema import nearest
from simomerge.core.task_names import check_task_name
from simomerge.core.text import shown
from simomerge.datasets.losses import (
    IGNORE_LABEL,
    absolute_difference,
    angle,
    binary_cross_entropy,
    class_divergence,
    cosine,
    cross_entropy,
    edge_cross_entropy,
    edge_divergence,
    end_point,
    l1,
    l2,
    masked_mean,
    mean_end_point,
    squared_difference,
    unit_vectors,
)

LOG_DEPTH_RANGE = math.log(2**16)
"""A log_depth is log(1 + d) divided by this, for a depth d of 16 bits (the paper's convention for Taskonomy)."""


@dataclass(frozen=True)
class Kind:
    """Behaviour of all tasks of one sort.

    Attributes:
        channels: output channels of a head; None means one per class.
        losses: ``(logits (B, C, H, W), target)`` -> a loss for each element of ``valid``; a task's loss is their mean
            where ``valid`` is true.
        valid: target -> bool, where it counts in losses and metrics.
        activate: logits -> prediction, in the units of the target.
        distance: ``(logits, teacher's logits) -> scalar``: how much predictions differ from another model's, 0 if they
            agree. It needs no labels.
        metric: the main metric, a key of what the metrics of the task compute.
        unit: unit of that metric, for tables.
        higher_is_better: whether a higher value of that metric is better.
        colour_map: name of a matplotlib colour map for one-channel maps; empty for kinds with other colours.
        factor: of the main metric in tables: 100 for shares that are shown in percent.
        invalid: value of pixels that do not count.
        bounded: whether all values are in [0, 1].
        directed: whether the first two channels are x and y of the image: a mirror image changes the sign of x.
    """

    channels: int | None
    losses: Callable[[Tensor, Tensor], Tensor]
    valid: Callable[[Tensor], Tensor]
    activate: Callable[[Tensor], Tensor]
    distance: Callable[[Tensor, Tensor], Tensor]
    metric: str
    unit: str
    higher_is_better: bool = False
    colour_map: str = ""
    factor: float = 1.0
    invalid: float = math.nan
    bounded: bool = False
    directed: bool = False


def _share(colour_map: str = "", channels: int = 1) -> Kind:
    """A kind whose targets are in [0, 1], or NaN where invalid."""
    clamp = partial(torch.clamp, min=0, max=1)
    return Kind(
        channels,
        l1,
        torch.isfinite,
        clamp,
        absolute_difference,
        "abs_err",
        "% of range",
        colour_map=colour_map,
        factor=100,
        bounded=True,
    )


def _is_positive(values: Tensor) -> Tensor:
    return (values > 0) & torch.isfinite(values)


def _distance_map(smallest: float, unit: str, colour_map: str) -> Kind:
    """A kind whose targets are positive, or 0 where invalid."""
    clamp = partial(torch.clamp, min=smallest)
    return Kind(1, l1, _is_positive, clamp, absolute_difference, "abs_err", unit, colour_map=colour_map, invalid=0)


def _mask(losses: Callable[[Tensor, Tensor], Tensor], metric: str) -> Kind:
    """A kind whose targets are 0 or 1, or -1 where invalid."""
    return Kind(
        1,
        losses,
        valid=lambda t: (t >= 0) & torch.isfinite(t),
        activate=torch.sigmoid,
        distance=edge_divergence,
        metric=metric,
        unit="%",
        higher_is_better=True,
        colour_map="gray",
        factor=100,
        invalid=-1,
        bounded=True,
    )


KINDS: dict[str, Kind] = {
    "segmentation": Kind(
        None,
        cross_entropy,
        valid=lambda t: t != IGNORE_LABEL,
        activate=lambda logits: logits.argmax(1),
        distance=class_divergence,
        metric="miou",
        unit="%",
        higher_is_better=True,
        factor=100,
        invalid=IGNORE_LABEL,
    ),
    "depth": _distance_map(1e-3, "m", "magma_r"),
    "disparity": _distance_map(0, "", "magma"),
    "log_depth": _share("magma_r"),
    "normals": Kind(
        3,
        cosine,
        lambda t: _is_positive(t.square().sum(1)),
        unit_vectors,
        angle,
        "mean_angle",
        "deg",
        invalid=0,
        directed=True,
    ),
    "edges": _mask(edge_cross_entropy, "f1"),
    "binary": _mask(binary_cross_entropy, "iou"),
    "flow": Kind(
        2, end_point, lambda t: torch.isfinite(t).all(1), lambda t: t, mean_end_point, "epe", "px", directed=True
    ),
    "albedo": _share(channels=3),
    "texture": _share("gray"),
    "keypoints": _share("inferno"),
    "autoencoder": _share(channels=3),
    "regression": Kind(
        1, l1, torch.isfinite, lambda logits: logits, absolute_difference, "abs_err", "", colour_map="viridis"
    ),
}
"""All kinds of tasks. Targets are float (B, C, H, W), except labels, which are int64 (B, H, W). `Kind.invalid` marks
pixels that do not count; NaN and infinite values do not count either. A `Task` of kind regression has its own channels,
unit, range and norm."""

_IN_UNITS = ("abs_err", "rmse", "epe")
"""Metrics of kinds whose logits are in the units of the target."""


@dataclass(frozen=True)
class Task:
    """One dense prediction task.

    Args:
        name: the key of its head, targets and predictions.
        kind: a key of `KINDS`; the name by default.
        classes: class names, for segmentation.
        colours: one RGB triple (0..255) per class; generated if empty.
        channels: values per pixel; only a regression may choose it (1 by default).
        unit: unit of the main metric; only a regression may choose it.
        range: smallest and largest value of a regression, to which predictions are clipped; none by default.
        norm: loss and main metric of a regression: "l1" (mean absolute error, the default) or "l2" (mean squared error;
            the metric is its root).

    Raises:
        InputError: `check_task_name` refuses the name, the kind is unknown, a segmentation task has fewer than two
            classes, there are not as many colours as classes, or a setting of regressions is wrong or has another kind.

    Example:
        >>> Task("parts", "segmentation", classes=("head", "arm", "rest")).channels
        3
        >>> Task("depth").unit
        'm'
        >>> wind = Task("wind", "regression", channels=2, unit="m/s", norm="l2")
        >>> wind.channels, wind.metric, wind.unit
        (2, 'rmse', 'm/s')
    """

    name: str
    kind: str = ""
    classes: tuple[str, ...] = ()
    colours: tuple[tuple[int, int, int], ...] = ()
    channels: int = 0
    unit: str = ""
    range: tuple[float, ...] = ()
    norm: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", self.kind or self.name)
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "colours", tuple((int(r), int(g), int(b)) for r, g, b in self.colours))
        check_task_name(self.name)
        if self.kind not in KINDS:
            raise InputError(f"task {self.name!r}: unknown kind {self.kind!r}; choose one of {', '.join(KINDS)}.")
        if KINDS[self.kind].channels is None and len(self.classes) < 2:
            raise InputError(f"task {self.name!r}: segmentation needs the names of at least two classes.")
        if self.colours and len(self.colours) != len(self.classes):
            raise InputError(f"task {self.name!r}: {len(self.classes)} classes but {len(self.colours)} colours.")
        self._complete()

    def _complete(self) -> None:
        """Check the settings of regressions, and give channels and unit of all other kinds."""
        own, kind = self.kind == "regression", KINDS[self.kind]
        fixed: dict[str, Any] = {"channels": kind.channels or len(self.classes), "unit": kind.unit}
        for name in ("channels", "unit", "range", "norm"):
            if not own and getattr(self, name) not in (0, "", (), [], fixed.get(name)):
                raise InputError(f"task {self.name!r}: {name} is a setting of the kind regression, not of {self.kind}.")
        if own and not (isinstance(self.channels, int) and not isinstance(self.channels, bool) and self.channels >= 0):
            raise InputError(f"task {self.name!r}: channels {self.channels!r}; give a whole number of at least 1.")
        if own and self.norm not in ("", "l1", "l2"):
            raise InputError(f"task {self.name!r}: norm {self.norm!r}; use l1 or l2.")
        try:
            limits = tuple(float(value) for value in self.range)
            usable = len(limits) in (0, 2) and all(map(math.isfinite, limits)) and tuple(sorted(set(limits))) == limits
        except (TypeError, ValueError):
            limits, usable = (), False
        if not usable:
            raise InputError(f"task {self.name!r}: range {self.range!r}; give [lowest, highest].")
        object.__setattr__(self, "range", limits)
        object.__setattr__(self, "unit", str(self.unit) if own else kind.unit)
        object.__setattr__(self, "channels", (self.channels if own else 0) or fixed["channels"])

    @property
    def behaviour(self) -> Kind:
        """The entry of `KINDS`; for a regression, with its own channels, unit, range and norm."""
        kind = KINDS[self.kind]
        if self.kind != "regression":
            return kind
        clip = partial(torch.clamp, min=self.range[0], max=self.range[1]) if self.range else kind.activate
        found = replace(kind, channels=self.channels, unit=self.unit, activate=clip)
        if self.norm == "l2":
            found = replace(found, losses=l2, distance=squared_difference, metric="rmse")
        return found

    @property
    def metric(self) -> str:
        return self.behaviour.metric

    @property
    def higher_is_better(self) -> bool:
        return self.behaviour.higher_is_better

    @property
    def has_own_scale(self) -> bool:
        """Whether logits are in units of the target without bounds, which float16 may not hold."""
        return self.metric in _IN_UNITS and not self.behaviour.bounded

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Training loss: a float32 scalar. Shapes as in `KINDS`."""
        valid = self.valid(target)
        # A target that is not finite would make the gradient NaN, although its pixel does not count.
        known = torch.nan_to_num(target, 0, 0, 0) if target.is_floating_point() else target
        return masked_mean(self.behaviour.losses(logits.float(), known), valid)

    def valid(self, target: Tensor) -> Tensor:
        """Where a target counts in losses and metrics: bool, of the target's shape; (B, H, W) for normals and flow."""
        return self.behaviour.valid(target)

    def distance(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """How much predictions differ from another model's: a float32 scalar, 0 if they agree. Both (B, C, H, W)."""
        return self.behaviour.distance(logits, teacher)

    def activate(self, logits: Tensor) -> Tensor:
        """Logits (B, C, H, W) -> prediction: labels (B, H, W) or a map (B, C, H, W) in the target's units."""
        return self.behaviour.activate(logits)

    def mean_target(self, targets: Iterable[Tensor]) -> Tensor:
        """Mean of the valid pixels, (C,), for kinds whose logits are in the target's units; else zeros.

        A head that starts with this bias does not have to learn a constant first, which takes hundreds of small steps
        with an L1 loss.
        """
        if self.metric not in _IN_UNITS:
            return torch.zeros(self.channels)
        stacked = torch.stack(list(targets)).transpose(0, 1).flatten(1)
        valid = torch.isfinite(stacked) & ((stacked > 0) if self.behaviour.invalid == 0 else True)
        return torch.where(valid, stacked, 0.0).sum(1) / valid.sum(1).clamp(min=1)

    def to_dict(self) -> dict[str, Any]:
        kind = KINDS[self.kind]
        known = {"channels": kind.channels or len(self.classes), "unit": kind.unit}
        return {key: value for key, value in asdict(self).items() if value and value != known.get(key)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Task:
        if unknown := [key for key in data if key not in cls.__dataclass_fields__]:
            raise InputError(
                f"a task has the entry {shown(unknown[0])}, which this simomerge does not know: upgrade it, or remove"
                " the entry."
            )
        return cls(**data)


def select_tasks(available: Mapping[str, Task], names: str | Iterable[str]) -> dict[str, Task]:
    """The named tasks in the given order; ``"all"`` selects all of them.

    Raises:
        InputError: a name is unknown (the message suggests the nearest one), or given twice.
    """
    if isinstance(names, str):
        names = list(available) if names == "all" else names.split(",")
    chosen: dict[str, Task] = {}
    for name in names:
        if name not in available:
            near = nearest(name, available)
            hint = f"; did you mean {near!r}" if near else ""
            raise InputError(f"unknown task {name!r}{hint}? There are: {', '.join(available)}.")
        if name in chosen:
            raise InputError(f"task {name!r} is given twice.")
        chosen[name] = available[name]
    return chosen
