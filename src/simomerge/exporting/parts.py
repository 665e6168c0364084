"""The graphs of an export: the whole model, or the encoder and one graph per head. Each has example inputs to trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from simomerge.core.errors import InputError
from simomerge.exporting.graph import EncoderGraph, HeadGraph, Outputs, WholeGraph, feature_names
from simomerge.exporting.onnx_file import traced
from simomerge.exporting.options import Options
from simomerge.models.model import SimoModel

MAX_BATCH = 4096

LEAST_PATCHES = 3
"""Patches, or places of the last stage, on each side of the smallest image of an export with free sizes."""


@dataclass(frozen=True)
class Part:
    """One graph of an export.

    Attributes:
        name: "model", "encoder", or a task.
        graph: The module.
        example: Its input: one tensor, or a list of them.
        shapes: Which sizes of the input are free, as torch.export wants it.
        inputs, outputs: The names of its tensors.
        described: The outputs with their task and unit; empty for an encoder.
    """

    name: str
    graph: nn.Module
    example: Any
    shapes: Any
    inputs: list[str]
    outputs: list[str]
    described: dict[str, Any] = field(default_factory=dict)

    def program(self) -> torch.export.ExportedProgram:
        """The traced graph. Raises what torch raises if it cannot be traced."""
        return traced(self.graph, self.example, self.shapes)


def parts_of(model: SimoModel, outputs: Outputs, options: Options, size: tuple[int, int]) -> Iterator[Part]:
    """The graphs to write: one, or with ``options.split`` the encoder first and then the heads."""
    batch = Dim("batch", max=MAX_BATCH)
    sides = (Dim("rows", min=LEAST_PATCHES), Dim("columns", min=LEAST_PATCHES)) if options.dynamic else None
    image, step = _example(model, options, size), model.encoder.multiple
    first = 1 if image.dtype == torch.uint8 else 2
    free: dict[int, Any] = {0: batch}
    if sides:
        free |= {first + axis: step * side for axis, side in enumerate(sides)}
    if not options.split:
        described = outputs.described()
        yield Part("model", WholeGraph(model, outputs), image, free, ["image"], list(described), described)
        return
    if wrong := [name for name in outputs.tasks if name in ("encoder", "model")]:
        raise InputError(f"the file of task {wrong[0]!r} would have the name of another part: export without split.")
    names, encoder = feature_names(model), EncoderGraph(model)
    yield Part("encoder", encoder, image, free, ["image"], names)
    with torch.no_grad():
        features = list(encoder(image))
    shapes: list[dict[int, Any]] = [{0: batch} for _ in features]
    if sides:
        for shape, stride in zip(shapes, model.encoder.strides, strict=False):
            shape.update({2 + axis: step // stride * side for axis, side in enumerate(sides)})
    for name, task in outputs.tasks.items():
        own = Outputs({name: task}, outputs.raw, outputs.probabilities)
        head = HeadGraph(model, own, None if options.dynamic else size)
        described = own.described()
        yield Part(name, head, features, shapes, names, list(described), described)


def _example(model: SimoModel, options: Options, size: tuple[int, int]) -> Tensor:
    """Two black images; in whole patches if sizes are free."""
    least = LEAST_PATCHES * model.encoder.multiple
    height, width = model.encoder.padded(*(max(side, least) for side in size)) if options.dynamic else size
    if options.layout == "bytes":
        return torch.zeros(2, height, width, 3, dtype=torch.uint8)
    return torch.zeros(2, 3, height, width)
