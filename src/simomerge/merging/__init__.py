"""Merge methods and the arithmetic on named arrays. No models and no disk here.

A method lives in the file of its family and registers itself when that file is imported, which is done here.
"""

from simomerge.merging.checks import check_models
from simomerge.merging.linear import Average, TaskArithmetic, ZeroShot
from simomerge.merging.merge import merge_state_dicts, merge_tensors
from simomerge.merging.method import MergeMethod, available, get_method, of_expert, parameter, register
from simomerge.merging.stream import TaskVectorStream
from simomerge.merging.ties import Ties

__all__ = [
    "Average",
    "MergeMethod",
    "TaskArithmetic",
    "TaskVectorStream",
    "Ties",
    "ZeroShot",
    "available",
    "check_models",
    "get_method",
    "merge_state_dicts",
    "merge_tensors",
    "of_expert",
    "parameter",
    "register",
]
