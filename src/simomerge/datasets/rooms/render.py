"""Ray casting of whole batches of rooms in array arithmetic.

Every pixel gets one ray through its centre: that ray gives all labels, exactly. For the image, pixels where
something visible ends (an outline, a crease, a shadow's edge) get further rays and are averaged, so outlines
are smooth at a fraction of the cost of supersampling everything. One code path serves both: rays are (B, R)
against per-scene numbers (B, 1), where R is every pixel, or the further rays of the scene that needs most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from simomerge.datasets.rooms.scenes import BALL, BOX, CONE, CYLINDER, FLOOR, PANEL, RUG, SLOTS, Scenes
from simomerge.datasets.rooms.textures import FIELDS, hash_unit, surface_colour

_NEAR = 0.02  # metres along the axis; nothing is placed closer to the camera
_FAR = 1e6
# Offsets in pixels of the further rays: a turned triangle around the centre's own ray.
_OFFSETS = ((-0.12, -0.38), (0.38, 0.09), (-0.27, 0.3))
_CURVED = 6  # number of a face that is neither of a box's six


@dataclass(frozen=True)
class _View:
    """The scenes on the computing device."""

    xp: Any
    scenes: dict[str, Any]
    used: tuple[int, ...]  # the most panels, boxes, balls, cylinders and cones of any scene

    def scene(self, name: str, *where: int) -> Any:
        """A number per scene, (B, 1)."""
        return self.scenes[name][(slice(None), *where)][:, None]

    def flat_slot(self, slot: Any) -> Any:
        """Slots (B, R) as indices into the columns of all scenes' slots."""
        return slot + self.xp.arange(slot.shape[0], dtype=self.xp.int32)[:, None] * SLOTS

    def slot(self, name: str, field: int, flat: Any) -> Any:
        """A number per ray, of the slot the ray has hit; ``flat`` from ``flat_slot``."""
        return self.xp.take(self.scenes[name + "_columns"][field], flat)


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
    used = tuple(int(count) for count in scenes.used.max(axis=0))
    view = _View(xp, _to_device(scenes, xp), used)
    column = xp.arange(pixels, dtype=xp.int32) % width
    row = xp.arange(pixels, dtype=xp.int32) // width
    px, py = column.astype(xp.float32)[None, :] + 0.5, row.astype(xp.float32)[None, :] + 0.5
    seen = _look(view, px, py, height, width)
    colours = seen["colours"]
    if supersample:
        _refine(view, seen, height, width, supersample)
    shape = (batch, height, width)
    clean = [_develop(xp, colour) for colour in colours]
    noisy = _sensor_noise(view, clean, pixels)
    flat = view.flat_slot(seen["slot"])
    return {
        "image": xp.stack(noisy, axis=-1).reshape(*shape, 3),
        "clean": xp.stack(clean, axis=-1).reshape(*shape, 3),
        "depth": seen["depth"].reshape(shape),
        "normals": xp.stack(_camera_normals(view, seen["normal"]), axis=-1).reshape(*shape, 3),
        "slot": seen["slot"].reshape(shape),
        "face": seen["face"].reshape(shape),
        "category": xp.take(view.scenes["category"].reshape(-1), flat).reshape(shape),
    }


def _to_device(scenes: Scenes, xp: Any) -> dict[str, Any]:
    arrays = {name: xp.asarray(getattr(scenes, name)) for name in Scenes.__dataclass_fields__}
    for name, fields in (("shape", 8), ("material", len(FIELDS))):
        columns = arrays[name].reshape(-1, fields)
        arrays[name + "_columns"] = [xp.ascontiguousarray(columns[:, field]) for field in range(fields)]
    return arrays


