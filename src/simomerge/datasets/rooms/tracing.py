"""Where rays meet the room and the things in it."""

from __future__ import annotations

from typing import Any, NamedTuple

from simomerge.datasets.rooms.slots import BALL, BOX, CONE, CYLINDER, FLOOR, PANEL, RUG
from simomerge.datasets.rooms.view import View

NEAR = 0.02
"""Metres along the camera's axis; nothing is placed closer to the camera."""
_FAR = 1e6


class _Ray(NamedTuple):
    """The direction of rays, and what several intersections need: its squared horizontal length and three inverses."""

    x: Any
    y: Any
    z: Any
    flat: Any
    inverse_flat: Any
    inverse_full: Any
    inverse_z: Any


def trace_room(view: View, origin: list[Any], direction: list[Any]) -> tuple[Any, Any]:
    """Distance and slot of the wall, floor or ceiling that a ray hits, or of the panel or rug on it."""
    xp = view.xp
    best: Any = None
    slot: Any = None
    for axis in range(3):
        d = direction[axis] + 1e-12
        ahead = d > 0
        t = (xp.where(ahead, view.scene("room", axis), 0.0) - origin[axis]) / d
        number = 2 * axis + ahead.astype(xp.int32)
        if best is None:
            best, slot = t, number
        else:
            closer = t < best
            best, slot = xp.where(closer, t, best), xp.where(closer, number, slot)
    x, y, z = (o + best * d for o, d in zip(origin, direction, strict=True))
    along = xp.where(slot < 2, y, x)
    painted = slot
    for number in range(PANEL, PANEL + view.used[0]):
        cu, cv, wall, hu, hv = view.shape(number)[:5]
        inside = (abs(along - cu) < hu) & (abs(z - cv) < hv) & (slot == wall)
        painted = xp.where(inside, number, painted)
    rug = view.shape(RUG)
    lx, ly, _ = in_slot_frame([x, y, z], rug)
    hx, hy, round_ = rug[3:6]
    qx, qy = abs(lx) / hx, abs(ly) / hy
    reach = xp.where(round_ > 1.5, qx * qx + qy * qy, xp.maximum(qx, qy))
    on_rug = (reach < 1.0) & (slot == FLOOR) & (rug[2] > -1.0)
    return best, xp.where(on_rug, RUG, painted)


def in_slot_frame(point: list[Any], shape: list[Any]) -> tuple[Any, Any, Any]:
    """A point in the frame of a slot."""
    x, y = point[0] - shape[0], point[1] - shape[1]
    return shape[6] * x + shape[7] * y, shape[6] * y - shape[7] * x, point[2] - shape[2]


def trace_things(
    view: View, origin: list[Any], direction: list[Any], best: Any, slot: Any, near: float, lamps: bool
) -> tuple[Any, Any]:
    """Replace the distance and slot where a box, ball, cylinder or cone is nearer."""
    xp = view.xp
    dx, dy, dz = direction
    flat = dx * dx + dy * dy + 1e-12
    ray = _Ray(dx, dy, dz, flat, 1.0 / flat, 1.0 / (flat + dz * dz), 1.0 / (dz + 1e-12))
    kinds = ((BOX, 1, _box), (BALL, 2, _ball), (CYLINDER, 3, _cylinder), (CONE, 4, _cone))
    for first, count, intersect in kinds[: 4 if lamps else 3]:
        for number in range(first, first + view.used[count]):
            shape = view.shape(number)
            start = in_slot_frame(origin, shape)
            t = intersect(xp, start, ray, shape)
            closer = (t < best) & (t > near)
            best = xp.where(closer, t, best)
            # Slot numbers increase through the loop, so the maximum is the latest one. Twice as fast as `where`.
            slot = xp.maximum(slot, closer * xp.int32(number))
    return best, slot


def _box(xp: Any, start: Any, ray: _Ray, shape: list[Any]) -> Any:
    dx = shape[6] * ray.x + shape[7] * ray.y + 1e-12
    dy = shape[6] * ray.y - shape[7] * ray.x + 1e-12
    enter: Any = None
    leave: Any = None
    for axis, inverse in enumerate((1.0 / dx, 1.0 / dy, ray.inverse_z)):
        middle, reach = -start[axis] * inverse, shape[3 + axis] * abs(inverse)
        enter = middle - reach if enter is None else xp.maximum(enter, middle - reach)
        leave = middle + reach if leave is None else xp.minimum(leave, middle + reach)
    return xp.where(enter < leave, enter, _FAR)


def _unturned(start: Any, shape: list[Any]) -> tuple[Any, Any]:
    """x and y of a start in world axes, as directions are: the yaw of a round thing turns only its texture."""
    return shape[6] * start[0] - shape[7] * start[1], shape[7] * start[0] + shape[6] * start[1]


def _ball(xp: Any, start: Any, ray: _Ray, shape: list[Any]) -> Any:
    sx, sy = _unturned(start, shape)
    b = -(sx * ray.x + sy * ray.y + start[2] * ray.z)
    c = sx * sx + sy * sy + start[2] * start[2] - shape[3] * shape[3]
    discriminant = b * b - c / ray.inverse_full
    return xp.where(discriminant > 0, (b - xp.sqrt(abs(discriminant))) * ray.inverse_full, _FAR)


def _cylinder(xp: Any, start: Any, ray: _Ray, shape: list[Any]) -> Any:
    sx, sy = _unturned(start, shape)
    b = -(sx * ray.x + sy * ray.y)
    outside = sx * sx + sy * sy - shape[3] * shape[3]
    discriminant = b * b - ray.flat * outside
    root = xp.sqrt(abs(discriminant))
    side, back = (b - root) * ray.inverse_flat, (b + root) * ray.inverse_flat
    half = shape[5]
    z = start[2] + side * ray.z
    # A ray enters through the near cap if it meets the cap's plane between the front and the back of the tube.
    cap = (xp.where(start[2] > 0, half, -half) - start[2]) * ray.inverse_z
    t = xp.where(abs(z) <= half, side, xp.where((cap > side) & (cap < back) & (abs(start[2]) > half), cap, _FAR))
    return xp.where(discriminant > 0, t, _FAR)


def _cone(xp: Any, start: Any, ray: _Ray, shape: list[Any]) -> Any:
    """A cone with its tip up at z = half; its radius at z is k (half - z), with k = radius / height."""
    sx, sy = _unturned(start, shape)
    half, radius = shape[5], shape[3]
    slope = radius / (2 * half)
    slope = slope * slope
    below = half - start[2]
    a = ray.flat - slope * ray.z * ray.z
    a = xp.where(abs(a) < 1e-9, 1e-9, a)
    b = sx * ray.x + sy * ray.y + slope * below * ray.z
    c = sx * sx + sy * sy - slope * below * below
    discriminant = b * b - a * c
    root = xp.sqrt(abs(discriminant))
    t = xp.full_like(discriminant, _FAR)
    for sign in (-1.0, 1.0):
        side = (sign * root - b) / a
        z = start[2] + side * ray.z
        t = xp.where((abs(z) <= half) & (side > NEAR) & (discriminant > 0), xp.minimum(t, side), t)
    base = (-half - start[2]) * ray.inverse_z
    bx, by = sx + base * ray.x, sy + base * ray.y
    on_base = (bx * bx + by * by <= radius * radius) & (base > NEAR)
    return xp.where(on_base, xp.minimum(t, base), t)
