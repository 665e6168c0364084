"""Merge methods and arithmetic on named arrays, without models and disk.

Each method is a class in the file of its family, and registers itself when that file is imported, which happens here.
`get_method` gives a method by name.
"""

from simomerge.core.registry import parameter
from simomerge.merging import competition, consensus, sparse, spectral, spherical  # noqa: F401  (registers methods)
from simomerge.merging.algebra import interpolate, negate, with_experts
from simomerge.merging.engine.checks import check_models, warn_of_other_tensors
from simomerge.merging.engine.merge import Merged, merge_state_dicts, merge_tensors
from simomerge.merging.engine.ranks import sampled_distances
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
from simomerge.merging.statistics import Fisher, RegMean
from simomerge.merging.ties import Ties

__all__ = [
    "Average",
    "Fisher",
    "LayerScales",
    "LinearMethod",
    "Lines",
    "MergeMethod",
    "Merged",
    "RegMean",
    "Schedule",
    "TaskArithmetic",
    "TaskVectorStream",
    "Ties",
    "WeightedAverage",
    "ZeroShot",
    "as_schedule",
    "available",
    "check_models",
    "describe_method",
    "described_method",
    "get_method",
    "interpolate",
    "merge_state_dicts",
    "merge_tensors",
    "negate",
    "of_expert",
    "parameter",
    "register",
    "sampled_distances",
    "warn_of_other_tensors",
    "with_experts",
]
