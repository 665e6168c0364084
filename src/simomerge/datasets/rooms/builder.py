"""Random layouts: one scene is built by drawing its room, camera, light and things in a fixed order."""

from __future__ import annotations

import math

from simomerge.datasets.rooms.dice import Dice
from simomerge.datasets.rooms.slots import (
    BALL,
    BOX,
    BOXES,
    CEILING,
    CLASS_NUMBERS,
    CONE,
    CONES,
    CYLINDER,
    CYLINDERS,
    FLOOR,
    LIMITS,
    PANEL,
    PANELS,
    RUG,
    SLOTS,
)
from simomerge.datasets.rooms.textures import FIELDS, sample_material

_NOWHERE = (0.0, 0.0, -1000.0, 0.1, 0.1, 0.1, 1.0, 0.0)


class SceneBuilder:
    """One scene under construction. The order of the random draws is part of the data set's definition."""

    def __init__(self, dice: Dice) -> None:
        self.dice = dice
        self.noise_seed = dice.below(1 << 32)
        self.shape = [list(_NOWHERE) for _ in range(SLOTS)]
        self.category = [0] * SLOTS
        self.material = [[0.0] * len(FIELDS) for _ in range(SLOTS)]
        self.counts = dict.fromkeys(LIMITS, 0)
        self.taken: list[tuple[float, float, float]] = []  # circles on the floor: x, y, radius
        self.tops: list[tuple[float, float, float, float]] = []  # places to stand on: x, y, z, radius
        self._room()
        self._camera()
        self._light()
        self._panels()
        for _ in range(dice.pick((2, 2, 3, 3, 4))):
            dice.pick((self._block, self._block, self._cabinet, self._cabinet, self._table, self._sofa))()
        for _ in range(dice.pick((0, 0, 0, 1, 1, 2))):
            self._column()
        for _ in range(dice.pick((1, 1, 2, 2, 3, 3))):
            self._ball()
        if dice.chance(0.35):
            self._floor_lamp()
        for _ in range(dice.pick((0, 1, 1, 2))):
            self._vase()
        self.used = [self.counts[kind] for kind in LIMITS]

    # The shell ------------------------------------------------------------------------------------------

    def _room(self) -> None:
        d = self.dice
        self.room = [d.uniform(3.4, 7.0), d.uniform(3.4, 7.0), d.uniform(2.3, 3.3)]
        walls = sample_material(d, "wall")
        for wall in range(4):
            self.material[wall] = list(walls)
        if d.chance(0.35):
            self.material[d.below(4)] = sample_material(d, "wall")
        self.material[FLOOR], self.category[FLOOR] = sample_material(d, "floor"), CLASS_NUMBERS["floor"]
        self.material[CEILING], self.category[CEILING] = sample_material(d, "ceiling"), CLASS_NUMBERS["ceiling"]
        for slot in range(6):
            self.shape[slot] = [0.0, 0.0, 0.0, 1e3, 1e3, 1e3, 1.0, 0.0]
        self.category[RUG] = CLASS_NUMBERS["rug"]

    def _camera(self) -> None:
        """Stand near one side of the room and look roughly across it, a little down."""
        d, (x, y, z) = self.dice, self.room
        angle = d.uniform(0.0, 2 * math.pi)
        reach = d.uniform(0.45, 0.85)
        self.position = [
            x / 2 + (x / 2 - 0.3) * reach * math.cos(angle),
            y / 2 + (y / 2 - 0.3) * reach * math.sin(angle),
            d.uniform(0.9, min(2.1, z - 0.4)),
        ]
        target = (x * d.uniform(0.3, 0.7), y * d.uniform(0.3, 0.7))
        yaw = math.atan2(target[1] - self.position[1], target[0] - self.position[0])
        pitch = math.radians(d.uniform(-24.0, 8.0) - 5.0 * (self.position[2] - 1.4))
        roll = math.radians(d.uniform(-3.0, 3.0))
        forward = [math.cos(yaw) * math.cos(pitch), math.sin(yaw) * math.cos(pitch), math.sin(pitch)]
        level = [math.sin(yaw), -math.cos(yaw), 0.0]
        upward = [-math.cos(yaw) * math.sin(pitch), -math.sin(yaw) * math.sin(pitch), math.cos(pitch)]
        c, s = math.cos(roll), math.sin(roll)
        right = [c * a + s * b for a, b in zip(level, upward, strict=True)]
        up = [c * b - s * a for a, b in zip(level, upward, strict=True)]
        self.rotation, self.yaw = [right, up, forward], yaw
        self.tangent = math.tan(math.radians(d.uniform(56.0, 84.0)) / 2)
        self.taken.append((self.position[0], self.position[1], 0.35))

    def _light(self) -> None:
        """One or two ceiling lamps, the first of which is the light; exposure, white balance and grain."""
        d, (x, y, z) = self.dice, self.room
        for number in range(d.pick((1, 1, 2))):
            depth = d.uniform(1.2, 0.75 * max(x, y))
            angle = self.yaw + d.uniform(-0.5, 0.5)
            cx = min(max(self.position[0] + depth * math.cos(angle), 0.5), x - 0.5)
            cy = min(max(self.position[1] + depth * math.sin(angle), 0.5), y - 0.5)
            radius, height, drop = d.uniform(0.2, 0.46), d.uniform(0.06, 0.18), d.uniform(0.0, 0.5)
            top = max(z - drop * (z > 2.5), self.position[2] + 0.25)
            far = math.hypot(cx - self.position[0], cy - self.position[1]) > radius + 0.5
            if far:
                self._add(CONE, "lamp", [cx, cy, top - height, radius, radius, height], "lamp")
            if number == 0:
                self.light = [cx, cy, top - 2 * height - 0.06]
                self.taken.append((cx, cy, 0.0))
        warm = d.uniform(-0.12, 0.2)
        power = d.uniform(2.2, 4.2)
        self.light_colour = [power * (1 + warm), power, power * (1 - warm)]
        turn, rise = d.uniform(0, 2 * math.pi), d.uniform(0.1, 0.7)
        flat = math.sqrt(1 - rise * rise)
        self.fill = [flat * math.cos(turn), flat * math.sin(turn), rise]
        sky, ground = d.uniform(0.22, 0.5), d.uniform(0.12, 0.3)
        self.ambient = [
            [sky * d.uniform(0.85, 1.15) for _ in range(3)],
            [ground * d.uniform(0.8, 1.2) for _ in range(3)],
        ]
        exposure = 1.3 * 2.0 ** d.uniform(-0.7, 0.7)
        self.gain = [exposure * d.uniform(0.88, 1.14) for _ in range(3)]
        self.grain = d.uniform(0.004, 0.022)

    def _add(self, kind: int, category: str, shape: list[float], material: str | list[float], yaw: float = 0.0) -> bool:
        """Fill the next slot of a kind; False if all are taken."""
        if self.counts[kind] == LIMITS[kind]:
            return False
        slot = kind + self.counts[kind]
        self.counts[kind] += 1
        self.shape[slot] = [*shape, math.cos(yaw), math.sin(yaw)]
        self.category[slot] = CLASS_NUMBERS[category]
        radius = shape[3] if kind >= BALL else 0.0
        self.material[slot] = sample_material(self.dice, material, radius) if isinstance(material, str) else material
        return True

    # On the walls and the floor -------------------------------------------------------------------------

    def _panels(self) -> None:
        d = self.dice
        for wall in range(4):
            width = self.room[1] if wall < 2 else self.room[0]
            place = d.uniform(0.1, 0.5)
            while place < width - 0.5 and self.counts[PANEL] < PANELS:
                place = self._panel(wall, place, width) + d.uniform(0.15, 1.3)
        if d.chance(0.6):
            self._rug()

    def _panel(self, wall: int, left: float, width: float) -> float:
        """Hang a picture or set a door or window with its left end at ``left``; return its right end."""
        d, ceiling = self.dice, self.room[2]
        kind = d.pick(("picture", "picture", "picture", "door", "door", "window", "window"))
        if kind == "door":
            half_u, half_v = d.uniform(0.38, 0.55), d.uniform(0.93, 1.08)
            up = half_v
        elif kind == "window":
            half_u, half_v = d.uniform(0.35, 0.85), d.uniform(0.4, 0.65)
            up = d.uniform(0.85 + half_v, ceiling - half_v - 0.1)
        else:
            half_u, half_v = d.uniform(0.22, 0.6), d.uniform(0.2, 0.46)
            up = d.uniform(1.1 + half_v * 0.5, min(2.0, ceiling - half_v - 0.15))
        if left + 2 * half_u > width - 0.08:
            return width
        material = sample_material(d, kind)
        self._add(PANEL, kind, [left + half_u, up, float(wall), half_u, half_v, 1.0], material)
        return left + 2 * half_u

    def _rug(self) -> None:
        d = self.dice
        centre = self._spot(0.6, crowd=False)
        if centre is None:
            return
        yaw = d.pick((0.0, 0.0, d.uniform(0, math.pi)))
        half = [d.uniform(0.6, 1.4), d.uniform(0.5, 1.0)]
        self.shape[RUG] = [*centre, 0.0, *half, 2.0 if d.chance(0.4) else 1.0, math.cos(yaw), math.sin(yaw)]
        self.material[RUG] = sample_material(d, "rug")

    # Things that stand ----------------------------------------------------------------------------------

    def _spot(self, radius: float, crowd: bool = True) -> tuple[float, float] | None:
        """A place on the floor for a circle, mostly in view; None if none was found."""
        d, (x, y, _) = self.dice, self.room
        for _ in range(8):
            reach = d.uniform(0.9, 0.95 * max(x, y))
            angle = self.yaw + d.uniform(-1.0, 1.0) * math.atan(self.tangent)
            px, py = self.position[0] + reach * math.cos(angle), self.position[1] + reach * math.sin(angle)
            if not (radius < px < x - radius and radius < py < y - radius):
                continue
            if not crowd or all(math.hypot(px - a, py - b) > radius + r for a, b, r in self.taken):
                if crowd:
                    self.taken.append((px, py, radius))
                return px, py
        return None

    def _block(self) -> None:
        """A crate or plinth, freely turned, perhaps with a smaller one on top."""
        d = self.dice
        half = [d.uniform(0.18, 0.5), d.uniform(0.18, 0.5), d.uniform(0.12, 0.45)]
        reach = math.hypot(half[0], half[1])
        spot = self._spot(reach)
        if spot is None or not self._add(BOX, "furniture", [*spot, half[2], *half], "box", d.uniform(0, math.pi)):
            return
        top, small = 2 * half[2], min(half[0], half[1])
        if d.chance(0.3):
            tall = d.uniform(0.08, 0.25)
            shrunk = [small * d.uniform(0.4, 0.75), small * d.uniform(0.4, 0.75), tall]
            self._add(BOX, "furniture", [*spot, top + tall, *shrunk], "box", d.uniform(0, math.pi))
            top, small = top + 2 * tall, min(shrunk[:2])
        self.tops.append((*spot, top, small))

    def _cabinet(self) -> None:
        """A chest, shelf or wardrobe with its back to a wall."""
        d, (x, y, z) = self.dice, self.room
        half = [d.uniform(0.25, 0.75), d.uniform(0.18, 0.32), d.pick((0.3, 0.4, 0.5, 0.85, 1.0)) * d.uniform(0.85, 1.1)]
        half[2] = min(half[2], z / 2 - 0.1)
        wall = d.below(4)
        span = y if wall < 2 else x
        along = d.uniform(half[0] + 0.02, span - half[0] - 0.02)
        gap = half[1] + 0.01
        spot = [(gap, along), (x - gap, along), (along, gap), (along, y - gap)][wall]
        clear = all(math.hypot(spot[0] - a, spot[1] - b) > half[0] + r for a, b, r in self.taken)
        yaw = math.pi / 2 if wall < 2 else 0.0
        if clear and self._add(BOX, "furniture", [*spot, half[2], *half], "box", yaw):
            self.taken.append((*spot, half[0]))
            self.tops.append((*spot, 2 * half[2], half[1]))

    def _table(self) -> None:
        """A top on a foot, or on two side boards."""
        d = self.dice
        half = [d.uniform(0.4, 0.75), d.uniform(0.3, 0.5)]
        high, thick = d.uniform(0.45, 0.8), d.uniform(0.02, 0.05)
        spot = self._spot(math.hypot(*half))
        if spot is None or self.counts[BOX] > BOXES - 3:
            return
        yaw, material = d.uniform(0, math.pi), sample_material(d, "box")
        self._add(BOX, "furniture", [*spot, high - thick, *half, thick], material, yaw)
        leg = high / 2 - thick
        round_foot = d.chance(0.4) and self.counts[CYLINDER] < CYLINDERS
        if round_foot:
            radius = d.uniform(0.05, 0.16)
            self._add(CYLINDER, "furniture", [*spot, leg, radius, radius, leg], "column")
        else:
            for side in (-1, 1):
                shift = side * (half[0] - 0.06)
                foot = [spot[0] + shift * math.cos(yaw), spot[1] + shift * math.sin(yaw), leg]
                self._add(BOX, "furniture", [*foot, 0.035, half[1] - 0.04, leg], material, yaw)
        self.tops.append((*spot, high, min(half)))

    def _sofa(self) -> None:
        """A seat and a back."""
        d = self.dice
        half = [d.uniform(0.3, 0.9), d.uniform(0.28, 0.42)]
        seat, back = d.uniform(0.18, 0.25), d.uniform(0.35, 0.5)
        spot = self._spot(math.hypot(*half))
        if spot is None or self.counts[BOX] > BOXES - 2:
            return
        yaw, material = d.uniform(0, 2 * math.pi), sample_material(d, "box")
        self._add(BOX, "furniture", [*spot, seat, *half, seat], material, yaw)
        shift = half[1] + 0.07
        behind = [spot[0] - shift * math.sin(yaw), spot[1] + shift * math.cos(yaw), back]
        self._add(BOX, "furniture", [*behind, half[0], 0.07, back], material, yaw)
        self.tops.append((*spot, 2 * seat, half[1]))

    def _column(self) -> None:
        """A pillar from the floor to the ceiling, or a stump."""
        d, z = self.dice, self.room[2]
        radius = d.uniform(0.09, 0.26)
        half = z / 2 if d.chance(0.75) else d.uniform(0.35, 0.6)
        spot = self._spot(radius + 0.15)
        placed = spot and self._add(CYLINDER, "column", [*spot, half, radius, radius, half], "column")
        if spot and placed and half < z / 2:
            self.tops.append((*spot, 2 * half, radius))

    def _ball(self) -> None:
        d = self.dice
        if self.tops and d.chance(0.5):
            x, y, z, room = self.tops.pop(d.below(len(self.tops)))
            radius = min(room, d.uniform(0.12, 0.28))
        else:
            radius, z = d.uniform(0.16, 0.45), 0.0
            spot = self._spot(radius)
            if spot is None:
                return
            x, y = spot
        if not self._blocked(x, y, z + radius, radius):
            self._add(BALL, "ball", [x, y, z + radius, radius, radius, radius], "ball", d.uniform(0, math.pi))

    def _vase(self) -> None:
        d = self.dice
        if not self.tops:
            return
        x, y, z, room = self.tops.pop(d.below(len(self.tops)))
        radius, half = min(0.8 * room, d.uniform(0.06, 0.14)), d.uniform(0.1, 0.22)
        if not self._blocked(x, y, z + half, half):
            self._add(CYLINDER, "column", [x, y, z + half, radius, radius, half], "column")

    def _blocked(self, x: float, y: float, z: float, reach: float) -> bool:
        """Whether a thing would contain the camera, or intersect the ceiling or the light."""
        if z + reach > self.room[2] - 0.05:
            return True
        return any(math.dist((x, y, z), place) < reach + 0.3 for place in (self.position, self.light))

    def _floor_lamp(self) -> None:
        d = self.dice
        high, radius, half = d.uniform(1.2, 1.7), d.uniform(0.14, 0.28), d.uniform(0.09, 0.16)
        spot = self._spot(radius + 0.2)
        if spot is None or self.counts[CYLINDER] == CYLINDERS or self.counts[CONE] == CONES:
            return
        pole = d.uniform(0.02, 0.04)
        self._add(CYLINDER, "lamp", [*spot, high / 2, pole, pole, high / 2], "lamp")
        self._add(CONE, "lamp", [*spot, high + half - 0.05, radius, radius, half], "lamp")
