"""How tasks, experts and a merge relate to each other, and which tasks to merge."""

from simomerge.relations.alignment import TapAlignment, alignment
from simomerge.relations.geometry import Geometry, geometry
from simomerge.relations.grouping import Choice, Grouping, MergedGroup, group_tasks
from simomerge.relations.judging import Judge
from simomerge.relations.partitions import best_partitions
from simomerge.relations.relations import SECTIONS, Relations, check_sections, relate
from simomerge.relations.similarity import Similarity, similarity
from simomerge.relations.sweep import LAMBDAS, Sweeps, sweep
from simomerge.relations.verdict import verdict

__all__ = [
    "LAMBDAS",
    "SECTIONS",
    "Choice",
    "Geometry",
    "Grouping",
    "Judge",
    "MergedGroup",
    "Relations",
    "Similarity",
    "Sweeps",
    "TapAlignment",
    "alignment",
    "best_partitions",
    "check_sections",
    "geometry",
    "group_tasks",
    "relate",
    "similarity",
    "sweep",
    "verdict",
]