def _look(view: _View, px: Any, py: Any, height: int, width: int) -> dict[str, Any]:
    """Trace and shade the rays through the image points (px, py)."""
    zoom = view.scene("tangent") * (2.0 / width)
    x, y = (px - 0.5 * width) * zoom, (0.5 * height - py) * zoom
    direction = [
        view.scene("rotation", 0, axis) * x + view.scene("rotation", 1, axis) * y + view.scene("rotation", 2, axis)
        for axis in range(3)
    ]
    origin = [view.scene("position", axis) for axis in range(3)]
    depth, slot = _trace_room(view, origin, direction)
    # The axis component of a ray is 1, so the ray parameter is the z-depth itself.
    depth, slot = _trace_things(view, origin, direction, depth, slot, _NEAR, lamps=True)
    point = [o + depth * d for o, d in zip(origin, direction, strict=True)]
    surface = _surface(view, point, slot)
    colours, lit = _shade(view, point, direction, depth, slot, surface, zoom)
    return {"depth": depth, "slot": slot, "face": surface["face"], "normal": surface["normal"],
            "colours": colours, "lit": lit}  # fmt: skip


# Intersections ------------------------------------------------------------------------------------------


def _trace_room(view: _View, origin: list[Any], direction: list[Any]) -> tuple[Any, Any]:
    """Leave the room: the distance to the wall, floor or ceiling, with panels and the rug painted on."""
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
        cu, cv, wall, hu, hv = (view.scene("shape", number, field) for field in range(5))
        inside = (abs(along - cu) < hu) & (abs(z - cv) < hv) & (slot == wall)
        painted = xp.where(inside, number, painted)
    lx, ly, _ = _local(view, [x, y, z], [view.scene("shape", RUG, field) for field in range(8)])
    hx, hy, round_ = (view.scene("shape", RUG, field) for field in (3, 4, 5))
    qx, qy = abs(lx) / hx, abs(ly) / hy
    reach = xp.where(round_ > 1.5, qx * qx + qy * qy, xp.maximum(qx, qy))
    on_rug = (reach < 1.0) & (slot == FLOOR) & (view.scene("shape", RUG, 2) > -1.0)
    return best, xp.where(on_rug, RUG, painted)


def _local(view: _View, point: list[Any], shape: list[Any]) -> tuple[Any, Any, Any]:
    """A point in the frame of a slot."""
    x, y = point[0] - shape[0], point[1] - shape[1]
    return shape[6] * x + shape[7] * y, shape[6] * y - shape[7] * x, point[2] - shape[2]


def _trace_things(
    view: _View, origin: list[Any], direction: list[Any], best: Any, slot: Any, near: float, lamps: bool
) -> tuple[Any, Any]:
    """The nearest box, ball, cylinder or cone in front of what was hit so far."""
    xp = view.xp
    dx, dy, dz = direction
    flat = dx * dx + dy * dy + 1e-12
    inverse_flat = 1.0 / flat
    inverse_full = 1.0 / (flat + dz * dz)
    inverse_z = 1.0 / (dz + 1e-12)
    kinds = ((BOX, 1, _box), (BALL, 2, _ball), (CYLINDER, 3, _cylinder), (CONE, 4, _cone))
    for first, count, intersect in kinds[: 4 if lamps else 3]:
        for number in range(first, first + view.used[count]):
            shape = [view.scene("shape", number, field) for field in range(8)]
            start = _local(view, origin, shape)
            t = intersect(xp, start, direction, shape, (flat, inverse_flat, inverse_full, inverse_z))
            closer = (t < best) & (t > near)
            best = xp.where(closer, t, best)
            # Numbers rise through the loop, so the largest is the latest. Twice as fast as a choice.
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
    # Turned back into world axes: a ball's yaw only turns its texture.
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
    # The cap on the viewer's side is entered where its plane is met between front and back of the tube.
    cap = (xp.where(start[2] > 0, half, -half) - start[2]) * shared[3]
    t = xp.where(abs(z) <= half, side, xp.where((cap > side) & (cap < back) & (abs(start[2]) > half), cap, _FAR))
    return xp.where(discriminant > 0, t, _FAR)


def _cone(xp: Any, start: Any, direction: list[Any], shape: list[Any], shared: Any) -> Any:
    """A cone with its tip up at +half; where its tube is k (half - z) wide, k = radius / height."""
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
        t = xp.where((abs(z) <= half) & (side > _NEAR) & (discriminant > 0), xp.minimum(t, side), t)
    base = (-half - start[2]) * shared[3]
    bx, by = sx + base * direction[0], sy + base * direction[1]
    on_base = (bx * bx + by * by <= radius * radius) & (base > _NEAR)
    return xp.where(on_base, xp.minimum(t, base), t)


