"""SyMerge: merging coefficients and heads, trained together to predict what the experts predict.

The encoder's weights are theta + sum_t c[t, block] tau_t, where theta is the encoder of the given model, tau_t is the
task vector of expert t, and all coefficients c are zero at the start. If theta comes from task arithmetic, this is the
paper's parametrisation, theta_base + sum_t lambda[t, block] tau_t, started at the scale of the merge. It also works for
a model that was merged by another method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from simomerge.assembly.realign.method import Inputs, TrainedRealignment, register
from simomerge.training.settings import TrainSettings

if TYPE_CHECKING:
    from simomerge.models.model import SimoModel


@register("symerge", "SyMerge (2024)", "https://arxiv.org/abs/2412.19098")
@dataclass(frozen=True)
class SyMerge(TrainedRealignment):
    """Train one coefficient per expert and block, and the heads, to match the experts' predictions.

    The paper trains one task-specific layer per task. Here the whole head is trained, which is one layer in the case of
    a linear head. ``training.encoder_lr`` sets the coefficients' own peak learning rate. All images must have one size.
    """

    teacher: ClassVar[str] = "experts"
    needs_base: ClassVar[bool] = True

    training: TrainSettings = TrainSettings(steps=200, batch_size=16, lr=5e-4, encoder_lr=0.03)

    @property
    def phrase(self) -> str:
        return "training its merging coefficients and heads on the experts' predictions"

    @property
    def uses_encoder_lr(self) -> bool:
        return True

    @property
    def uses_layer_decay(self) -> bool:
        return False

    @property
    def encoder_change(self) -> str:
        return "coefficients"

    def change(self, model: SimoModel, inputs: Inputs) -> dict[str, Any]:
        from simomerge.assembly.realign.blend import EncoderBlend, task_vectors
        from simomerge.assembly.realign.predictions import TeacherPredictions
        from simomerge.assembly.realign.training import check_no_adapters, freeze_encoder, match_predictions
        from simomerge.training.lpft import trainable_parameters

        assert inputs.base is not None
        check_no_adapters(model)
        vectors = task_vectors(inputs.base, inputs.experts)
        images = inputs.images.readable(one_size=True)
        predictions = TeacherPredictions(images, inputs.experts, inputs.work_folder / "predictions")
        freeze_encoder(model, self.training.seed)
        blend = EncoderBlend(model, vectors)
        model.add_module("encoder", blend)
        trained = trainable_parameters(model)
        log = match_predictions(model, predictions, self.training, self.name, inputs.work_folder / "state.safetensors")
        model.add_module("encoder", blend.settle())
        return {
            "unlabelled_images": len(images),
            "steps": log.steps,
            "seconds": log.seconds,
            "trained_parameters": trained,
        }
