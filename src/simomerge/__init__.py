"""simomerge: single-task vision experts in, one encoder with all their heads out.

Everything below loads on first use, so that ``import simomerge`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Features": "encoders",
    "Foldable": "heads",
    "SimoModel": "model",
    "Task": "tasks",
    "data": "datasets:load_data",
    "delta_mtl": "evaluation",
    "evaluate": "evaluation",
    "import_expert": "sources",
    "load": "model",
    "load_experts": "assemble",
    "merge": "assemble",
    "merging": "merging",
    "normalised_performance": "evaluation",
    "realign": "realignment",
    "relate": "relations",
    "search_scale": "assemble",
}

if TYPE_CHECKING:
    from simomerge import merging
    from simomerge.assemble import load_experts, merge, search_scale
    from simomerge.datasets import load_data as data
    from simomerge.encoders import Features
    from simomerge.evaluation import delta_mtl, evaluate, normalised_performance
    from simomerge.heads import Foldable
    from simomerge.model import SimoModel, load
    from simomerge.realignment import realign
    from simomerge.relations import relate
    from simomerge.sources import import_expert
    from simomerge.tasks import Task

__all__ = [
    "Features",
    "Foldable",
    "SimoModel",
    "Task",
    "data",
    "delta_mtl",
    "evaluate",
    "import_expert",
    "load",
    "load_experts",
    "merge",
    "merging",
    "normalised_performance",
    "realign",
    "relate",
    "search_scale",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'simomerge' has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    found = import_module(f"simomerge.{module}")
    value = found if module == name else getattr(found, attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
