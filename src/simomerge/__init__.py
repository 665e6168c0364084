"""simomerge: single-task vision experts in, one encoder with all their heads out.

Everything below loads on first use, so that ``import simomerge`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from simomerge.core.version import __version__ as __version__

_WHERE = {
    "Features": "models.encoders",
    "Foldable": "models.heads",
    "SimoModel": "models.model",
    "Task": "datasets.tasks",
    "data": "datasets.load:load_data",
    "delta_mtl": "training.evaluate",
    "evaluate": "training.evaluate",
    "export": "exporting.export",
    "import_expert": "models.importing",
    "load": "models.model",
    "load_experts": "assembly.experts",
    "merge": "assembly.merge",
    "merging": "merging",
    "normalised_performance": "training.evaluate",
    "realign": "assembly.realign",
    "register_encoder": "core.classes",
    "register_head": "core.classes",
    "relate": "relations",
    "search_scale": "assembly.scale",
}

if TYPE_CHECKING:
    from simomerge import merging
    from simomerge.assembly.experts import load_experts
    from simomerge.assembly.merge import merge
    from simomerge.assembly.realign import realign
    from simomerge.assembly.scale import search_scale
    from simomerge.core.classes import register_encoder, register_head
    from simomerge.datasets.load import load_data as data
    from simomerge.datasets.tasks import Task
    from simomerge.exporting.export import export
    from simomerge.models.encoders import Features
    from simomerge.models.heads import Foldable
    from simomerge.models.importing import import_expert
    from simomerge.models.model import SimoModel, load
    from simomerge.relations import relate
    from simomerge.training.evaluate import delta_mtl, evaluate, normalised_performance

__all__ = [
    "Features",
    "Foldable",
    "SimoModel",
    "Task",
    "data",
    "delta_mtl",
    "evaluate",
    "export",
    "import_expert",
    "load",
    "load_experts",
    "merge",
    "merging",
    "normalised_performance",
    "realign",
    "register_encoder",
    "register_head",
    "relate",
    "search_scale",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'simomerge' has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    try:
        found = import_module(f"simomerge.{module}")
    except ImportError as error:
        from simomerge.core.environment import missing_extra

        if message := missing_extra(error):
            raise ImportError(f"simomerge.{name}: {message}", name=error.name) from error
        raise
    value = found if module == name else getattr(found, attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
