"""A batch of scenes on the computing device, as the renderer's modules read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from simomerge.datasets.rooms.scenes import Scenes
from simomerge.datasets.rooms.slots import SLOTS
from simomerge.datasets.rooms.textures import FIELDS


@dataclass(frozen=True)
class View:
    """The scenes on the computing device.

    Attributes:
        xp: the array namespace, NumPy or CuPy.
        scenes: the fields of `Scenes`, and the columns of "shape" and "material" as contiguous arrays.
        used: the largest numbers of panels, boxes, balls, cylinders and cones in any scene.
    """

    xp: Any
    scenes: dict[str, Any]
    used: tuple[int, ...]

    @classmethod
    def of(cls, scenes: Scenes, xp: Any) -> View:
        arrays = {name: xp.asarray(getattr(scenes, name)) for name in Scenes.__dataclass_fields__}
        for name, fields in (("shape", 8), ("material", len(FIELDS))):
            columns = arrays[name].reshape(-1, fields)
            arrays[name + "_columns"] = [xp.ascontiguousarray(columns[:, field]) for field in range(fields)]
        return cls(xp, arrays, tuple(int(count) for count in scenes.used.max(axis=0)))

    def scene(self, name: str, *where: int) -> Any:
        """A number per scene, (B, 1)."""
        return self.scenes[name][(slice(None), *where)][:, None]

    def vector(self, name: str, *where: int) -> list[Any]:
        """The x, y and z of a vector per scene, each (B, 1)."""
        return [self.scene(name, *where, axis) for axis in range(3)]

    def shape(self, slot: int) -> list[Any]:
        """The eight numbers of a slot's shape per scene, each (B, 1)."""
        return [self.scene("shape", slot, field) for field in range(8)]

    def flat_slot(self, slot: Any) -> Any:
        """Slots (B, R) as indices into the columns of all scenes' slots."""
        return slot + self.xp.arange(slot.shape[0], dtype=self.xp.int32)[:, None] * SLOTS

    def slot(self, name: str, field: int, flat: Any) -> Any:
        """A number per ray, of the slot that the ray hits; ``flat`` is from `flat_slot`."""
        return self.xp.take(self.scenes[name + "_columns"][field], flat)


def dot(a: list[Any], b: list[Any]) -> Any:
    """The scalar product of two vectors given as lists of their x, y and z."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
