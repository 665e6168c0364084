"""How tasks, experts and a merge relate to each other."""

from simomerge.relations.alignment import TapAlignment, alignment

__all__ = ["TapAlignment", "alignment"]
