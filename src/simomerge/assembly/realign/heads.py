"""Head re-alignment: the merged encoder is frozen, and every head is fine-tuned on features that are computed once.

Source: "Single-Input Multi-Output Model Merging" (arXiv 2504.11268), re-alignment, first remedy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from simomerge.assembly.realign.method import Inputs, TrainedRealignment, register
from simomerge.core.registry import parameter

if TYPE_CHECKING:
    from simomerge.models.model import SimoModel


@register(
    "heads",
    "Single-Input Multi-Output Model Merging (Garcia Giraldo et al., 2025)",
    "https://arxiv.org/abs/2504.11268",
)
@dataclass(frozen=True)
class Heads(TrainedRealignment):
    """Fine-tune each head by itself on the frozen merged encoder's features (the paper's first remedy).

    The encoder runs once over the images. Its features are kept memory-mapped in half precision, so the cost does not
    depend on the encoder's size, and every head is a job of its own.
    """

    teacher: ClassVar[str] = "labels"

    cache_budget: str | None = parameter(
        None, kind=str, resource=True, help="Disk space for the features, such as 20GB; the free space by default."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache_budget is not None:
            from simomerge.checkpoints import parse_size

            parse_size(self.cache_budget)  # raises before any work

    @property
    def phrase(self) -> str:
        return "re-aligning its heads"

    @property
    def takes_trees(self) -> bool:
        return True

    def change(self, model: SimoModel, inputs: Inputs) -> dict[str, Any]:
        from simomerge.assembly.realign.training import train_heads
        from simomerge.checkpoints import parse_size

        budget = parse_size(self.cache_budget) if self.cache_budget else None
        return train_heads(model, inputs, self.training, "loss", budget)
