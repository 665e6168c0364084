"""Merge methods and the arithmetic on named arrays. No models and no disk here.

A method lives in the file of its family and registers itself when that file is imported, which is done here.
"""

from simomerge.core.registry import parameter, settings
from simomerge.merging.algebra import interpolate, negate, with_experts
from simomerge.merging.competition import Pcb, Sce
from simomerge.merging.consensus import Consensus, Emr, MagMax, TallMask, tall_mask
from simomerge.merging.engine.checks import check_models
from simomerge.merging.engine.merge import Merged, merge_state_dicts, merge_tensors
from simomerge.merging.engine.ranks import kth_smallest, sampled_distances
from simomerge.merging.engine.schedule import (
    LayerScales,
    Lines,
    Schedule,
    as_schedule,
    describe_method,
    described_method,
)
from simomerge.merging.engine.stream import TaskVectorStream
from simomerge.merging.linear import Average, LinearMethod, TaskArithmetic, WeightedAverage, ZeroShot
from simomerge.merging.method import MergeMethod, available, get_method, of_expert, register
from simomerge.merging.sparse import Breadcrumbs, DareLinear, DareTies, Della
from simomerge.merging.spectral import IsoC, IsoCts, TsvM
from simomerge.merging.spherical import Karcher, ModelStock, Slerp
from simomerge.merging.statistics import Fisher, RegMean
from simomerge.merging.ties import Ties

__all__ = [
    "Average",
    "Breadcrumbs",
    "Consensus",
    "DareLinear",
    "DareTies",
    "Della",
    "Emr",
    "Fisher",
    "IsoC",
    "IsoCts",
    "Karcher",
    "LayerScales",
    "LinearMethod",
    "Lines",
    "MagMax",
    "MergeMethod",
    "Merged",
    "ModelStock",
    "Pcb",
    "RegMean",
    "Sce",
    "Schedule",
    "Slerp",
    "TallMask",
    "TaskArithmetic",
    "TaskVectorStream",
    "Ties",
    "TsvM",
    "WeightedAverage",
    "ZeroShot",
    "as_schedule",
    "available",
    "check_models",
    "describe_method",
    "described_method",
    "get_method",
    "interpolate",
    "kth_smallest",
    "merge_state_dicts",
    "merge_tensors",
    "negate",
    "of_expert",
    "parameter",
    "register",
    "sampled_distances",
    "settings",
    "tall_mask",
    "with_experts",
]
