"""Features: what an encoder gives and a head takes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Tapped patch maps and CLS tokens of a batch of images.

    Attributes:
        maps: per tap a float tensor (B, C, h, w).
        cls: per tap the CLS token, (B, C); empty where the encoder has none.
        image_size: (H, W) in pixels of the images given.
        padded_size: (H, W) in pixels the encoder saw: the image padded to whole patches on its right and
            bottom. Heads predict at this size and the model crops back.
    """

    maps: tuple[Tensor, ...]
    cls: tuple[Tensor, ...]
    image_size: tuple[int, int]
    padded_size: tuple[int, int]

    def __len__(self) -> int:
        return self.maps[0].shape[0]
