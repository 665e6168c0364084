"""Distillation: heads, or adapters or LoRA with the heads, trained to predict what the experts predict.

Training starts from the fold, which corrects the linear part of the mismatch in closed form; gradient descent then
corrects the rest. It uses images without labels.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from simomerge.assembly.realign.fold import VARIANTS, Fold
from simomerge.assembly.realign.lora import ALL_LINEAR, lora_config, lora_layers
from simomerge.assembly.realign.method import Inputs, TrainedRealignment, register
from simomerge.core.registry import parameter
from simomerge.training.settings import TrainSettings

if TYPE_CHECKING:
    from simomerge.models.model import SimoModel


@register(
    "distill",
    "Distilling the Knowledge in a Neural Network (Hinton et al., 2015)",
    "https://arxiv.org/abs/1503.02531",
)
@dataclass(frozen=True)
class Distill(TrainedRealignment):
    """Train the heads, and adapters or LoRA with them, to match the experts' predictions on unlabelled images.

    Heads that can be folded are folded first, unless the model was re-aligned before. All images must have one size.
    """

    teacher: ClassVar[str] = "experts"

    training: TrainSettings = TrainSettings(steps=200, batch_size=32, lr=5e-4)
    trains: str = parameter(
        "heads",
        choices=("heads", "adapters", "lora"),
        help="What learns: the heads alone, or with adapters, or with LoRA.",
    )
    rank: int = parameter(16, low=1, when={"trains": ("adapters", "lora")}, help="Rank of the adapters or of LoRA.")
    activation: str = parameter(
        "none",
        choices=("none", "relu"),
        when={"trains": ("adapters",)},
        help="Between an adapter's two factors: none (the paper) or relu (its code).",
    )
    variant: str = parameter("cross-tap", choices=VARIANTS, help="Variant of the fold that it starts from.")

    @property
    def phrase(self) -> str:
        inside = {"heads": "", "adapters": " with adapters", "lora": " with LoRA"}[self.trains]
        return f"distilling its heads{inside} from the experts"

    @property
    def encoder_change(self) -> str:
        return "" if self.trains == "heads" else self.trains

    def change(self, model: SimoModel, inputs: Inputs) -> dict[str, Any]:
        from simomerge.assembly.realign.predictions import TeacherPredictions
        from simomerge.assembly.realign.training import check_no_adapters, train_heads

        if self.trains != "heads":
            check_no_adapters(model, "distill its heads alone, or the model they were made from")
        config = lora_config(model.encoder, self.rank) if self.trains == "lora" else None  # fails before any work
        inputs = replace(inputs, images=inputs.images.readable(one_size=True))
        if not model.provenance.get("realign"):
            self._fold(model, inputs)
        predictions = TeacherPredictions(inputs.images, inputs.experts, inputs.work_folder / "predictions")
        inputs = replace(inputs, data=predictions)
        if self.trains == "heads":
            measured = train_heads(model, inputs, self.training, "distance")
        else:
            measured = self._train_encoder(model, inputs, config)
        return {"unlabelled_images": len(inputs.images), **measured}

    def _fold(self, model: SimoModel, inputs: Inputs) -> None:
        """Fold every head that can be folded, in place."""
        from simomerge.models.heads.projections import is_foldable

        tasks = [task for task, head in model.heads.items() if is_foldable(head)]
        if tasks:
            experts = {task: inputs.experts[task] for task in tasks}
            folded = Fold(variant=self.variant).apply(model.select(tasks), replace(inputs, experts=experts))
            for task in tasks:
                model.heads[task] = folded.heads[task]
            model.provenance = folded.provenance

    def _train_encoder(self, model: SimoModel, inputs: Inputs, config: Any) -> dict[str, Any]:
        """Train the heads together with adapters, or with LoRA if there is a config for it, in place."""
        from simomerge.assembly.realign.training import freeze_encoder, prediction_distances, train_with_heads

        freeze_encoder(model, self.training.seed)
        if config is None:
            model.encoder.add_adapters(self.rank, self.activation)
        with lora_layers(model.encoder, config) if config else nullcontext():
            cost = train_with_heads(model, inputs, self.training, self.name, prediction_distances)
        return {"alpha": config.lora_alpha, "targets": ALL_LINEAR, **cost} if config else cost
