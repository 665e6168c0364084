"""Experts in, one model out: merge the encoders, carry over the heads, choose what is not given."""

from simomerge.assemble.alignment import Aligner, Trial
from simomerge.assemble.assembly import AUTO_METHODS, merge
from simomerge.assemble.coefficients import COEFFICIENT_SETTINGS, learn_coefficients
from simomerge.assemble.parts import check_experts, load_experts
from simomerge.assemble.scale import SCALE_GRID, ScaleSearch, search_scale

__all__ = [
    "AUTO_METHODS",
    "COEFFICIENT_SETTINGS",
    "SCALE_GRID",
    "Aligner",
    "ScaleSearch",
    "Trial",
    "check_experts",
    "learn_coefficients",
    "load_experts",
    "merge",
    "search_scale",
]
