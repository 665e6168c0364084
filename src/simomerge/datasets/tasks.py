"""Tasks: their output channels, losses, metrics, units and colours.

A `Task` is data (a name, a kind, class names) and goes into ``simo.json``. A `Kind` is the behaviour that all tasks of
one sort share; the table `KINDS` holds them. Code that depends on the kind of a task asks here: training for the loss,
evaluation for the metric, the report for the colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simomerge.core.errors import InputError
from simomerge.core.schema import nearest

IGNORE_LABEL = -1
"""Label of pixels that segmentation losses and metrics leave out (the paper's convention)."""
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


# Losses -------------------------------------------------------------------------------------------------


def _masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of ``values`` where ``valid``; zero, with a gradient of zero, if nothing is valid."""
    weight = valid.to(values.dtype)
    return (torch.where(valid, values, values.new_zeros(())) * weight).sum() / weight.sum().clamp(min=1)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, ignore_index=IGNORE_LABEL, reduction="none")


def _l1(logits: Tensor, target: Tensor) -> Tensor:
    return (logits - torch.where(torch.isfinite(target), target, 0.0)).abs()


def _cosine(logits: Tensor, target: Tensor) -> Tensor:
    """1 - dot product of unit vectors (paper, Appendix: losses)."""
    # Normalising the logits with F.normalize first takes eight times as long on a CPU.
    return 1 - (logits * target).sum(1) * logits.square().sum(1).clamp(min=1e-24).rsqrt()


def _edge_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy in which edge pixels have twice the weight.

    A tenth of the pixels are edges: L1, the paper's loss for all other tasks, is lowest for "no edge anywhere".
    """
    weight = torch.tensor(2.0, device=logits.device)
    return F.binary_cross_entropy_with_logits(logits, target.clamp(min=0), pos_weight=weight, reduction="none")


# Distances from a teacher's predictions -----------------------------------------------------------------


def _class_divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the class probabilities from the teacher's, mean over the pixels."""
    own, wanted = F.log_softmax(logits.float(), 1), F.log_softmax(teacher.float(), 1)
    return (wanted.exp() * (wanted - own)).sum(1).mean()


def _edge_divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the edge probability from the teacher's, mean over the pixels."""
    wanted = torch.sigmoid(teacher.float())
    entropy = F.binary_cross_entropy_with_logits(teacher.float(), wanted)
    return F.binary_cross_entropy_with_logits(logits.float(), wanted) - entropy


def _absolute_difference(logits: Tensor, teacher: Tensor) -> Tensor:
    return F.l1_loss(logits.float(), teacher.float())


def _angle(logits: Tensor, teacher: Tensor) -> Tensor:
    wanted = unit_vectors(teacher.float())
    return _masked_mean(_cosine(logits.float(), wanted), wanted.square().sum(1) > 0)


# Activations and kinds --------------------------------------------------------------------------------


def unit_vectors(vectors: Tensor) -> Tensor:
    """Vectors (B, 3, H, W) scaled to length one; on a CPU much faster than F.normalize, with the same result."""
    return vectors * vectors.square().sum(1, keepdim=True).clamp(min=1e-24).rsqrt()


def _share(colour_map: str = "", channels: int = 1) -> Kind:
    """A kind whose targets are in [0, 1], or NaN where invalid."""
    clamp = partial(torch.clamp, min=0, max=1)
    return Kind(
        channels, _l1, torch.isfinite, clamp, _absolute_difference, "abs_err", "% of range", colour_map=colour_map
    )


def _distance_map(smallest: float, unit: str, colour_map: str) -> Kind:
    """A kind whose targets are positive, or 0 where invalid."""
    clamp = partial(torch.clamp, min=smallest)
    return Kind(1, _l1, lambda t: t > 0, clamp, _absolute_difference, "abs_err", unit, colour_map=colour_map)


KINDS: dict[str, Kind] = {
    "segmentation": Kind(
        None,
        _cross_entropy,
        valid=lambda t: t != IGNORE_LABEL,
        activate=lambda logits: logits.argmax(1),
        distance=_class_divergence,
        metric="miou",
        unit="%",
        higher_is_better=True,
    ),
    "depth": _distance_map(1e-3, "m", "magma_r"),
    "disparity": _distance_map(0, "", "magma"),
    "log_depth": _share("magma_r"),
    "normals": Kind(3, _cosine, lambda t: t.square().sum(1) > 0, unit_vectors, _angle, "mean_angle", "deg"),
    "edges": Kind(
        1,
        _edge_cross_entropy,
        valid=lambda t: t >= 0,
        activate=torch.sigmoid,
        distance=_edge_divergence,
        metric="f1",
        unit="%",
        higher_is_better=True,
        colour_map="gray",
    ),
    "texture": _share("gray"),
    "keypoints": _share("inferno"),
    "autoencoder": _share(channels=3),
}
"""All kinds of tasks. Targets are float (B, C, H, W), except labels, which are int64 (B, H, W). Invalid pixels have the
label -1, depth or disparity 0, normal (0, 0, 0), edge -1, and NaN for all other kinds."""


@dataclass(frozen=True)
class Task:
    """One dense prediction task.

    Args:
        name: the key of its head, targets and predictions.
        kind: a key of `KINDS`; the name by default.
        classes: class names, for segmentation.
        colours: one RGB triple (0..255) per class; generated if empty.

    Raises:
        InputError: the name is not an identifier, the kind is unknown, a segmentation task has fewer than two classes,
            or there are not as many colours as classes.

    Example:
        >>> Task("parts", "segmentation", classes=("head", "arm", "rest")).channels
        3
        >>> Task("depth").unit
        'm'
    """

    name: str
    kind: str = ""
    classes: tuple[str, ...] = ()
    colours: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", self.kind or self.name)
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "colours", tuple((int(r), int(g), int(b)) for r, g, b in self.colours))
        if not self.name.isidentifier():
            raise InputError(f"task name {self.name!r}: use letters, digits and underscores only.")
        if self.kind not in KINDS:
            raise InputError(f"task {self.name!r}: unknown kind {self.kind!r}; choose one of {', '.join(KINDS)}.")
        if KINDS[self.kind].channels is None and len(self.classes) < 2:
            raise InputError(f"task {self.name!r}: segmentation needs the names of at least two classes.")
        if self.colours and len(self.colours) != len(self.classes):
            raise InputError(f"task {self.name!r}: {len(self.classes)} classes but {len(self.colours)} colours.")

    @property
    def behaviour(self) -> Kind:
        """The entry of `KINDS`."""
        return KINDS[self.kind]

    @property
    def channels(self) -> int:
        """Output channels of a head for this task."""
        return self.behaviour.channels or len(self.classes)

    @property
    def metric(self) -> str:
        return self.behaviour.metric

    @property
    def higher_is_better(self) -> bool:
        return self.behaviour.higher_is_better

    @property
    def unit(self) -> str:
        return self.behaviour.unit

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Training loss: a float32 scalar. Shapes as in `KINDS`."""
        return _masked_mean(self.behaviour.losses(logits.float(), target), self.valid(target))

    def valid(self, target: Tensor) -> Tensor:
        """Where a target counts in losses and metrics: bool, of the target's shape, but (B, H, W) for normals."""
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
        if self.metric != "abs_err":
            return torch.zeros(self.channels)
        stacked = torch.stack(list(targets)).transpose(0, 1).flatten(1)
        valid = torch.isfinite(stacked) & self.valid(stacked)
        return torch.where(valid, stacked, 0.0).sum(1) / valid.sum(1).clamp(min=1)

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Task:
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


