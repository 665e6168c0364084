"""Features: the output of an encoder and the input of a head."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    """

    maps: tuple[Tensor, ...]
    cls: tuple[Tensor, ...]
    image_size: tuple[int, int]
    padded_size: tuple[int, int]

    def __len__(self) -> int:
        return self.maps[0].shape[0]

    def of_images(self, indices: Tensor) -> Features:
        """The features of some images of the batch."""
        return replace(
            self, maps=tuple(each[indices] for each in self.maps), cls=tuple(each[indices] for each in self.cls)
        )

    def grid(self, tap: int) -> tuple[int, int]:
        """(h, w) of the map of one tap."""
        height, width = self.maps[tap].shape[-2:]
        return height, width
