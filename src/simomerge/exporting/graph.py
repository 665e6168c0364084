"""What is exported: modules whose inputs and outputs are tensors only, around the encoder and the heads of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simomerge.core.errors import InputError
from simomerge.datasets.tasks import KINDS, Task
from simomerge.models.encoders import Features
from simomerge.models.model import SimoModel


def measure_of(task: Task) -> str:
    """How predictions of a task are compared; a key of `simomerge.runtime.MEASURES`.

    Example:
        >>> measure_of(Task("normals")), measure_of(Task("edges")), measure_of(Task("flow"))
        ('angle', 'range', 'spread')
    """
    known = {"segmentation": "labels", "normals": "angle", "depth": "relative", "disparity": "relative"}
    return known.get(task.kind) or ("range" if KINDS[task.kind].bounded else "spread")


class Outputs:
    """The outputs of some tasks: their names, what they are, and how they follow from the logits.

    Args:
        tasks: The tasks.
        raw: Give logits instead of predictions.
        probabilities: Also give the probability of every class.
    """

    def __init__(self, tasks: dict[str, Task], raw: bool = False, probabilities: bool = False) -> None:
        self.tasks, self.raw, self.probabilities = tasks, raw, probabilities

    def described(self) -> dict[str, dict[str, Any]]:
        """Output -> the entry ``outputs`` of the description in the file, without limits."""
        found = {}
        for name, task in self.tasks.items():
            if self.raw:
                found[f"{name}_logits"] = {"task": name, "unit": "", "measure": "largest"}
                continue
            unit = {"depth": "m", "segmentation": "class", "flow": "px", "regression": task.unit}.get(task.kind, "")
            found[name] = {"task": name, "unit": unit, "measure": measure_of(task)}
            if self.probabilities and task.kind == "segmentation":
                found[f"{name}_probabilities"] = {"task": name, "unit": "", "measure": "largest"}
        return found

    def __call__(self, logits: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Logits (B, C, H, W) by task -> the outputs, in the order of `described`."""
        found: list[Tensor] = []
        for name, task in self.tasks.items():
            if self.raw:
                found.append(logits[name])
                continue
            value = task.activate(logits[name])
            found.append(value[:, 0] if value.ndim == 4 and value.shape[1] == 1 else value)
            if self.probabilities and task.kind == "segmentation":
                found.append(logits[name].softmax(1))
        return tuple(found)


class WholeGraph(nn.Module):
    """Images -> outputs of the tasks."""

    def __init__(self, model: SimoModel, outputs: Outputs) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Images, see `as_floats` -> outputs (B, H, W) or (B, C, H, W) at the size of the images."""
        tasks = list(self.outputs.tasks)
        return self.outputs(self.model.decode(self.model.encode(as_floats(image), tasks), tasks))


class EncoderGraph(nn.Module):
    """Images -> the tensors of their Features, which `HeadGraph` takes."""

    def __init__(self, model: SimoModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features = self.model.encode(as_floats(image))
        if features.branches:
            raise InputError("the heads of this model read different branches; export it as one file, without --split.")
        return (*features.maps, *features.cls)


class HeadGraph(nn.Module):
    """The tensors of Features -> outputs of one task.

    Args:
        model: The model.
        outputs: The outputs of the one task.
        size: (H, W) to which the outputs are cropped; None keeps the padded size.
    """

    def __init__(self, model: SimoModel, outputs: Outputs, size: tuple[int, int] | None) -> None:
        super().__init__()
        (self.task,) = outputs.tasks
        self.head, self.outputs, self.size = model.heads[self.task], outputs, size
        self.taps, self.stride = len(model.encoder.strides), model.encoder.strides[0]

    def forward(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        maps, cls = tuple(tensors[: self.taps]), tuple(tensors[self.taps :])
        padded = (maps[0].shape[2] * self.stride, maps[0].shape[3] * self.stride)
        logits = self.head(Features(maps, cls, self.size or padded, padded))
        height, width = self.size or padded
        return self.outputs({self.task: logits[..., :height, :width]})


def as_floats(image: Tensor) -> Tensor:
    """Bytes (B, H, W, 3), or floats in [0, 1] (B, 3, H, W), as floats (B, 3, H, W). All are RGB."""
    return image.permute(0, 3, 1, 2).float() / 255 if image.dtype == torch.uint8 else image


def feature_names(model: SimoModel) -> list[str]:
    """The names of an encoder's outputs in a split export."""
    taps: Sequence[int] = model.encoder.taps
    return [f"map_{tap}" for tap in taps] + [f"cls_{tap}" for tap in taps if model.encoder.has_cls]
