"""Procedural surface textures: drawing a material at random, and evaluating it at a hit.

A material is a row of numbers (``FIELDS``). Patterns are functions of two surface coordinates in metres. Every edge in
a pattern is as soft as the pixel's footprint there, which prevents moire in distant patterns. Only ``+ - * /``,
``floor`` and integer hashing are used, because they give the same bits on every machine.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from simomerge.datasets.rooms.dice import Dice

KINDS = (
    "plain",
    "stripes",
    "checks",
    "bricks",
    "tiles",
    "planks",
    "marble",
    "blotches",
    "dots",
    "drawers",
    "door",
    "window",
    "picture",
)
FIELDS = (
    "kind",
    "cos",
    "sin",
    "offset_u",
    "offset_v",
    "scale_u",
    "scale_v",
    "noise_u",
    "noise_v",
    "noise",
    "gloss",
    "frame",
    "glow",
    "seed",
    "r0",
    "g0",
    "b0",
    "r1",
    "g1",
    "b1",
    "r2",
    "g2",
    "b2",
)
_FIELD = {name: number for number, name in enumerate(FIELDS)}
_KIND = {name: float(number) for number, name in enumerate(KINDS)}

_PATTERNS = {
    "wall": ("plain", "plain", "plain", "stripes", "stripes", "bricks", "tiles", "dots", "blotches", "checks"),
    "floor": ("plain", "planks", "planks", "checks", "tiles", "marble", "blotches", "stripes", "bricks"),
    "ceiling": ("plain", "plain", "plain", "plain", "planks", "tiles"),
    "rug": ("plain", "stripes", "checks", "dots", "marble", "blotches"),
    "box": ("plain", "plain", "planks", "drawers", "drawers", "marble", "stripes", "checks", "blotches"),
    "ball": ("plain", "plain", "stripes", "checks", "marble", "dots", "blotches"),
    "column": ("plain", "stripes", "marble", "bricks", "blotches", "planks", "checks"),
    "lamp": ("plain", "plain", "stripes", "blotches"),
    "picture": ("picture",),
    "door": ("door",),
    "window": ("window",),
}


def _colour(dice: Dice, saturation: tuple[float, float], value: tuple[float, float]) -> list[float]:
    """A random linear RGB colour (display colour squared: the renderer's gamma is a square root)."""
    rgb = colorsys.hsv_to_rgb(dice.uniform(), dice.uniform(*saturation), dice.uniform(*value))
    return [channel * channel for channel in rgb]


def _companion(dice: Dice, colour: list[float]) -> list[float]:
    """A second colour: another tone of the first, or an independent colour."""
    if dice.chance(0.4):
        return _colour(dice, (0.1, 0.7), (0.25, 1.0))
    hue, saturation, value = colorsys.rgb_to_hsv(*(math.sqrt(channel) for channel in colour))
    value = value * dice.uniform(0.5, 0.75) if value > 0.6 else min(1.0, value * dice.uniform(1.35, 1.8))
    rgb = colorsys.hsv_to_rgb((hue + dice.uniform(-0.08, 0.08)) % 1.0, saturation * dice.uniform(0.6, 1.2) % 1.0, value)
    return [channel * channel for channel in rgb]


def sample_material(dice: Dice, role: str, radius: float = 0.0) -> list[float]:
    """Draw a material for a surface.

    Args:
        dice: Source of the randomness.
        role: A key of the pattern table: "wall", "floor", "box", "ball", ...
        radius: Radius in metres of a round surface, whose pattern must close around it; 0 for flat ones.

    Returns:
        One number per name in ``FIELDS``.
    """
    kind = dice.pick(_PATTERNS[role])
    pale = role == "ceiling" and dice.chance(0.6)
    # Large surfaces have paler colours than things, as in real rooms, but any hue.
    vivid = 0.5 if role in ("wall", "floor", "ceiling") else 0.75
    base = _colour(dice, (0.0, 0.25) if pale else (0.08, vivid), (0.65, 1.0) if pale else (0.35, 1.0))
    second = _companion(dice, base)
    if kind == "window":  # sky above, land below: bright, but of any hue
        base, second = _colour(dice, (0.05, 0.5), (0.8, 1.0)), _colour(dice, (0.2, 0.7), (0.3, 0.8))
    third = _companion(dice, base) if role == "rug" else _colour(dice, (0.05, 0.6), (0.2, 1.0))
    cell = dice.uniform(0.28, 0.7) if role in ("wall", "floor", "ceiling") else dice.uniform(0.14, 0.4)
    scale_u = scale_v = 1.0 / cell
    turn = 0.0
    if kind in ("planks", "checks", "stripes", "tiles") and role in ("floor", "rug"):
        turn = dice.pick((0.0, 0.5, 0.25, dice.uniform())) * math.pi
    elif kind in ("stripes", "planks") and not radius:
        turn = dice.pick((0.0, 0.0, 0.0, 0.5, 0.25)) * math.pi
    noise_u = noise_v = dice.uniform(2.0, 6.0)
    if kind == "planks":
        scale_v *= dice.uniform(1.5, 2.5)
        scale_u, noise_u, noise_v = 0.35 * scale_u, 1.5, dice.uniform(12.0, 22.0)
    if radius:  # an integer number of periods around it
        around = max(2.0, 2 * round(math.pi * radius * scale_u))
        scale_u = around / (2 * math.pi * radius)
    seed = float(dice.below(1 << 20))
    frame = {"picture": 0.045, "door": 0.07, "window": 0.06, "rug": 0.12}.get(role, 0.0)
    frame *= dice.uniform(0.5, 1.4)
    gloss = dice.uniform(0.0, 0.9) ** 2 if role in ("ball", "column", "box", "floor") else 0.0
    amplitude = dice.uniform(0.15, 0.6) if kind in ("planks", "plain") else dice.uniform(0.08, 0.35)
    offset = (dice.uniform(), dice.uniform()) if role != "window" else (0.0, 0.0)
    glow = {"window": 1.0, "lamp": dice.pick((0.0, 1.0))}.get(role, 0.0) * dice.uniform(0.5, 1.2)
    placing = [_KIND[kind], math.cos(turn), math.sin(turn), *offset, scale_u, scale_v]
    return [*placing, noise_u, noise_v, amplitude, gloss, frame, glow, seed, *base, *second, *third]


def hash_unit(xp: Any, key: Any) -> Any:
    """Scramble uint32 keys into float32 numbers in [0, 1)."""
    key = key ^ (key >> 16)
    key = key * 0x7FEB352D
    key = key ^ (key >> 15)
    key = key * 0x846CA68B
    return ((key >> 8) ^ (key >> 24)).astype(xp.float32) * (1.0 / (1 << 24))


def _cell(xp: Any, floored: Any) -> Any:
    return floored.astype(xp.int32).astype(xp.uint32)


def value_noise(xp: Any, u: Any, v: Any, seed: Any) -> Any:
    """Smooth noise in [0, 1] with unit cells; ``u``, ``v`` float32 and ``seed`` uint32 of one shape."""
    iu, iv = xp.floor(u), xp.floor(v)
    fu, fv = u - iu, v - iv
    fu, fv = fu * fu * (3.0 - 2.0 * fu), fv * fv * (3.0 - 2.0 * fv)
    ku = _cell(xp, iu) * 0x9E3779B1 + seed
    kv = _cell(xp, iv) * 0x85EBCA77
    low = ku + kv
    n00, n10 = hash_unit(xp, low), hash_unit(xp, low + 0x9E3779B1)
    high = low + 0x85EBCA77
    n01, n11 = hash_unit(xp, high), hash_unit(xp, high + 0x9E3779B1)
    n0, n1 = n00 + (n10 - n00) * fu, n01 + (n11 - n01) * fu
    return n0 + (n1 - n0) * fv


def _square(xp: Any, x: Any, soft: Any) -> Any:
    """A square wave in [-1, 1] of period 2 whose edges are ``soft`` wide."""
    half = x * 0.5
    triangle = 1.0 - 4.0 * abs(half - xp.floor(half) - 0.5)
    return xp.clip(triangle / (soft + 0.03), -1.0, 1.0)


def _lines(xp: Any, x: Any, width: float, soft: Any) -> Any:
    """The share of a pixel (0 to 1) that is covered by lines of ``width`` at the integers."""
    distance = 0.5 - abs(x - xp.floor(x) - 0.5)
    return xp.clip((width - distance) / (soft + 0.01) + 0.5, 0.0, 1.0) * xp.minimum(1.0, 2 * width / soft + 0.2)


@dataclass(frozen=True)
class Place:
    """Where on a surface hits are, in metres, float32 arrays of one shape.

    Attributes:
        u, v: surface coordinates.
        half_u, half_v: half the extent of the surface, if it has a frame or border.
        footprint: the size of a pixel on the surface.
    """

    u: Any
    v: Any
    half_u: Any
    half_v: Any
    footprint: Any


def surface_colour(xp: Any, field: Callable[[int], Any], place: Place) -> tuple[list[Any], Any, Any]:
    """Evaluate materials at hits.

    Args:
        xp: Array namespace.
        field: Gives the per-hit value of a material field by its number in ``FIELDS``.
        place: Where on their surfaces the hits are.

    Returns:
        The linear RGB albedo (three arrays), gloss and glow, all of the shape of ``place.u``.
    """
    get = {name: field(number) for name, number in _FIELD.items()}
    kind = get["kind"]
    seed = get["seed"].astype(xp.uint32) * 0x27D4EB2F
    footprint = place.footprint
    ru = get["cos"] * place.u + get["sin"] * place.v
    rv = get["cos"] * place.v - get["sin"] * place.u
    a = ru * get["scale_u"] + get["offset_u"]
    b = rv * get["scale_v"] + get["offset_v"]
    noise_u, noise_v = ru * get["noise_u"], rv * get["noise_v"]
    noise = value_noise(xp, noise_u, noise_v, seed) * 0.6
    noise = noise + value_noise(xp, noise_u * 2.7, noise_v * 2.7, seed + 77) * 0.4
    soft_u, soft_v = footprint * get["scale_u"] + 1e-4, footprint * get["scale_v"] + 1e-4
    mix, tone = _pattern(xp, kind, a, b, soft_u, soft_v, noise, seed)
    mix, tone, glow = _panel_detail(xp, kind, place, noise, mix, tone, get["glow"])
    border = xp.minimum(place.half_u - abs(place.u), place.half_v - abs(place.v))
    frame = xp.clip((get["frame"] - border) / footprint + 0.5, 0.0, 1.0)
    framed = (get["frame"] > 0).astype(xp.float32)
    frame = frame * framed
    # A thin dark rim between the frame and the inside makes the frame look raised.
    rim = xp.clip(1.0 - abs(border - get["frame"]) / (footprint + 0.008), 0.0, 1.0) * (frame + 0.3)
    shade = (tone + get["noise"] * (noise - 0.5)) * (1.0 - 0.6 * framed * rim)
    colours = []
    for channel in "rgb":
        c0, c1, c2 = get[channel + "0"], get[channel + "1"], get[channel + "2"]
        inner = c0 + (c1 - c0) * mix
        colours.append(xp.maximum((inner + (c2 - inner) * frame) * shade, 0.004))
    return colours, get["gloss"], glow * (1.0 - frame)


def _pattern(xp: Any, kind: Any, a: Any, b: Any, soft_u: Any, soft_v: Any, noise: Any, seed: Any) -> tuple[Any, Any]:
    """The share of the second colour and the brightness of each hit, for the repeating patterns."""

    def where(name: str, value: Any, otherwise: Any) -> Any:
        return xp.where(kind == _KIND[name], value, otherwise)

    su, sv = _square(xp, a, soft_u), _square(xp, b, soft_v)
    mix = where("stripes", 0.5 + 0.5 * su, 0.0)
    mix = where("checks", 0.5 + 0.5 * su * sv, mix)
    # Bricks are tiles of half the height whose every other row is shifted by half a brick.
    bricks = kind == _KIND["bricks"]
    planks = kind == _KIND["planks"]
    row_b = xp.where(bricks, b * 2.0, b)
    row = xp.floor(row_b)
    shift = bricks * xp.float32(0.5) + planks * xp.float32(0.375)
    col_a = a + shift * row
    col = xp.floor(col_a)
    lines = xp.maximum(_lines(xp, col_a, 0.045, soft_u), _lines(xp, row_b, 0.06, soft_v))
    cell = hash_unit(xp, _cell(xp, col) * 0x9E3779B1 + _cell(xp, row) * 0x85EBCA77 + seed)
    celled = (kind >= _KIND["bricks"]) & (kind <= _KIND["planks"])
    mix = xp.where(celled, xp.where(planks, cell * 0.6 + 0.3 * lines, lines), mix)
    tone = xp.where(celled, 0.8 + 0.35 * cell, 1.0)
    tone = xp.where(planks, tone * (1.0 - 0.5 * lines), tone)
    wave = a + 3.0 * noise
    wave = abs(wave - 2.0 * xp.floor(wave * 0.5 + 0.5))
    mix = where("marble", wave * wave, mix)
    mix = where("blotches", xp.clip((noise - 0.5) * 6.0 + 0.5, 0.0, 1.0), mix)
    da, db = a - xp.floor(a) - 0.5, b - xp.floor(b) - 0.5
    radius = xp.sqrt(da * da + db * db)
    mix = where("dots", xp.clip((0.27 - radius) / (soft_u + 0.02) + 0.5, 0.0, 1.0), mix)
    knob = xp.clip((0.12 - radius) / (soft_u + 0.02) + 0.5, 0.0, 1.0)
    tone = where("drawers", (1.0 - 0.65 * lines) * (0.92 + 0.16 * cell), tone)
    mix = where("drawers", knob, mix)
    mix = where("picture", xp.clip((noise - 0.45) * 5.0 + 0.3 * su, 0.0, 1.0), mix)
    return mix, tone


def _panel_detail(xp: Any, kind: Any, place: Place, noise: Any, mix: Any, tone: Any, glow: Any) -> tuple[Any, Any, Any]:
    """Add the details of doors (two inset panels and a knob) and of windows (a horizon and glazing bars)."""
    u, v, half_u, half_v, footprint = place.u, place.v, place.half_u, place.half_v, place.footprint
    door, window = kind == _KIND["door"], kind == _KIND["window"]
    nu, nv = u / half_u, v / half_v
    inset = xp.maximum(abs(nu) * 1.6, abs(abs(nv) - 0.47) * 2.75)
    groove = xp.clip(1.3 - abs(inset - 1.0) * half_u * 0.6 / (footprint + 0.008), 0.0, 1.0)
    ku, kv = u - 0.78 * half_u, v + 0.04
    knob = xp.clip((0.05 - xp.sqrt(ku * ku + kv * kv)) / footprint + 0.5, 0.0, 1.0)
    tone = xp.where(door, 1.0 - 0.55 * groove, tone)
    mix = xp.where(door, xp.maximum(knob, (inset < 1.0) * xp.float32(0.25)), mix)
    horizon = xp.clip((0.5 * noise - 0.45 - nv) * half_v / footprint + 0.5, 0.0, 1.0)
    bars = xp.minimum(abs(u), abs(v - 0.2 * half_v))
    bars = xp.clip((0.022 - bars) / footprint + 0.5, 0.0, 1.0)
    mix = xp.where(window, horizon, mix)
    tone = xp.where(window, (1.0 - 0.7 * bars) * (0.9 + 0.15 * nv), tone)
    return mix, tone, xp.where(window, glow * (1.0 - bars) * (1.0 - 0.4 * horizon), glow)
