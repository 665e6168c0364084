"""Distillation: heads, or adapters or LoRA with the heads, trained to predict what the experts predict.

It starts from the fold, which does most of the work in closed form; gradient descent repairs what is not linear. No
label is used, only images.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from simomerge.assembly.realign.fold import VARIANTS, Fold
from simomerge.assembly.realign.lora import ALL_LINEAR, lora_config, lora_layers
from simomerge.assembly.realign.method import Inputs, TrainedRealignment, register
from simomerge.core.registry import parameter
from simomerge.training.settings import TrainSettings

if TYPE_CHECKING:
    from pathlib import Path

    from simomerge.models.model import SimoModel


@register
@dataclass(frozen=True)
class Distill(TrainedRealignment):
    """Train the heads, and adapters or LoRA with them, to match the experts' predictions on unlabelled images.

    The heads are folded first where they can be, unless the model was re-aligned before. Images must be of one size.
    """

    name: ClassVar[str] = "distill"
    teacher: ClassVar[str] = "experts"
    paper: ClassVar[str] = "Distilling the Knowledge in a Neural Network (Hinton et al., 2015)"
    link: ClassVar[str] = "https://arxiv.org/abs/1503.02531"

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
    def trains_heads_apart(self) -> bool:
        return self.trains == "heads"

    @property
    def adds_adapters(self) -> bool:
        return self.trains == "adapters"

    @property
    def changes_encoder(self) -> bool:
        return self.trains != "heads"

    def apply(self, model: SimoModel, inputs: Inputs) -> SimoModel:
        from simomerge.assembly.realign.teacher import TeacherPredictions
        from simomerge.assembly.realign.training import check_no_adapters, finished, train_heads
        from simomerge.core import distributed

        if self.trains != "heads":
            check_no_adapters(model, "distill its heads alone, or the model they were made from")
        config = lora_config(model.encoder, self.rank) if self.trains == "lora" else None  # refuses before any work
        images = inputs.images.readable(one_size=True)
        start = model if model.provenance.get("realign") else self._folded(model, replace(inputs, images=images))
        result = copy.deepcopy(start)
        with distributed.temporary_folder() as temporary:
            work = inputs.work_folder or temporary
            predictions = TeacherPredictions(images, inputs.experts, work / "predictions")
            if self.trains == "heads":
                cost = train_heads(result, predictions, self.training, replace(inputs, work_folder=work), "distance")
            else:
                cost = self._train_encoder(result, predictions, config, work)
        inside: dict[str, Any] = {"alpha": config.lora_alpha, "targets": ALL_LINEAR} if config else {}
        measured = {**inside, "unlabelled_images": len(images), "labelled_images": 0, **cost}
        return finished(result, start, self.record(measured))

    def _folded(self, model: SimoModel, inputs: Inputs) -> SimoModel:
        """The model with every head folded that can be folded."""
        from simomerge.models.heads.projections import is_foldable
        from simomerge.models.model import SimoModel

        tasks = [task for task, head in model.heads.items() if is_foldable(head)]
        if not tasks:
            return model
        experts = {task: inputs.experts[task] for task in tasks}
        folded = Fold(variant=self.variant).apply(model.select(tasks), replace(inputs, experts=experts))
        heads = {task: folded.heads[task] if task in tasks else head for task, head in model.heads.items()}
        return SimoModel(model.encoder, model.tasks, heads, folded.provenance)

    def _train_encoder(self, model: SimoModel, predictions: Any, config: Any, work: Path) -> dict[str, Any]:
        """Train the heads together with adapters, or with LoRA where there is a config of it, in place."""
        from simomerge.assembly.realign.training import freeze_encoder, prediction_distances, train_with_heads

        freeze_encoder(model, self.training.seed)
        if config is None:
            model.encoder.add_adapters(self.rank, self.activation)
        state_file = work / f"{self.trains}.pt"
        with lora_layers(model.encoder, config) if config else nullcontext():
            return train_with_heads(model, predictions, self.training, state_file, "distill", prediction_distances)
