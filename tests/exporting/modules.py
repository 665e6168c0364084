"""Small encoders and heads of one's own, which export in seconds, and some that cannot be exported."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simomerge.core.classes import register_encoder
from simomerge.datasets.tasks import Task
from simomerge.models.encoders import Features
from simomerge.models.heads import head_for
from simomerge.models.model import SimoModel

TASKS = {
    "parts": Task(
        "parts", "segmentation", classes=("wall", "floor", "sky"), colours=((9, 9, 9), (0, 255, 0), (0, 0, 255))
    ),
    "depth": Task("depth"),
    "normals": Task("normals"),
    "edges": Task("edges"),
    "flow": Task("flow"),
    "disparity": Task("disparity"),
}


@register_encoder
class SmallEncoder(nn.Module):
    """Two maps at strides 4 and 8."""

    channels, strides = (8, 12), (4, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 12, 2, 2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        fine = torch.tanh(self.stem(images))
        return fine, torch.tanh(self.down(fine))


class SecretEncoder(SmallEncoder):
    """Looks at the values of its input, which no exported graph can."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(images if images.mean() > 0.5 else -images)


class SortingHead(nn.Module):
    """Uses an operation that ONNX does not have."""

    def forward(self, features: Features) -> Tensor:
        values = torch.special.bessel_j0(features.maps[0].mean(1, keepdim=True))
        return nn.functional.interpolate(values, features.padded_size)


def small_model(
    tasks: Sequence[str] = ("parts", "depth"), encoder: nn.Module | None = None, seed: int = 0
) -> SimoModel:
    """A model with random linear heads; depth is a few metres everywhere."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = SimoModel(encoder or SmallEncoder(), {}, {})
        chosen = {name: TASKS[name] for name in tasks}
        heads = {name: head_for(model.encoder, "linear", task.channels) for name, task in chosen.items()}
        for head in heads.values():
            for parameter in head.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        if "depth" in heads:
            heads["depth"].output.bias.add_(5.0)
        return SimoModel(model.encoder, chosen, heads).eval()