# Surfaces -----------------------------------------------------------------------------------------------


def _surface(view: _View, point: list[Any], slot: Any) -> dict[str, Any]:
    """Normal, face and texture coordinates of the points hit."""
    xp = view.xp
    flat = view.flat_slot(slot)
    shape = [view.slot("shape", field, flat) for field in range(8)]
    panel = (slot >= PANEL) & (slot < BOX)
    wall = xp.where(panel, shape[2].astype(xp.int32), slot)
    wall = xp.where(slot == RUG, FLOOR, wall)
    lx, ly, lz = _local(view, point, shape)
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
    # Panels keep their centre, not a yaw, in the shape: their turn is none.
    c, s = shape[6], shape[7]
    flat_floor = slot == RUG
    c, s = xp.where(flat_floor | (slot < PANEL), 1.0, c), xp.where(flat_floor | (slot < PANEL), 0.0, s)
    normal = [(c * nx - s * ny), (s * nx + c * ny), nz]
    along = xp.where(wall < 2, point[1], point[0]) - xp.where(panel, shape[0], 0.0)
    up = point[2] - xp.where(panel, shape[1], 0.0)
    vertical = inside & (wall < 4)
    u = xp.where(vertical, along, xp.where(curved, _angle(xp, lx, ly) * hx, xp.where(face < 2, ly, lx)))
    v = xp.where(vertical, up, xp.where((face >= 4) & ~curved, ly, lz))
    return {"flat": flat, "face": face, "normal": normal, "u": u, "v": v, "half_u": hx, "half_v": hy}


def _angle(xp: Any, x: Any, y: Any) -> Any:
    """The angle of (x, y) in radians, to a thousandth: library arc tangents differ between machines."""
    ax, ay = abs(x), abs(y)
    low, high = xp.minimum(ax, ay), xp.maximum(ax, ay) + 1e-12
    q = low / high
    r = q * (0.99921 + q * q * (-0.32117 + q * q * (0.14627 - q * q * 0.03899)))
    r = xp.where(ay > ax, 1.5707964 - r, r)
    r = xp.where(x < 0, 3.1415927 - r, r)
    return xp.where(y < 0, -r, r)


# Light --------------------------------------------------------------------------------------------------


def _shade(
    view: _View,
    point: list[Any],
    direction: list[Any],
    depth: Any,
    slot: Any,
    surface: dict[str, Any],
    zoom: Any,
) -> tuple[list[Any], Any]:
    """The linear colours at the points hit after exposure, and whether the light reaches them."""
    xp = view.xp
    normal = surface["normal"]
    length = xp.sqrt(_dot(direction, direction))
    facing = abs(_dot(normal, direction)) / length
    footprint = depth * zoom / xp.maximum(facing, 0.18)
    albedo, gloss, glow = surface_colour(
        xp, lambda field: view.slot("material", field, surface["flat"]),
        surface["u"], surface["v"], surface["half_u"], surface["half_v"], footprint,
    )  # fmt: skip
    light = [view.scene("light", axis) for axis in range(3)]
    beam = [p - origin for p, origin in zip(point, light, strict=True)]
    lit = _lit(view, light, beam)
    squared = _dot(beam, beam)
    towards = -_dot(normal, beam) / xp.sqrt(squared)
    lit = lit & (towards > 0)
    received = xp.where(lit, towards, 0.0) / (1.2 + squared)
    fill = xp.maximum(_dot(normal, [view.scene("fill", axis) for axis in range(3)]), 0.0) * 0.12
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


def _dot(a: list[Any], b: list[Any]) -> Any:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _lit(view: _View, light: list[Any], beam: list[Any]) -> Any:
    """Whether nothing stands between the light and the points; lamps themselves cast no shadow.

    Cast from the light, as its position is one per scene: that halves the arithmetic. The end of the beam
    is left out so that a surface does not shadow itself.
    """
    xp = view.xp
    reach = xp.full_like(beam[0], 0.995)
    nearest, _ = _trace_things(view, light, beam, reach, xp.zeros_like(beam[0], dtype=xp.int32), 0.0, lamps=False)
    return nearest >= reach


