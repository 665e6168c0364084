"""ProDistill: the blocks of the encoder learn the outputs of the experts' blocks, one block after the other.

Let f be a block, x its input in the merged encoder, whose earlier blocks are trained already, and x_t its input in the
encoder of expert t::

    argmin_c  sum_t || f(theta + sum_s c_s * tau_s, x) - f(theta_t, x_t) ||^2

theta are the block's weights in the given model, tau_s the task vector of expert s. There is one coefficient per expert
and weight, and all are zero at the start. The paper starts from theta_base and a coefficient of about 0.3, which is the
same for task arithmetic of this scale. All experts see the same images, so that the sum over the tasks is, up to a
constant, the distance from the mean of the experts' outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from simomerge.assembly.realign.method import Inputs, TrainedRealignment, register
from simomerge.training.settings import TrainSettings

if TYPE_CHECKING:
    from simomerge.models.encoders import Encoder
    from simomerge.models.model import SimoModel


@register(
    "prodistill",
    "ProDistill: Scalable Model Merging with Progressive Layer-wise Distillation (2025)",
    "https://arxiv.org/abs/2502.12706",
)
@dataclass(frozen=True)
class ProDistill(TrainedRealignment):
    """Train one coefficient per expert and weight, block by block, to match the outputs of the experts' blocks.

    ``training.steps`` is the number of steps per block. The heads stay as they are, so a fold may follow. Embeddings,
    norms and other modules outside the blocks stay too. The inputs and targets of one block are in memory for all
    images at once. All images must have one size.
    """

    teacher: ClassVar[str] = "experts"
    default_count: ClassVar[int] = 64
    changes_heads: ClassVar[bool] = False
    needs_plain_heads: ClassVar[bool] = True
    needs_base: ClassVar[bool] = True

    training: TrainSettings = TrainSettings(steps=100, batch_size=16, lr=0.1, weight_decay=0.0)

    @property
    def phrase(self) -> str:
        return "distilling the blocks of its encoder from the experts"

    @property
    def encoder_change(self) -> str:
        return "coefficients"

    def check_encoder(self, encoder: Encoder) -> None:
        encoder.block_shapes()  # raises if the blocks are unknown, or are not run one after the other

    def change(self, model: SimoModel, inputs: Inputs) -> dict[str, Any]:
        from simomerge.assembly.realign.blocks import BlockDistillation
        from simomerge.assembly.realign.teacher import check_heads
        from simomerge.assembly.realign.training import check_no_adapters

        check_heads(model, inputs.experts)  # heads that were fitted to this encoder would not fit the trained one
        assert inputs.base is not None
        check_no_adapters(model)
        distillation = BlockDistillation(model, inputs.base, inputs.experts)
        images = inputs.images.readable(one_size=True)
        return {
            "unlabelled_images": len(images),
            **distillation.run(images, self.training, inputs.work_folder),
        }
