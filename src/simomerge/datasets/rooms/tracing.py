"""Where rays meet the room and the things in it."""

from __future__ import annotations

from typing import Any

from simomerge.datasets.rooms.slots import BALL, BOX, CONE, CYLINDER, FLOOR, PANEL, RUG
from simomerge.datasets.rooms.view import View

NEAR = 0.02
"""Metres along the camera's axis; nothing is placed closer to the camera."""
_FAR = 1e6


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
    inverse_flat = 1.0 / flat
    inverse_full = 1.0 / (flat + dz * dz)
    inverse_z = 1.0 / (dz + 1e-12)
    kinds = ((BOX, 1, _box), (BALL, 2, _ball), (CYLINDER, 3, _cylinder), (CONE, 4, _cone))
    for first, count, intersect in kinds[: 4 if lamps else 3]:
        for number in range(first, first + view.used[count]):
            shape = view.shape(number)
            start = in_slot_frame(origin, shape)
            t = intersect(xp, start, direction, shape, (flat, inverse_flat, inverse_full, inverse_z))
            closer = (t < best) & (t > near)
            best = xp.where(closer, t, best)
            # Slot numbers increase through the loop, so the maximum is the latest one. Twice as fast as `where`.
            slot = xp.maximum(slot, closer * xp.int32(number))
    return best, slot


def _box(xp: Any, start: Any, direction: list[Any], shape: list[Any], shared: Any) -> Any:
    dx = shape[6] * direction[0] + shape[7] * direction[1] + 1e-12
    dy = shape[6] * direction[1] - shape[7] * direction[0] + 1e-12
    enter: Any = None
    leave: Any = None
    for axis, inverse in enumerate((1.0 / dx, 1.0 / dy, shared[3])):
        middle, reach = -start[axis] * inverse, shape[3 + axis] * abs(inverse)
        enter = middle - reach if enter is None else xp.maximum(enter, middle - reach)
        leave = middle + reach if leave is None else xp.minimum(leave, middle + reach)
    return xp.where(enter < leave, enter, _FAR)


def _ball(xp: Any, start: Any, direction: list[Any], shape: list[Any], shared: Any) -> Any:
    # The yaw of a ball turns only its texture, so the start goes back to world axes, in which the direction is.
    sx = shape[6] * start[0] - shape[7] * start[1]
    sy = shape[7] * start[0] + shape[6] * start[1]
    b = -(sx * direction[0] + sy * direction[1] + start[2] * direction[2])
    c = sx * sx + sy * sy + start[2] * start[2] - shape[3] * shape[3]
    discriminant = b * b - c / shared[2]
    return xp.where(discriminant > 0, (b - xp.sqrt(abs(discriminant))) * shared[2], _FAR)


def _cylinder(xp: Any, start: Any, direction: list[Any], shape: list[Any], shared: Any) -> Any:
    dx = direction[0]
    dy = direction[1]
    sx = shape[6] * start[0] - shape[7] * start[1]
    sy = shape[7] * start[0] + shape[6] * start[1]
    b = -(sx * dx + sy * dy)
    outside = sx * sx + sy * sy - shape[3] * shape[3]
    discriminant = b * b - shared[0] * outside
    root = xp.sqrt(abs(discriminant))
    side, back = (b - root) * shared[1], (b + root) * shared[1]
    half = shape[5]
    z = start[2] + side * direction[2]
    # A ray enters through the near cap if it meets the cap's plane between the front and the back of the tube.
    cap = (xp.where(start[2] > 0, half, -half) - start[2]) * shared[3]
    t = xp.where(abs(z) <= half, side, xp.where((cap > side) & (cap < back) & (abs(start[2]) > half), cap, _FAR))
    return xp.where(discriminant > 0, t, _FAR)


def _cone(xp: Any, start: Any, direction: list[Any], shape: list[Any], shared: Any) -> Any:
    """A cone with its tip up at z = half; its radius at z is k (half - z), with k = radius / height."""
    sx = shape[6] * start[0] - shape[7] * start[1]
    sy = shape[7] * start[0] + shape[6] * start[1]
    dz = direction[2]
    half, radius = shape[5], shape[3]
    slope = radius / (2 * half)
    slope = slope * slope
    below = half - start[2]
    a = shared[0] - slope * dz * dz
    a = xp.where(abs(a) < 1e-9, 1e-9, a)
    b = sx * direction[0] + sy * direction[1] + slope * below * dz
    c = sx * sx + sy * sy - slope * below * below
    discriminant = b * b - a * c
    root = xp.sqrt(abs(discriminant))
    t = xp.full_like(discriminant, _FAR)
    for sign in (-1.0, 1.0):
        side = (sign * root - b) / a
        z = start[2] + side * dz
        t = xp.where((abs(z) <= half) & (side > NEAR) & (discriminant > 0), xp.minimum(t, side), t)
    base = (-half - start[2]) * shared[3]
    bx, by = sx + base * direction[0], sy + base * direction[1]
    on_base = (bx * bx + by * by <= radius * radius) & (base > NEAR)
    return xp.where(on_base, xp.minimum(t, base), t)