def class_colours(count: int) -> np.ndarray:
    """``count`` colours, well separated up to 20, uint8 (count, 3)."""
    from matplotlib import colormaps

    table = colormaps["tab20"](np.arange(count) % 20)[:, :3]
    return (table * 255).astype(np.uint8)


def colourise(task: Task, values: np.ndarray, limits: Sequence[float] | None = None) -> np.ndarray:
    """Colours for a prediction or target of one image.

    Args:
        task: the task of the values.
        values: labels (H, W), a one-channel map (H, W) or (1, H, W), or vectors (3, H, W).
        limits: (low, high) of the colour range of one-channel maps; the map's own range by default. Pass the range of
            the ground truth to make the colours of a prediction comparable with it.

    Returns:
        uint8 RGB (H, W, 3); invalid pixels are black.
    """
    values = np.asarray(values)
    if task.kind == "segmentation":
        colours = np.asarray(task.colours, np.uint8) if task.colours else class_colours(len(task.classes))
        return np.where((values >= 0)[..., None], colours[np.clip(values, 0, len(colours) - 1)], 0).astype(np.uint8)
    if task.kind == "normals":
        valid = np.square(values).sum(0) > 0
        return (np.where(valid, values * 0.5 + 0.5, 0).clip(0, 1).transpose(1, 2, 0) * 255).astype(np.uint8)
    if values.ndim == 3 and values.shape[0] == 3:
        return (np.nan_to_num(values).clip(0, 1).transpose(1, 2, 0) * 255).astype(np.uint8)
    from matplotlib import colormaps

    plane = values.reshape(values.shape[-2:]).astype(np.float32)
    valid = np.isfinite(plane) & ((plane > 0) if task.kind in ("depth", "disparity") else (plane >= 0))
    low, high = limits or (plane[valid].min(initial=np.inf), plane[valid].max(initial=-np.inf))
    scaled = (np.nan_to_num(plane) - low) / max(high - low, 1e-6)
    rgb = colormaps[task.behaviour.colour_map](scaled.clip(0, 1))[..., :3]
    return (np.where(valid[..., None], rgb, 0) * 255).astype(np.uint8)
