"""Predictions from logits, and what `SimoModel.predict` returns: a dictionary that notebooks show as pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from markupsafe import Markup
from torch import Tensor

from simomerge.datasets.colours import colourise
from simomerge.datasets.legend import Legend, legend_of
from simomerge.datasets.tasks import Task

SHOWN_WIDTH = 320
"""Width of a picture in a notebook, in CSS pixels."""


class Predictions(dict[str, np.ndarray]):
    """Task -> prediction of one image. In a notebook it displays itself, with colours and legends.

    Attributes:
        tasks: The tasks by name, which say how to colour and to label the predictions.

    Example:
        >>> found = Predictions({"depth": Task("depth")}, {"depth": np.array([[1.0, 2.0]], np.float32)})
        >>> found["depth"].shape, "2 m" in found._repr_html_()
        ((1, 2), True)
    """

    def __init__(self, tasks: Mapping[str, Task], maps: Mapping[str, np.ndarray]) -> None:
        super().__init__(maps)
        self.tasks = {name: tasks[name] for name in maps}

    def __reduce__(self) -> tuple[type[Predictions], tuple[dict[str, Task], dict[str, np.ndarray]]]:
        return Predictions, (self.tasks, dict(self))

    def _repr_html_(self) -> str:
        """The predictions as coloured pictures with legends, in HTML without scripts."""
        figures = Markup("").join(_figure(self.tasks[name], values) for name, values in self.items())
        return str(
            Markup('<div style="display:flex;flex-wrap:wrap;gap:1em;align-items:start">{}</div>').format(figures)
        )


def predicted(task: Task, logits: Tensor, size: Sequence[int]) -> Tensor:
    """The prediction of a task from logits, at the size of an image, which may have been downscaled for the encoder."""
    logits = logits.float()
    if logits.shape[-2:] == size:
        return task.activate(logits)
    upscaled = partial(F.interpolate, size=tuple(size), mode="bilinear", align_corners=False)
    if task.behaviour.channels is not None:
        values = upscaled(logits)
        if task.kind == "flow":  # in pixels of the image that the encoder got; channels 0 and 1 are x and y
            values *= values.new_tensor([size[1] / logits.shape[-1], size[0] / logits.shape[-2]])[:, None, None]
        return task.activate(values)
    # Labels, class by class: the logits of all classes at the size of a photograph take gigabytes.
    best = upscaled(logits[:, :1])
    labels = torch.zeros_like(best, dtype=torch.int64)
    for number in range(1, logits.shape[1]):
        found = upscaled(logits[:, number : number + 1])
        labels[found > best] = number
        torch.maximum(best, found, out=best)
    return labels[:, 0]


def _figure(task: Task, values: np.ndarray) -> Markup:
    from PIL import Image

    target = io.BytesIO()
    Image.fromarray(colourise(task, values)).save(target, "PNG")
    content = base64.b64encode(target.getvalue()).decode("ascii")
    return Markup(
        '<figure style="margin:0;width:{0}px;max-width:100%"><img alt="{1}" src="data:image/png;base64,{2}"'
        ' style="width:100%;image-rendering:pixelated"><figcaption><b>{1}</b> {3}</figcaption></figure>'
    ).format(SHOWN_WIDTH, task.name, content, _caption(legend_of(task, values)))


def _caption(legend: Legend) -> Markup:
    if legend.bar is not None:
        colours = ",".join(_css(colour) for colour in legend.bar[:: len(legend.bar) // 8])
        style = "display:inline-block;width:6em;height:.7em;background:linear-gradient(90deg,{})"
        bar = f'{{}} <span style="{style}"></span> {{}}'
        return Markup(bar).format(legend.low, colours, legend.high)
    square = "display:inline-block;width:.7em;height:.7em;border:1px solid #808080;background:{}"
    swatch = Markup(f'<span style="white-space:nowrap"><span style="{square}"></span> {{}}</span> ')
    return Markup("").join(swatch.format(_css(colour), name) for name, colour in legend.entries)


def _css(colour: Sequence[int]) -> str:
    return "#" + "".join(f"{int(channel):02x}" for channel in colour)
