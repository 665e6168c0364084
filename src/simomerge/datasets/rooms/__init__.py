"""Rooms: procedurally generated indoor scenes with exact dense labels, rendered on first use.

Example:
    >>> from simomerge.datasets.rooms import load_rooms
    >>> rooms = load_rooms("train", 64)
    >>> rooms["image"].shape, rooms["depth"].dtype
    ((64, 64, 80, 3), dtype('float16'))
"""

from __future__ import annotations

from simomerge.datasets.rooms.cache import RENDER_VERSION, load_rooms
from simomerge.datasets.rooms.generate import CLASS_COLOURS, SPLITS, render_rooms
from simomerge.datasets.rooms.labels import MODALITIES
from simomerge.datasets.rooms.slots import CLASS_NAMES

__all__ = [
    "CLASS_COLOURS",
    "CLASS_NAMES",
    "MODALITIES",
    "RENDER_VERSION",
    "SPLITS",
    "load_rooms",
    "render_rooms",
]
