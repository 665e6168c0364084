"""How tasks, experts and a merge relate to each other, and which tasks to merge."""

from simomerge.assembly.judging import Judge
from simomerge.relations.features import alignment, similarity
from simomerge.relations.geometry import geometry
from simomerge.relations.grouping import MergedGroup, group_tasks
from simomerge.relations.relations import ON_REQUEST, SECTIONS, Relations, check_sections, relate
from simomerge.relations.sweep import Sweeps, sweep
from simomerge.relations.verdict import verdict

__all__ = [
    "ON_REQUEST",
    "SECTIONS",
    "Judge",
    "MergedGroup",
    "Relations",
    "Sweeps",
    "alignment",
    "check_sections",
    "geometry",
    "group_tasks",
    "relate",
    "similarity",
    "sweep",
    "verdict",
]
