"""Distillation: heads, or a part of the encoder with the heads, trained to predict what the experts predict.

Training starts from the fold, which corrects the linear part of the mismatch in closed form; gradient descent then
corrects the rest. It uses images without labels.
"""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from simomerge.assembly.realign.encoder import (
    last_blocks_parameter,
    let_encoder_learn,
    tasks_to_distil,
    trained_names,
)
from simomerge.assembly.realign.fold import VARIANTS, Fold
from simomerge.assembly.realign.lora import ALL_LINEAR, lora_config, lora_layers
from simomerge.assembly.realign.method import (
    Inputs,
    TrainedRealignment,
    augmentation_parameter,
    checkpointing_parameter,
    heads_were_changed,
    hold_out_parameter,
    register,
    retry_parameter,
)
from simomerge.core.caution import warn
from simomerge.core.errors import InputError
from simomerge.core.registry import parameter
from simomerge.core.text import size_text
from simomerge.training.settings import TrainSettings

if TYPE_CHECKING:
    from simomerge.models.encoders import Encoder
    from simomerge.models.model import SimoModel

INSIDE = ("adapters", "lora", "encoder")
"""What can learn together with the heads."""

CACHE_BUDGET = "20GB"
"""Disk space for the experts' predictions, unless it is given."""


@register(
    "distill",
    "Distilling the Knowledge in a Neural Network (Hinton et al., 2015)",
    "https://arxiv.org/abs/1503.02531",
)
@dataclass(frozen=True)
class Distill(TrainedRealignment):
    """Train the heads, alone or with the encoder, adapters or LoRA, to predict what the experts predict; no labels.

    Heads that can be folded are folded first, unless the model was re-aligned before. All images must have one size.
    With ``trains="encoder"`` the result has no more parameters than the folded merge; the encoder's learning rate is
    0.4 times that of the heads unless ``encoder_lr`` is given.
    """

    teacher: ClassVar[str] = "experts"

    training: TrainSettings = TrainSettings(steps=200, batch_size=32, lr=5e-4)
    trains: str = parameter(
        "heads",
        choices=("heads", *INSIDE),
        help="What learns: the heads alone, or with adapters, with LoRA, or with the whole encoder.",
    )
    rank: int = parameter(16, low=1, when={"trains": ("adapters", "lora")}, help="Rank of the adapters or of LoRA.")
    activation: str = parameter(
        "none",
        choices=("none", "relu"),
        when={"trains": ("adapters",)},
        help="Between an adapter's two factors: none (the paper) or relu (its code).",
    )
    last_blocks: int = last_blocks_parameter(when={"trains": ("encoder",)})
    variant: str = parameter("cross-tap", choices=VARIANTS, help="Variant of the fold that it starts from.")
    hold_out: float = hold_out_parameter()
    retry: bool = retry_parameter(when={"trains": INSIDE})
    features: float = parameter(
        0.0,
        low=0,
        when={"trains": INSIDE},
        help="Weight of the distance between what the heads' first layers compute and what the experts' do.",
    )
    augmentation: str = augmentation_parameter(when={"trains": INSIDE})
    predictions: str = parameter(
        "auto",
        choices=("auto", "stored", "live"),
        resource=True,
        when={"trains": INSIDE},
        help="Keep the experts' predictions on disk, or compute them for every batch; auto keeps them if they fit.",
    )
    cache_budget: str | None = parameter(
        None,
        kind=str,
        resource=True,
        when={"trains": INSIDE},
        help="Disk space that auto gives to the experts' predictions; 20GB by default.",
    )
    checkpointing: bool = checkpointing_parameter()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache_budget is not None:
            from simomerge.checkpoints import parse_size

            parse_size(self.cache_budget)  # raises before any work
        if self.predictions == "stored" and self._needs_live:
            raise InputError(
                f"{self.name}: stored predictions fit neither augmentation='scale-crop-flip' nor features above 0; use"
                " predictions='live'."
            )
        if self.checkpointing and self.trains == "heads":
            raise InputError(f"{self.name}: checkpointing does nothing while only the heads learn; leave it out.")

    @property
    def _needs_live(self) -> bool:
        return self.features > 0 or self.augmentation == "scale-crop-flip"

    @property
    def phrase(self) -> str:
        if self.trains == "encoder":
            return "distilling it from the experts"
        inside = {"heads": "", "adapters": " with adapters", "lora": " with LoRA"}[self.trains]
        return f"distilling its heads{inside} from the experts"

    @property
    def uses_encoder_lr(self) -> bool:
        return self.trains in ("lora", "encoder")

    @property
    def encoder_change(self) -> str:
        return "" if self.trains == "heads" else self.trains

    @property
    def takes_trees(self) -> bool:
        return self.trains != "lora"

    def change(self, model: SimoModel, inputs: Inputs) -> dict[str, Any]:
        from simomerge.assembly.realign.training import check_no_adapters, distil_heads
        from simomerge.models.heads.projections import is_foldable

        if self.trains != "heads":
            check_no_adapters(model, "distill its heads alone, or the model they were made from")
        inside = self._inside(model.encoder)
        experts = {task: inputs.experts[task] for task in tasks_to_distil(model, inputs.experts)}
        if self.features and not any(is_foldable(model.heads[t]) and is_foldable(experts[t].heads[t]) for t in experts):
            raise InputError(f"{self.name}: no head declares its first layers, so features does nothing; leave it out.")
        inputs = replace(inputs, experts=experts, images=inputs.images.readable(one_size=True))
        stored = self.trains == "heads" or self._stores(inputs)
        if stored:
            self._check_space(model, inputs)
        elif self.predictions == "auto" and not self._needs_live:
            self._say_live(inputs)
        if not heads_were_changed(model.provenance):
            self._fold(model, inputs)
        if self.trains == "heads":
            measured = distil_heads(model.select(list(inputs.experts)), inputs, self.training, self.hold_out, self.name)
        else:
            measured = self._train_inside(model, inputs, inside, stored)
        left_out = [task for task in model.tasks if task not in experts]
        return {"unlabelled_images": len(inputs.images), **({"left_out": left_out} if left_out else {}), **measured}

    def check_encoder(self, encoder: Encoder) -> None:
        super().check_encoder(encoder)
        self._inside(encoder)
        if self.checkpointing:
            encoder.check_checkpointing()

    def _inside(self, encoder: Encoder) -> Any:
        """What `_train_inside` needs: the names of the encoder's trained parameters, or the config of LoRA."""
        if self.trains == "encoder":
            return trained_names(encoder, self.last_blocks)
        if self.trains == "adapters":
            encoder.block_shapes()  # raises if the blocks are unknown
        return lora_config(encoder, self.rank) if self.trains == "lora" else None

    def _fold(self, model: SimoModel, inputs: Inputs) -> None:
        """Fold every head that can be folded, in place.

        The images that are held out later are left out: the fold fits the images that it sees, so that no state of the
        training could be better on them. Of more than `ENOUGH_IMAGES` training images it sees that number, spread
        evenly, because more do not improve a linear map.
        """
        from simomerge.assembly.realign.held_out import ENOUGH_IMAGES
        from simomerge.datasets.groups import evenly, training_images
        from simomerge.models.heads.projections import is_foldable

        seen = evenly(training_images(inputs.images, self.hold_out), ENOUGH_IMAGES)
        inputs = replace(inputs, images=inputs.images._subset(seen))
        experts = {task: expert for task, expert in inputs.experts.items() if is_foldable(model.heads[task])}
        if experts:
            folded = Fold(variant=self.variant).apply(model.select(list(experts)), replace(inputs, experts=experts))
            for task in experts:
                model.heads[task] = folded.heads[task]
            model.provenance = {**model.provenance, "realign": folded.provenance["realign"]}

    def _train_inside(self, model: SimoModel, inputs: Inputs, inside: Any, stored: bool) -> dict[str, Any]:
        """Train the heads together with the encoder, with adapters or with LoRA, in place."""
        from simomerge.assembly.realign.distillation import Distilling
        from simomerge.assembly.realign.training import freeze_encoder

        freeze_encoder(model, self.training.seed)
        settings, more = self.training, dict[str, Any]()
        layers: AbstractContextManager[None] = nullcontext()
        if self.trains == "encoder":
            settings = let_encoder_learn(model, inside, settings)
            more = {"encoder_lr": settings.encoder_lr}
        elif self.trains == "adapters":
            model.encoder.add_adapters(self.rank, self.activation)
        else:
            layers, more = lora_layers(model.encoder, inside), {"alpha": inside.lora_alpha, "targets": ALL_LINEAR}
        how = Distilling(
            settings,
            hold_out=self.hold_out,
            retry=self.retry,
            stored=stored,
            features=self.features,
            augmentation=self.augmentation,
            checkpointing=self.checkpointing,
        )
        with layers:
            cost = how.train(model.select(list(inputs.experts)), inputs, self.name)
        return {**more, **cost}

    def _stores(self, inputs: Inputs) -> bool:
        """Whether the experts' predictions are kept on disk."""
        from simomerge.assembly.realign.predictions import UnlabelledImages, are_kept
        from simomerge.checkpoints import parse_size
        from simomerge.core import distributed

        if self.predictions != "auto" or self._needs_live:
            return self.predictions == "stored"
        work = inputs.work_folder
        work.mkdir(parents=True, exist_ok=True)
        kept = are_kept(work / "predictions")
        if kept or (work / "state.safetensors").exists():
            fits = kept  # as the interrupted run decided; its own files take the space that was free then
        else:
            needed = UnlabelledImages(inputs.images, inputs.experts).bytes_of_predictions
            fits = needed <= min(parse_size(self.cache_budget or CACHE_BUDGET), shutil.disk_usage(work).free)
        return bool(distributed.from_first(fits))

    def _check_space(self, model: SimoModel, inputs: Inputs) -> None:
        """Check, before the fold, that what is stored fits on the disk.

        Raises:
            InputError: The experts' predictions, or with them the features of the heads' training, do not fit.
        """
        from simomerge.assembly.realign.predictions import PREDICTIONS, UnlabelledImages, bytes_kept, check_space
        from simomerge.assembly.realign.training import bytes_of_features
        from simomerge.core import distributed
        from simomerge.datasets.groups import training_images

        work, images = inputs.work_folder, UnlabelledImages(inputs.images, inputs.experts)
        needed = {PREDICTIONS: max(0, images.bytes_of_predictions - bytes_kept(work / "predictions"))}
        if self.trains == "heads":
            count = len(training_images(images, self.hold_out))
            part = model.select(list(inputs.experts))
            needed["the encoder's features"] = bytes_of_features(part, images.image(0), count, work)
        if distributed.is_first():
            check_space(needed, len(images), work)

    def _say_live(self, inputs: Inputs) -> None:
        """Warn that ``auto`` does not store the experts' predictions, unless an interrupted run decided that."""
        from simomerge.assembly.realign.predictions import UnlabelledImages
        from simomerge.checkpoints import parse_size

        needed = UnlabelledImages(inputs.images, inputs.experts).bytes_of_predictions
        budget, free = parse_size(self.cache_budget or CACHE_BUDGET), shutil.disk_usage(inputs.work_folder).free
        if needed <= min(budget, free):
            return
        warn(
            f"{self.name}: the experts run for each batch, because their predictions on {len(inputs.images)} images"
            f" need {size_text(needed)}: the budget is {size_text(budget)}, and {size_text(free)} are free. Raise"
            " cache_budget, or give predictions='live' for no warning."
        )
