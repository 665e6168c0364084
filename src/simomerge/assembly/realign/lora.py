"""LoRA re-alignment: low-rank changes of the encoder's layers, trained with the heads, then folded.

A layer with weight ``W`` computes ``W x + (alpha / rank) B A x`` during training. Afterwards its weight is
``W + (alpha / rank) B A``, which gives the same output up to rounding in float32. The paper's adapters work on whole
blocks and cannot be folded into weights, whereas LoRA leaves a plain encoder.

The layers are linear ones, or convolutions, whose ``A`` has the size of the kernel and whose ``B`` is 1 x 1. Grouped
convolutions, such as depthwise ones, stay as they are.

Source: "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). The layers and their folding are those
of peft.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from simomerge.assembly.realign.method import Inputs, TrainedRealignment, checkpointing_parameter, register
from simomerge.core.environment import install_command
from simomerge.core.errors import InputError
from simomerge.core.registry import parameter

if TYPE_CHECKING:
    from torch import nn

    from simomerge.models.encoders import Encoder
    from simomerge.models.model import SimoModel

ALL_LINEAR = "all-linear"


@register(
    "lora",
    "LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021)",
    "https://arxiv.org/abs/2106.09685",
)
@dataclass(frozen=True)
class Lora(TrainedRealignment):
    """Train LoRA in the encoder and all heads on the labels of all tasks, then fold it into the encoder's weights.

    ``training.encoder_lr`` sets LoRA's own peak learning rate.
    """

    teacher: ClassVar[str] = "labels"

    rank: int = parameter(16, low=1, help="Rank of each change.")
    alpha: float | None = parameter(
        None, kind=float, above=0, help="The change is scaled by alpha / rank, as in peft; the rank by default."
    )
    targets: str | Sequence[str] = parameter(
        ALL_LINEAR,
        many=True,
        help="Layers to change: all-linear (in an encoder without linear layers: all convolutions of one group), or the"
        " ends of names of linear layers and convolutions in memory.",
    )
    checkpointing: bool = checkpointing_parameter()

    @property
    def phrase(self) -> str:
        return "re-aligning it with LoRA"

    @property
    def uses_encoder_lr(self) -> bool:
        return True

    @property
    def encoder_change(self) -> str:
        return "lora"

    def check_encoder(self, encoder: Encoder) -> None:
        super().check_encoder(encoder)
        lora_config(encoder, self.rank, self.alpha, self.targets)
        if self.checkpointing:
            encoder.check_checkpointing()

    def change(self, model: SimoModel, inputs: Inputs) -> dict[str, Any]:
        from simomerge.assembly.realign.training import check_no_adapters, freeze_encoder, train_with_heads

        check_no_adapters(model)
        config = lora_config(model.encoder, self.rank, self.alpha, self.targets)
        freeze_encoder(model, self.training.seed)
        with lora_layers(model.encoder, config):
            cost = train_with_heads(model, inputs, self.training, self.name, checkpointing=self.checkpointing)
        return {"alpha": config.lora_alpha, **cost}


def lora_config(
    encoder: Encoder, rank: int, alpha: float | None = None, targets: str | Sequence[str] = ALL_LINEAR
) -> Any:
    """peft's LoraConfig for an encoder, with the full names of the target layers.

    Raises:
        InputError: peft is not installed, a target is no such layer, or the encoder has none.
    """
    names = _target_names(encoder.backbone, targets)
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError(f"LoRA needs peft ({error}): {install_command('lora')}.") from error
    return LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=names)


@contextmanager
def lora_layers(encoder: Encoder, config: Any) -> Iterator[None]:
    """Put LoRA into an encoder's layers, in place, and fold it into their weights when the context ends.

    Only these layers are replaced and later restored. Blocks and hooks stay the same objects, and all tensors keep
    their names. After an exception the LoRA layers remain.
    """
    from peft import LoraModel

    tuner = LoraModel(encoder.backbone, config, "default")
    yield
    tuner.merge_and_unload()


def _target_names(backbone: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Full names of the targeted layers."""
    from torch.nn import Conv2d, Linear

    modules = dict(backbone.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, Linear)]
    convolutions = [name for name, module in modules.items() if isinstance(module, Conv2d) and _can_fold(module)]
    known = [*linear, *convolutions]
    if not known:
        raise InputError(
            f"{type(backbone).__name__} has no linear layers and no convolutions of one group, and LoRA changes only"
            " these; use another method."
        )
    if targets == ALL_LINEAR:
        return linear or convolutions
    ends = [targets] if isinstance(targets, str) else list(targets)
    chosen = {end: [name for name in known if f".{name}".endswith(f".{end}")] for end in ends}
    wrong = [end for end, names in chosen.items() if not names]
    if wrong or not ends:
        shown = dict.fromkeys(name.rpartition(".")[2] for name in known)
        raise InputError(
            f"LoRA targets {ends}: "
            + (f"no linear layer or convolution of one group ends in {wrong[0]!r}" if wrong else "none named")
            + f"; name some of {', '.join(shown)}, or {ALL_LINEAR!r}."
        )
    return list(dict.fromkeys(name for names in chosen.values() for name in names))


def _can_fold(layer: Any) -> bool:
    """Whether peft can add its change to a convolution's weight. It knows no groups, dilation or other padding."""
    return layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
