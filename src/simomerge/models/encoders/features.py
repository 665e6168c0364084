"""Features: the output of an encoder and the input of a head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Feature maps and CLS tokens of a batch of images.

    Attributes:
        maps: One float tensor (B, C, h, w) per tap.
        cls: One CLS token (B, C) per tap; empty if the encoder has no CLS token.
        image_size: (H, W) of the images in pixels.
        padded_size: (H, W) in pixels after padding the right and bottom sides to whole patches. Heads predict at
            this size, and the model crops the predictions to the size of the images.
        branches: Features by task, if the encoder is a tree whose branches differ. There are no ``maps`` then.
    """

    maps: tuple[Tensor, ...]
    cls: tuple[Tensor, ...]
    image_size: tuple[int, int]
    padded_size: tuple[int, int]
    branches: Mapping[str, Features] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.maps[0].shape[0]

    def of_images(self, indices: Tensor) -> Features:
        """The features of some images of the batch."""
        return replace(
            self, maps=tuple(each[indices] for each in self.maps), cls=tuple(each[indices] for each in self.cls)
        )

    def of(self, task: str) -> Features:
        """What the head of a task reads: its branch of a tree, or these features."""
        return self.branches[task] if self.branches else self

    def grid(self, tap: int) -> tuple[int, int]:
        """(h, w) of the map of one tap."""
        height, width = self.maps[tap].shape[-2:]
        return height, width
