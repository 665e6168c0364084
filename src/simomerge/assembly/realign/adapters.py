"""Representation re-alignment: a low-rank adapter next to every block, trained together with the heads.

Source: "Single-Input Multi-Output Model Merging" (arXiv 2504.11268), re-alignment, second remedy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from simomerge.assembly.realign.method import Inputs, TrainedRealignment, checkpointing_parameter, register
from simomerge.core.registry import parameter

if TYPE_CHECKING:
    from simomerge.models.encoders import Encoder
    from simomerge.models.model import SimoModel


@register(
    "adapters",
    "Single-Input Multi-Output Model Merging (Garcia Giraldo et al., 2025)",
    "https://arxiv.org/abs/2504.11268",
)
@dataclass(frozen=True)
class Adapters(TrainedRealignment):
    """Train low-rank adapters next to the blocks and all heads on the labels of all tasks (the paper's second remedy).

    The encoder's own weights are frozen.
    """

    teacher: ClassVar[str] = "labels"

    rank: int = parameter(16, low=1, help="Rank of the adapters; 16 in the paper.")
    activation: str = parameter(
        "none", choices=("none", "relu"), help="Between an adapter's two factors: none (the paper) or relu (its code)."
    )
    last_blocks: int = parameter(0, low=0, help="Adapters in the last N blocks only; 0: in all blocks (the paper).")
    checkpointing: bool = checkpointing_parameter()

    @property
    def phrase(self) -> str:
        return "re-aligning it with adapters"

    @property
    def encoder_change(self) -> str:
        return "adapters"

    @property
    def takes_trees(self) -> bool:
        return True

    def check_encoder(self, encoder: Encoder) -> None:
        from simomerge.models.encoders.adapters import Adapters as Layers

        super().check_encoder(encoder)
        Layers(encoder.block_shapes(), self.rank, self.activation, self.last_blocks)
        if self.checkpointing:
            encoder.check_checkpointing()

    def change(self, model: SimoModel, inputs: Inputs) -> dict[str, Any]:
        from simomerge.assembly.realign.training import check_no_adapters, freeze_encoder, train_with_heads

        check_no_adapters(model)
        freeze_encoder(model, self.training.seed)
        model.encoder.add_adapters(self.rank, self.activation, self.last_blocks)
        return train_with_heads(model, inputs, self.training, self.name, checkpointing=self.checkpointing)
