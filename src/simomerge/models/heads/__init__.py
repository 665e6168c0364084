"""Heads (decoders): Features -> a dense prediction."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from simomerge.models.encoders import Features
from simomerge.models.heads.binned import BinnedDepthHead
from simomerge.models.heads.building import HEADS, build_head, head_arguments, head_for, head_kind
from simomerge.models.heads.by_task import TaskHeads
from simomerge.models.heads.conv import ConvHead
from simomerge.models.heads.dpt import DPTHead
from simomerge.models.heads.linear import LinearHead
from simomerge.models.heads.projections import Foldable
from simomerge.models.heads.surgery import SurgeryHead
from simomerge.models.heads.transformers import TransformersHead

# Every head that a recipe or a model folder can name. To add a head, add a line here.
HEADS.update(
    {
        "linear": LinearHead,
        "dpt": DPTHead,
        "conv": ConvHead,
        "binned-depth": BinnedDepthHead,
        "transformers": TransformersHead,
        "surgery": SurgeryHead,
    }
)


class DenseHead(Protocol):
    """What an ``nn.Module`` needs to be a head.

    It may also have ``settings``, the keyword arguments that create it again. A model folder stores them together with
    the name of the class. A head that can be folded declares its projections; see `Foldable`.
    """

    def __call__(self, features: Features) -> Tensor:
        """Features -> logits (B, C, H, W) at the padded size."""


__all__ = ["HEADS", "DenseHead", "Foldable", "TaskHeads", "build_head", "head_arguments", "head_for", "head_kind"]
