"""A small convolutional encoder that declares its blocks, and a head for it."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

import simomerge as sm


class Mixer(nn.Module):
    """A depthwise convolution with a residual path, and a batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


@sm.register_encoder
class Cnn(nn.Module):
    """Blocks that keep the size, halve it and change the width; ``first`` is no block."""

    channels, strides = (6, 10), (2, 4)
    blocks = ("wide", "mixers", "down")

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(6, 10, 3, 2, 1)  # not in the order in which they run
        self.first_stem, self.wide = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 6, 1)
        self.mixers = nn.ModuleList([Mixer(6), Mixer(6)])

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.wide(self.first_stem(images)).relu()
        for mixer in self.mixers:
            x = mixer(x)
        return [x, self.down(x)]


@sm.register_head
class Head(sm.Foldable, nn.Module):
    reads: ClassVar = {"fine": (0,), "coarse": (1,)}

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.settings = {"channels": channels}
        self.fine, self.coarse, self.out = nn.Conv2d(6, 4, 1), nn.Conv2d(10, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, features: sm.Features) -> Tensor:
        fine, coarse = self.fine(features.maps[0]), self.coarse(features.maps[1])
        hidden = fine + F.interpolate(coarse, fine.shape[-2:])
        return F.interpolate(self.out(hidden.relu()), features.padded_size, mode="bilinear")