def _openness(view: _View, point: list[Any]) -> Any:
    """Cheap ambient occlusion: the room's corners, and what is close to the floor, are darker."""
    xp = view.xp
    near = []
    for axis in range(3):
        gap = xp.maximum(xp.minimum(point[axis], view.scene("room", axis) - point[axis]), 0.0)
        near.append(gap / (gap + 0.16))
    # The smallest gap is left out: a surface of the room has none to itself.
    low, high = xp.minimum(near[0], near[1]), xp.maximum(near[0], near[1])
    return 0.45 + 0.55 * high * xp.maximum(low, near[2])


def _highlight(xp: Any, normal: list[Any], direction: list[Any], length: Any, beam: list[Any], squared: Any) -> Any:
    """Blinn's highlight to the 32nd power, by squaring: powers in libraries differ between machines."""
    inverse = 1.0 / xp.sqrt(squared)
    half = [-(d / length + b * inverse) for d, b in zip(direction, beam, strict=True)]
    cosine = xp.maximum(_dot(normal, half), 0.0)
    sharp = cosine * cosine / (_dot(half, half) + 1e-9)
    for _ in range(4):
        sharp = sharp * sharp
    return sharp * 6.0


# The camera ---------------------------------------------------------------------------------------------


def _camera_normals(view: _View, normal: list[Any]) -> list[Any]:
    rows = [[view.scene("rotation", row, axis) for axis in range(3)] for row in range(3)]
    return [_dot(rows[0], normal), _dot(rows[1], normal), -_dot(rows[2], normal)]


def _refine(view: _View, seen: dict[str, Any], height: int, width: int, supersample: int) -> None:
    """Replace the colours of pixels where something ends by the average of further rays."""
    xp = view.xp
    kind = seen["slot"] * 16 + seen["face"] * 2 + seen["lit"]
    ends = changes(xp, kind.reshape(-1, height, width)).reshape(kind.shape)
    counts = ends.sum(axis=1)
    most = int(counts.max())
    if not most:
        return
    # Each scene's such pixels first; scenes with fewer than the most refine some others too, to no effect.
    pixel = xp.argsort(~ends, axis=1, kind="stable")[:, :most]
    needed = xp.arange(most)[None, :] < counts[:, None]
    x, y = (pixel % width).astype(xp.float32) + 0.5, (pixel // width).astype(xp.float32) + 0.5
    rays = [xp.concatenate([at + offset[axis] for offset in _OFFSETS[:supersample]], axis=1)
            for axis, at in enumerate((x, y))]  # fmt: skip
    further = _look(view, rays[0], rays[1], height, width)["colours"]
    scene = xp.broadcast_to(xp.arange(len(pixel))[:, None], pixel.shape)
    for colour, more in zip(seen["colours"], further, strict=True):
        # Lamps and windows are clipped first, or one bright ray would decide the pixel.
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
    """Film: a soft shoulder for the lights, then a square root as gamma."""
    return xp.sqrt(xp.minimum(1.15 * colour / (1.0 + 0.35 * colour), 1.0))


def _sensor_noise(view: _View, clean: list[Any], pixels: int) -> list[Any]:
    """Add noise hashed from the pixel's number: the same on every device and in every batch."""
    xp = view.xp
    number = xp.arange(pixels, dtype=xp.uint32)[None, :] * 0x9E3779B1 + view.scene("noise_seed")
    grain = view.scene("grain")
    noisy = []
    for channel, colour in enumerate(clean):
        first = hash_unit(xp, number + (0x51ED270B * (2 * channel + 1) & 0xFFFFFFFF))
        second = hash_unit(xp, number ^ (0x2545F491 * (channel + 1) & 0xFFFFFFFF))
        # Two uniform numbers make a triangular density, near enough to a bell; 2.45 makes its deviation 1.
        noisy.append(xp.clip(colour + grain * 2.45 * (first + second - 1.0), 0.0, 1.0))
    return noisy
