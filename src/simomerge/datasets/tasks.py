"""What a task is: its output channels, loss, metric, sign of better, units and colours.

A `Task` is data (a name, a kind, class names) and goes into ``simo.json``; a `Kind` is behaviour, one per
sort of dense prediction, and lives in the table `KINDS`. Everything that must know how a task differs from
another asks here: training for the loss, evaluation for the metric, the report for the colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simomerge.core.errors import InputError
from simomerge.core.schema import nearest

IGNORE_LABEL = -1
"""Label of pixels that no segmentation loss or metric counts (the paper's convention)."""
LOG_DEPTH_RANGE = math.log(2**16)
"""A log_depth is log(1 + d) divided by this, of a depth d in 16 bits (the paper's convention for Taskonomy)."""


def _masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of ``values`` where ``valid``; zero, with a gradient of zero, where nothing is valid."""
    weight = valid.to(values.dtype)
    return (torch.where(valid, values, values.new_zeros(())) * weight).sum() / weight.sum().clamp(min=1)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.float(), target, ignore_index=IGNORE_LABEL, reduction="none")
    return _masked_mean(losses, target != IGNORE_LABEL)


def _l1(logits: Tensor, target: Tensor) -> Tensor:
    valid = torch.isfinite(target)
    return _masked_mean((logits.float() - torch.where(valid, target, 0.0)).abs(), valid)


def _depth_l1(logits: Tensor, target: Tensor) -> Tensor:
    return _masked_mean((logits.float() - target).abs(), target > 0)


def _cosine(logits: Tensor, target: Tensor) -> Tensor:
    """1 - dot product of unit vectors (paper, Appendix: losses)."""
    logits = logits.float()
    # By hand: normalising first, as F.normalize does, takes eight times as long on a CPU.
    dot = (logits * target).sum(1) * logits.square().sum(1).clamp(min=1e-24).rsqrt()
    return _masked_mean(1 - dot, target.square().sum(1) > 0)


def _edge_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy, edge pixels weighted twofold.

    Edges are a tenth of the pixels: L1 (the paper's loss for everything else) is least at "no edge anywhere".
    """
    valid = target >= 0
    losses = F.binary_cross_entropy_with_logits(
        logits.float(),
        target.clamp(min=0),
        pos_weight=torch.tensor(2.0, device=logits.device),
        reduction="none",
    )
    return _masked_mean(losses, valid)


def _soft_cross_entropy(logits: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the classes' probabilities from the teacher's, mean over the pixels."""
    own, wanted = F.log_softmax(logits.float(), 1), F.log_softmax(teacher.float(), 1)
    return (wanted.exp() * (wanted - own)).sum(1).mean()


def _absolute_difference(logits: Tensor, teacher: Tensor) -> Tensor:
    return F.l1_loss(logits.float(), teacher.float())


def _angle(logits: Tensor, teacher: Tensor) -> Tensor:
    return _cosine(logits, unit_vectors(teacher.float()))


def _edge_divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the edge probability from the teacher's, mean over the pixels."""
    wanted = torch.sigmoid(teacher.float())
    return F.binary_cross_entropy_with_logits(logits.float(), wanted) - F.binary_cross_entropy_with_logits(
        teacher.float(), wanted
    )


@dataclass(frozen=True)
class Kind:
    """Behaviour shared by all tasks of one sort.

    Attributes:
        channels: output channels of a head; None means one per class.
        loss: ``(logits (B, C, H, W), target) -> scalar``; invalid pixels never count.
        activate: logits -> prediction, in the units of the target.
        metric: the metric that speaks for the task (a key of what its metrics compute).
        higher_is_better: the sign of better of that metric.
        unit: unit of that metric, for tables.
        distance: ``(logits, teacher's logits) -> scalar``: how far predictions are from another model's, 0 where they
            agree; needs no label.
        colour_map: name of a matplotlib colour map for one-channel maps; empty where colours are special.
    """

    channels: int | None
    loss: Callable[[Tensor, Tensor], Tensor]
    activate: Callable[[Tensor], Tensor]
    metric: str
    higher_is_better: bool
    unit: str
    distance: Callable[[Tensor, Tensor], Tensor]
    colour_map: str = ""


def _identity(logits: Tensor) -> Tensor:
    return logits


def _unit_interval(logits: Tensor) -> Tensor:
    return logits.clamp(0, 1)


def _labels(logits: Tensor) -> Tensor:
    return logits.argmax(1)


def unit_vectors(vectors: Tensor) -> Tensor:
    """Vectors (B, 3, H, W) of length one; on a CPU many times as fast as F.normalize, which gives the same."""
    return vectors * vectors.square().sum(1, keepdim=True).clamp(min=1e-24).rsqrt()


def _positive(logits: Tensor) -> Tensor:
    return logits.clamp(min=1e-3)


def _not_negative(logits: Tensor) -> Tensor:
    return logits.clamp(min=0)


KINDS: dict[str, Kind] = {
    "segmentation": Kind(None, _cross_entropy, _labels, "miou", True, "%", _soft_cross_entropy),
    "depth": Kind(1, _depth_l1, _positive, "abs_err", False, "m", _absolute_difference, "magma_r"),
    "disparity": Kind(1, _depth_l1, _not_negative, "abs_err", False, "", _absolute_difference, "magma"),
    "log_depth": Kind(1, _l1, _unit_interval, "abs_err", False, "% of range", _absolute_difference, "magma_r"),
    "normals": Kind(3, _cosine, unit_vectors, "mean_angle", False, "deg", _angle),
    "edges": Kind(1, _edge_cross_entropy, torch.sigmoid, "f1", True, "%", _edge_divergence, "gray"),
    "texture": Kind(1, _l1, _unit_interval, "abs_err", False, "% of range", _absolute_difference, "gray"),
    "keypoints": Kind(1, _l1, _unit_interval, "abs_err", False, "% of range", _absolute_difference, "inferno"),
    "autoencoder": Kind(3, _l1, _unit_interval, "abs_err", False, "% of range", _absolute_difference),
}
"""Every kind of task. Targets are float (B, C, H, W), but labels int64 (B, H, W). Invalid pixels are: label
-1, depth or disparity 0, normal (0, 0, 0), edge -1, NaN elsewhere."""


@dataclass(frozen=True)
class Task:
    """One dense prediction task.

    Args:
        name: the key of its head, targets and predictions.
        kind: a key of `KINDS`; defaults to the name.
        classes: class names, for segmentation.
        colours: one RGB triple (0..255) per class; generated where empty.

    Raises:
        InputError: unknown kind, or a segmentation task with fewer than two classes.

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
        return self.behaviour.loss(logits, target)

    def valid(self, target: Tensor) -> Tensor:
        """Where a target counts, in losses and metrics: bool, of its shape, but (B, H, W) for normals."""
        if self.kind == "segmentation":
            return target != IGNORE_LABEL
        if self.kind == "normals":
            return target.square().sum(1) > 0
        if self.kind == "edges":
            return target >= 0
        return target > 0 if self.kind in ("depth", "disparity") else torch.isfinite(target)

    def distance(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """How far predictions are from another model's: a float32 scalar, 0 where they agree. Both (B, C, H, W)."""
        return self.behaviour.distance(logits, teacher)

    def activate(self, logits: Tensor) -> Tensor:
        """Logits (B, C, H, W) -> prediction: labels (B, H, W) or a map (B, C, H, W) in the target's units."""
        return self.behaviour.activate(logits)

    def mean_target(self, targets: Iterable[Tensor]) -> Tensor:
        """Mean of the valid pixels, (C,), where logits are in the target's units; zeros for all other kinds.

        A head that starts there need not learn a constant first: with L1 and small steps that takes hundreds.
        """
        if self.behaviour.loss not in (_l1, _depth_l1):
            return torch.zeros(self.channels)
        stacked = torch.stack(list(targets)).transpose(0, 1).flatten(1)
        valid = torch.isfinite(stacked) & ((stacked > 0) if self.behaviour.loss is _depth_l1 else True)
        return torch.where(valid, stacked, 0.0).sum(1) / valid.sum(1).clamp(min=1)

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Task:
        return cls(**data)


def select_tasks(available: Mapping[str, Task], names: str | Iterable[str]) -> dict[str, Task]:
    """The named tasks in the order asked; ``"all"`` takes every one.

    Raises:
        InputError: a name that is not there (with the nearest one), or one given twice.
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
    """``count`` well separated colours, uint8 (count, 3)."""
    from matplotlib import colormaps

    table = colormaps["tab20"](np.arange(count) % 20)[:, :3]
    return (table * 255).astype(np.uint8)


def colourise(task: Task, values: np.ndarray, limits: Sequence[float] | None = None) -> np.ndarray:
    """Colours for a prediction or target of one image.

    Args:
        task: whose values these are.
        values: labels (H, W), a one-channel map (H, W) or (1, H, W), or vectors (3, H, W).
        limits: (low, high) of the colour range of one-channel maps; the map's own range by default. Pass
            the ground truth's, so that a prediction's colours can be compared with it.

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
