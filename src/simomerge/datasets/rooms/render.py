"""Ray casting of batches of rooms in array arithmetic.

One ray through the centre of every pixel gives all labels, exactly. In the image, pixels at an outline, a crease or
a shadow's edge are averaged over further rays, which makes outlines smooth at a fraction of the cost of supersampling
every pixel. The same code casts both: rays are (B, R) and numbers per scene (B, 1), where R is the number of pixels,
or the largest number of further rays in any scene.
"""

from __future__ import annotations

from typing import Any

from simomerge.datasets.rooms.scenes import Scenes
from simomerge.datasets.rooms.shading import shade, surface_at
from simomerge.datasets.rooms.textures import hash_unit
from simomerge.datasets.rooms.tracing import NEAR, trace_room, trace_things
from simomerge.datasets.rooms.view import View, dot

_OFFSETS = ((-0.12, -0.38), (0.38, 0.09), (-0.27, 0.3))
"""Offsets in pixels of the further rays: a turned triangle around the pixel's centre."""


def render(scenes: Scenes, height: int, width: int, xp: Any = None, supersample: int = 3) -> dict[str, Any]:
    """Cast all rays of a batch.

    Args:
        scenes: B scenes.
        height, width: Size of the pictures in pixels.
        xp: The array namespace to compute with: NumPy (default) or CuPy.
        supersample: Further rays (0 to 3) in pixels where something ends.

    Returns:
        Arrays of ``xp``: "image" (B, H, W, 3) float32 in [0, 1] with sensor noise, "clean" the same without,
        "depth" (B, H, W) float32 z-depth in metres, "normals" (B, H, W, 3) float32 unit vectors in camera
        space (x right, y up, z towards the camera), "slot" (B, H, W) int32 the thing hit, "face"
        (B, H, W) int32 which of its faces, "category" (B, H, W) uint8 index into ``CLASS_NAMES``.

    Example:
        >>> render(sample_scenes(0, 0, [7]), 64, 80)["depth"].shape
        (1, 64, 80)
    """
    if xp is None:
        import numpy as xp
    batch, pixels = len(scenes), height * width
    view = View.of(scenes, xp)
    column = xp.arange(pixels, dtype=xp.int32) % width
    row = xp.arange(pixels, dtype=xp.int32) // width
    px, py = column.astype(xp.float32)[None, :] + 0.5, row.astype(xp.float32)[None, :] + 0.5
    hits = _cast(view, px, py, height, width)
    if supersample:
        _refine(view, hits, height, width, supersample)
    shape = (batch, height, width)
    clean = [_develop(xp, colour) for colour in hits["colours"]]
    noisy = _sensor_noise(view, clean, pixels)
    flat = view.flat_slot(hits["slot"])
    return {
        "image": xp.stack(noisy, axis=-1).reshape(*shape, 3),
        "clean": xp.stack(clean, axis=-1).reshape(*shape, 3),
        "depth": hits["depth"].reshape(shape),
        "normals": xp.stack(_camera_normals(view, hits["normal"]), axis=-1).reshape(*shape, 3),
        "slot": hits["slot"].reshape(shape),
        "face": hits["face"].reshape(shape),
        "category": xp.take(view.scenes["category"].reshape(-1), flat).reshape(shape),
    }


def _cast(view: View, px: Any, py: Any, height: int, width: int) -> dict[str, Any]:
    """Trace and shade the rays through the image points (px, py)."""
    zoom = view.scene("tangent") * (2.0 / width)
    x, y = (px - 0.5 * width) * zoom, (0.5 * height - py) * zoom
    right, up, forward = (view.vector("rotation", row) for row in range(3))
    direction = [right[axis] * x + up[axis] * y + forward[axis] for axis in range(3)]
    origin = view.vector("position")
    depth, slot = trace_room(view, origin, direction)
    # The component of a ray along the camera's axis is 1, so the ray parameter is the z-depth itself.
    depth, slot = trace_things(view, origin, direction, depth, slot, NEAR, lamps=True)
    point = [o + depth * d for o, d in zip(origin, direction, strict=True)]
    surface = surface_at(view, point, slot)
    colours, lit = shade(view, point, direction, depth * zoom, surface)
    return {
        "depth": depth,
        "slot": slot,
        "face": surface.face,
        "normal": surface.normal,
        "colours": colours,
        "lit": lit,
    }


