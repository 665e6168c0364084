"""Surfaces and light: normals, texture coordinates and colours of the points that rays hit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from simomerge.datasets.rooms.slots import BALL, BOX, CONE, CYLINDER, FLOOR, PANEL, RUG
from simomerge.datasets.rooms.textures import Place, surface_colour
from simomerge.datasets.rooms.tracing import in_slot_frame, trace_things
from simomerge.datasets.rooms.view import View, dot

_CURVED = 6
"""The face of a curved surface; 0 to 5 are the sides of a box."""


@dataclass(frozen=True)
class Surface:
    """What rays have hit, an array (B, R) each: indices of the slots, faces, normals, and places for the texture."""

    flat: Any
    face: Any
    normal: list[Any]
    u: Any
    v: Any
    half_u: Any
    half_v: Any


def surface_at(view: View, point: list[Any], slot: Any) -> Surface:
    """Normals, faces and texture coordinates of the points hit."""
    xp = view.xp
    flat = view.flat_slot(slot)
    shape = [view.slot("shape", field, flat) for field in range(8)]
    panel = (slot >= PANEL) & (slot < BOX)
    wall = xp.where(panel, shape[2].astype(xp.int32), slot)
    wall = xp.where(slot == RUG, FLOOR, wall)
    lx, ly, lz = in_slot_frame(point, shape)
    hx, hy, hz = shape[3:6]
    qx, qy, qz = abs(lx) / hx, abs(ly) / hy, abs(lz) / hz
    axis = xp.where(qz >= xp.maximum(qx, qy), 2, (qy > qx) * 1)
    positive = xp.where(axis == 0, lx, xp.where(axis == 1, ly, lz)) > 0
    round_ = slot >= BALL
    spread = lx * lx + ly * ly
    cylinder, cone = (slot >= CYLINDER) & (slot < CONE), slot >= CONE
    capped = (cylinder & (qz * qz * hx * hx >= spread)) | (cone & (lz < -0.999 * hz))
    curved = round_ & ~capped
    face = xp.where(round_, xp.where(capped, 4 + (lz > 0), _CURVED), 2 * axis + positive)
    # The room is seen from inside: the surface at the far end faces back.
    inside = slot < BOX
    face = xp.where(inside, wall ^ 1, face).astype(xp.int32)
    sign = (2 * (face & 1) - 1).astype(xp.float32)
    ring = xp.sqrt(spread) + 1e-9
    tube = slot >= CYLINDER
    rise = xp.where(cone, ring * (0.5 * hx / hz), xp.where(tube, 0.0, lz))
    nx = xp.where(curved, lx, xp.where(face < 2, sign, 0.0))
    ny = xp.where(curved, ly, xp.where((face & 6) == 2, sign, 0.0))
    nz = xp.where(curved, rise, xp.where((face & 6) == 4, sign, 0.0))
    scale = 1.0 / xp.sqrt(nx * nx + ny * ny + nz * nz)
    nx, ny, nz = nx * scale, ny * scale, nz * scale
    # The room's surfaces and the rug have normals in world axes, whatever their yaw.
    unturned = (slot == RUG) | (slot < PANEL)
    c, s = xp.where(unturned, 1.0, shape[6]), xp.where(unturned, 0.0, shape[7])
    normal = [(c * nx - s * ny), (s * nx + c * ny), nz]
    along = xp.where(wall < 2, point[1], point[0]) - xp.where(panel, shape[0], 0.0)
    up = point[2] - xp.where(panel, shape[1], 0.0)
    vertical = inside & (wall < 4)
    u = xp.where(vertical, along, xp.where(curved, _angle(xp, lx, ly) * hx, xp.where(face < 2, ly, lx)))
    v = xp.where(vertical, up, xp.where((face >= 4) & ~curved, ly, lz))
    return Surface(flat, face, normal, u, v, hx, hy)


def _angle(xp: Any, x: Any, y: Any) -> Any:
    """The angle of (x, y) in radians, to a thousandth: library arc tangents differ between machines."""
    ax, ay = abs(x), abs(y)
    low, high = xp.minimum(ax, ay), xp.maximum(ax, ay) + 1e-12
    q = low / high
    r = q * (0.99921 + q * q * (-0.32117 + q * q * (0.14627 - q * q * 0.03899)))
    r = xp.where(ay > ax, 1.5707964 - r, r)
    r = xp.where(x < 0, 3.1415927 - r, r)
    return xp.where(y < 0, -r, r)


def shade(view: View, point: list[Any], direction: list[Any], pixel: Any, surface: Surface) -> tuple[list[Any], Any]:
    """The linear colours at the points hit after exposure, and whether the light reaches them.

    ``pixel`` is the size of a pixel in metres at the depth of each point.
    """
    xp, normal = view.xp, surface.normal
    length = xp.sqrt(dot(direction, direction))
    facing = abs(dot(normal, direction)) / length
    place = Place(surface.u, surface.v, surface.half_u, surface.half_v, pixel / xp.maximum(facing, 0.18))
    albedo, gloss, glow = surface_colour(xp, lambda field: view.slot("material", field, surface.flat), place)
    light = view.vector("light")
    beam = [p - origin for p, origin in zip(point, light, strict=True)]
    lit = _lit(view, light, beam)
    squared = dot(beam, beam)
    towards = -dot(normal, beam) / xp.sqrt(squared)
    lit = lit & (towards > 0)
    received = xp.where(lit, towards, 0.0) / (1.2 + squared)
    fill = xp.maximum(dot(normal, view.vector("fill")), 0.0) * 0.12
    open_ = _openness(view, point)
    upward = 0.5 + 0.5 * normal[2]
    shine = _highlight(xp, normal, direction, length, beam, squared) * gloss * received
    colours = []
    for channel in range(3):
        above, below = view.scene("ambient", 0, channel), view.scene("ambient", 1, channel)
        power = view.scene("light_colour", channel)
        total = (below + (above - below) * upward + fill) * open_ + power * received
        total = albedo[channel] * (total + glow) + power * shine
        colours.append(total * view.scene("gain", channel))
    return colours, lit


def _lit(view: View, light: list[Any], beam: list[Any]) -> Any:
    """Whether nothing stands between the light and the points; lamps themselves cast no shadow.

    Rays start at the light, which has one position per scene: that halves the arithmetic. They end just before the
    point, so that a surface does not shadow itself.
    """
    xp = view.xp
    reach = xp.full_like(beam[0], 0.995)
    nearest, _ = trace_things(view, light, beam, reach, xp.zeros_like(beam[0], dtype=xp.int32), 0.0, lamps=False)
    return nearest >= reach


def _openness(view: View, point: list[Any]) -> Any:
    """Cheap ambient occlusion: the room's corners and whatever is close to the floor are darker."""
    xp = view.xp
    near = []
    for axis in range(3):
        gap = xp.maximum(xp.minimum(point[axis], view.scene("room", axis) - point[axis]), 0.0)
        near.append(gap / (gap + 0.16))
    # The smallest gap is left out: a point on a surface of the room has a gap of zero to that surface.
    low, high = xp.minimum(near[0], near[1]), xp.maximum(near[0], near[1])
    return 0.45 + 0.55 * high * xp.maximum(low, near[2])


def _highlight(xp: Any, normal: list[Any], direction: list[Any], length: Any, beam: list[Any], squared: Any) -> Any:
    """Blinn's highlight to the 32nd power, by squaring: the power functions of libraries differ between machines."""
    inverse = 1.0 / xp.sqrt(squared)
    half = [-(d / length + b * inverse) for d, b in zip(direction, beam, strict=True)]
    cosine = xp.maximum(dot(normal, half), 0.0)
    sharp = cosine * cosine / (dot(half, half) + 1e-9)
    for _ in range(4):
        sharp = sharp * sharp
    return sharp * 6.0
