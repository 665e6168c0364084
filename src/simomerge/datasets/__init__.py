"""Datasets behind one interface, and `load_data`, which finds one by its name.

The names load on first use: rooms are rendered in processes that need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simomerge.datasets.base import DenseDataset, random_flip
    from simomerge.datasets.load import load_data

_WHERE = {"DenseDataset": "base", "random_flip": "base", "load_data": "load"}

__all__ = ["DenseDataset", "load_data", "random_flip"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