def _camera_normals(view: View, normal: list[Any]) -> list[Any]:
    right, up, forward = (dot(view.vector("rotation", row), normal) for row in range(3))
    return [right, up, -forward]


def _refine(view: View, hits: dict[str, Any], height: int, width: int, supersample: int) -> None:
    """Replace the colours of pixels where something ends by the average of further rays."""
    xp = view.xp
    kind = hits["slot"] * 16 + hits["face"] * 2 + hits["lit"]
    ends = changes(xp, kind.reshape(-1, height, width)).reshape(kind.shape)
    counts = ends.sum(axis=1)
    most = int(counts.max())
    if not most:
        return
    # Pixels to refine come first. A scene with fewer of them than another also casts rays for pixels whose result
    # is discarded.
    pixel = xp.argsort(~ends, axis=1, kind="stable")[:, :most]
    needed = xp.arange(most)[None, :] < counts[:, None]
    x, y = (pixel % width).astype(xp.float32) + 0.5, (pixel // width).astype(xp.float32) + 0.5
    rays = [
        xp.concatenate([at + offset[axis] for offset in _OFFSETS[:supersample]], axis=1)
        for axis, at in enumerate((x, y))
    ]
    further = _cast(view, rays[0], rays[1], height, width)["colours"]
    scene = xp.broadcast_to(xp.arange(len(pixel))[:, None], pixel.shape)
    for colour, more in zip(hits["colours"], further, strict=True):
        # Lamps and windows are clipped first; otherwise one bright ray would determine the pixel.
        more, first = xp.minimum(more, 2.0), colour[scene, pixel]
        total = sum((more[:, k * most : (k + 1) * most] for k in range(supersample)), xp.minimum(first, 2.0))
        colour[scene, pixel] = xp.where(needed, total * (1.0 / (supersample + 1)), first)


def changes(xp: Any, kind: Any) -> Any:
    """Pixels of (B, H, W) whose right, lower, left or upper neighbour differs: bool (B, H, W)."""
    across = kind[:, :, 1:] != kind[:, :, :-1]
    down = kind[:, 1:] != kind[:, :-1]
    column = xp.zeros_like(across[:, :, :1])
    row = xp.zeros_like(down[:, :1])
    across = xp.concatenate([across, column], axis=2) | xp.concatenate([column, across], axis=2)
    return across | xp.concatenate([down, row], axis=1) | xp.concatenate([row, down], axis=1)


def _develop(xp: Any, colour: Any) -> Any:
    """Tone mapping: compress bright values, then take a square root as gamma."""
    return xp.sqrt(xp.minimum(1.15 * colour / (1.0 + 0.35 * colour), 1.0))


def _sensor_noise(view: View, clean: list[Any], pixels: int) -> list[Any]:
    """Add noise that is hashed from the pixel's number, so that it is the same on every device and in every batch."""
    xp = view.xp
    number = xp.arange(pixels, dtype=xp.uint32)[None, :] * 0x9E3779B1 + view.scene("noise_seed")
    grain = view.scene("grain")
    noisy = []
    for channel, colour in enumerate(clean):
        first = hash_unit(xp, number + (0x51ED270B * (2 * channel + 1) & 0xFFFFFFFF))
        second = hash_unit(xp, number ^ (0x2545F491 * (channel + 1) & 0xFFFFFFFF))
        # The sum of two uniform numbers is close enough to a normal one; 2.45 makes its standard deviation 1.
        noisy.append(xp.clip(colour + grain * 2.45 * (first + second - 1.0), 0.0, 1.0))
    return noisy
