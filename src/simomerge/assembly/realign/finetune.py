"""Fine-tuning: the encoder and all heads, trained on labels from the merge instead of from the base.

This is joint training with another start. It is what the distilled encoder is compared with when labels exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from simomerge.assembly.realign.encoder import last_blocks_parameter, let_encoder_learn, trained_names
from simomerge.assembly.realign.method import (
    Inputs,
    TrainedRealignment,
    augmentation_parameter,
    checkpointing_parameter,
    hold_out_parameter,
    register,
    retry_parameter,
)
from simomerge.core.caution import warn
from simomerge.core.registry import parameter
from simomerge.training.choices import WEIGHTINGS
from simomerge.training.settings import TrainSettings

if TYPE_CHECKING:
    from simomerge.models.encoders import Encoder
    from simomerge.models.model import SimoModel
    from simomerge.training.evaluate import Scores


@register("finetune", "Multitask Learning (Caruana, 1997)", "https://doi.org/10.1023/A:1007379606734")
@dataclass(frozen=True)
class Finetune(TrainedRealignment):
    """Train the whole encoder and all heads on the labels of all tasks: joint training that starts from the merge.

    The weights with the smallest loss on held-out images are kept; those at the start are among them. The result has no
    more parameters than the model. The encoder's learning rate is 0.4 times that of the heads unless ``encoder_lr`` is
    given.
    """

    teacher: ClassVar[str] = "labels"
    default_count: ClassVar[int] = 4096

    training: TrainSettings = TrainSettings(steps=200, batch_size=32, lr=5e-4)
    last_blocks: int = last_blocks_parameter()
    weighting: str = parameter("equal", choices=tuple(WEIGHTINGS), help="How the losses of the tasks are combined.")
    hold_out: float = hold_out_parameter()
    retry: bool = retry_parameter()
    augmentation: str = augmentation_parameter()
    checkpointing: bool = checkpointing_parameter()

    @property
    def phrase(self) -> str:
        return "fine-tuning it on labels"

    @property
    def uses_encoder_lr(self) -> bool:
        return True

    @property
    def encoder_change(self) -> str:
        return "encoder"

    @property
    def takes_trees(self) -> bool:
        return True

    def check_encoder(self, encoder: Encoder) -> None:
        super().check_encoder(encoder)
        trained_names(encoder, self.last_blocks)
        if self.checkpointing:
            encoder.check_checkpointing()

    def change(self, model: SimoModel, inputs: Inputs) -> dict[str, Any]:
        from simomerge.assembly.realign.held_out import split_off, train_and_keep_best
        from simomerge.assembly.realign.training import check_no_adapters
        from simomerge.training.evaluate import evaluate
        from simomerge.training.settings import TuneOptions

        check_no_adapters(model)
        settings = let_encoder_learn(model, trained_names(model.encoder, self.last_blocks), self.training)
        options = TuneOptions(self.weighting, self.augmentation, self.checkpointing)
        train, held_out = split_off(inputs.data, self.hold_out)
        measured = partial(evaluate, model, held_out, settings.batch_size, f"{self.name}: held-out images")
        before = measured() if held_out else {}
        state_file = inputs.work_folder / "state.safetensors"
        cost = train_and_keep_best(
            model, (train, held_out), settings, state_file, self.name, options=options, retry=self.retry
        )
        if held_out:
            _report_worse(model, before, measured())
        return {"encoder_lr": settings.encoder_lr, **cost}


def _report_worse(model: SimoModel, before: Scores, after: Scores) -> None:
    """Warn of every task whose metric is worse on held-out images than before the training."""
    for name, task in model.tasks.items():
        was, now = before[name][task.metric], after[name][task.metric]
        worse = now < was if task.higher_is_better else now > was
        if worse and f"{was:.4g}" != f"{now:.4g}":
            warn(
                f"finetune: {name} is worse on held-out images than before the training: its {task.metric} went from"
                f" {was:.4g} to {now:.4g}. Another weighting of the losses may keep it."
            )
