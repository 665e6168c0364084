"""Scenes as padded arrays over a batch. World coordinates are metres with z up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simomerge.datasets.rooms.builder import SceneBuilder
from simomerge.datasets.rooms.dice import Dice


@dataclass(frozen=True)
class Scenes:
    """A batch of B scenes; all arrays are NumPy, float32 unless a line below names another dtype.

    Attributes:
        position: (B, 3) camera position in metres.
        rotation: (B, 3, 3) rows: the camera's right, up and forward directions in the world.
        tangent: (B,) tangent of half the horizontal field of view.
        room: (B, 3) extent of the room in metres.
        shape: (B, SLOTS, 8) geometry of each slot, as `simomerge.datasets.rooms.slots` describes it.
        material: (B, SLOTS, len(FIELDS)) texture of each slot.
        category: (B, SLOTS) uint8 index into ``CLASS_NAMES``.
        used: (B, 5) int64 number of panels, boxes, balls, cylinders and cones.
        light: (B, 3) position of the light that casts shadows.
        light_colour: (B, 3) its linear RGB power.
        fill: (B, 3) unit direction towards a weak second light without shadows.
        ambient: (B, 2, 3) linear RGB of the light from above and from below.
        gain: (B, 3) exposure and white balance of the camera per channel.
        grain: (B,) standard deviation of the sensor noise, in units of the full range.
        noise_seed: (B,) uint32.
    """

    position: np.ndarray
    rotation: np.ndarray
    tangent: np.ndarray
    room: np.ndarray
    shape: np.ndarray
    material: np.ndarray
    category: np.ndarray
    used: np.ndarray
    light: np.ndarray
    light_colour: np.ndarray
    fill: np.ndarray
    ambient: np.ndarray
    gain: np.ndarray
    grain: np.ndarray
    noise_seed: np.ndarray

    def __len__(self) -> int:
        return len(self.position)

    def select(self, indices: Sequence[int] | np.ndarray) -> Scenes:
        """The scenes with these indices, in this order."""
        return Scenes(**{name: getattr(self, name)[indices] for name in self.__dataclass_fields__})


def sample_scenes(seed: int, split: int, indices: Sequence[int]) -> Scenes:
    """Draw scenes; each depends only on its own ``(seed, split, index)``.

    Args:
        seed: Non-negative seed of the data set.
        split: Number of the split, see ``SPLITS``.
        indices: Numbers of the scenes in the split.

    Returns:
        The scenes in the order of ``indices``.

    Example:
        >>> len(sample_scenes(0, 0, range(4)))
        4
    """
    builders = [SceneBuilder(Dice((seed, split, index))) for index in indices]
    arrays = {}
    for name in Scenes.__dataclass_fields__:
        dtype = {"category": np.uint8, "used": np.int64, "noise_seed": np.uint32}.get(name, np.float32)
        arrays[name] = np.array([getattr(builder, name) for builder in builders], dtype=dtype)
    return Scenes(**arrays)
