"""Head re-alignment: the merged encoder is frozen, and every head is fine-tuned on features that are computed once.

Source: "Single-Input Multi-Output Model Merging" (arXiv 2504.11268), re-alignment, first remedy.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from simomerge.assembly.realign.method import Inputs, TrainedRealignment, register
from simomerge.core.registry import parameter

if TYPE_CHECKING:
    from simomerge.models.model import SimoModel


@register
@dataclass(frozen=True)
class Heads(TrainedRealignment):
    """Fine-tune each head by itself on the frozen merged encoder's features (the paper's first remedy).

    The encoder runs once over the images. Its features are kept memory-mapped in half precision, so the cost does not
    depend on the encoder's size, and every head is a job of its own.
    """

    name: ClassVar[str] = "heads"
    teacher: ClassVar[str] = "labels"
    paper: ClassVar[str] = "Single-Input Multi-Output Model Merging (Garcia Giraldo et al., 2025)"
    link: ClassVar[str] = "https://arxiv.org/abs/2504.11268"

    cache_budget: str | None = parameter(
        None, kind=str, help="Space that the features may take on disk, such as 20GB; what is free by default."
    )

    @property
    def phrase(self) -> str:
        return "re-aligning its heads"

    @property
    def trains_heads_apart(self) -> bool:
        return True

    def apply(self, model: SimoModel, inputs: Inputs) -> SimoModel:
        from simomerge.assembly.realign.training import finished, train_heads
        from simomerge.checkpoints import parse_size

        result = copy.deepcopy(model)
        budget = parse_size(self.cache_budget) if self.cache_budget else None
        cost = train_heads(result, inputs.data, self.training, inputs, "loss", budget)
        return finished(result, model, self.record({"labelled_images": len(inputs.data), **cost}))
