"""The numbers of things in a room, and the layout of their shapes.

Everything visible has a *slot*: the six room surfaces, the rug, panels on walls, then the convex primitives. A slot's
row in ``Scenes.shape`` means

    box       centre x y z, half extents x y z, cos and sin of its yaw
    ball      centre, radius three times
    cylinder  centre, radius twice, half height, cos and sin
    cone      centre, radius twice, half height, cos and sin (tip up)
    panel     centre along the wall and up, wall number, half width, half height, 1
    rug       centre x y, 0, half extents x y, 2 if elliptic else 1, cos and sin

Unused slots lie far below the floor, where no ray arrives.
"""

from __future__ import annotations

CLASS_NAMES = ("wall", "floor", "ceiling", "furniture", "ball", "column", "picture", "door", "window", "lamp", "rug")
FLOOR, CEILING, RUG, PANEL = 4, 5, 6, 7
PANELS, BOXES, BALLS, CYLINDERS, CONES = 8, 10, 5, 6, 3
BOX = PANEL + PANELS
BALL = BOX + BOXES
CYLINDER = BALL + BALLS
CONE = CYLINDER + CYLINDERS
SLOTS = CONE + CONES
LIMITS = {PANEL: PANELS, BOX: BOXES, BALL: BALLS, CYLINDER: CYLINDERS, CONE: CONES}
CLASS_NUMBERS = {name: number for number, name in enumerate(CLASS_NAMES)}
