"""Representation surgery: small modules behind the merged encoder, trained to give each expert's features.

Source: "Representation Surgery for Multi-Task Model Merging" (arXiv 2402.02705): ``z - W_up relu(W_down z)`` of rank 16
per task, trained with Adam at a rate of 1e-3 to minimise the L1 distance to the expert's feature of the same image. The
paper corrects the one final feature vector of a classifier. Dense heads read tokens of several taps, so here each task
has a module for the patch tokens of each tap, and one for each CLS token. These choices are ours: a module starts as
the identity, the losses of the taps are divided by their values at the start and averaged, and the learning rate
follows the one-cycle schedule of all trainings here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from simomerge.assembly.realign.method import Inputs, TrainedRealignment, register
from simomerge.core.registry import parameter
from simomerge.training.settings import TrainSettings

if TYPE_CHECKING:
    from simomerge.models.model import SimoModel


@register(
    "surgery",
    "Representation Surgery for Multi-Task Model Merging (Yang et al., 2024)",
    "https://arxiv.org/abs/2402.02705",
)
@dataclass(frozen=True)
class Surgery(TrainedRealignment):
    """Train a low-rank correction of the features for each task, which stays in front of its head.

    The heads' own weights stay. The corrections add parameters and compute: each head becomes a `SurgeryHead` around
    the expert's head, which the model must still have. All images must have one size. The features of the merged
    encoder and of every expert's are computed once and kept memory-mapped in half precision.
    """

    teacher: ClassVar[str] = "experts"
    needs_plain_heads: ClassVar[bool] = True

    training: TrainSettings = TrainSettings(steps=300, batch_size=32, lr=1e-3, weight_decay=0.0)
    rank: int = parameter(16, low=1, help="Rank of the corrections.")

    @property
    def phrase(self) -> str:
        return "correcting its features for each head"

    def change(self, model: SimoModel, inputs: Inputs) -> dict[str, Any]:
        from simomerge.assembly.realign.corrections import train_corrections
        from simomerge.assembly.realign.teacher import check_heads

        check_heads(model, inputs.experts)
        return train_corrections(model, inputs, self.rank, self.training)
