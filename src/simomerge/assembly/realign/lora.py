"""LoRA re-alignment: low-rank changes of the encoder's linear layers, trained with the heads, then folded.

A layer with weight ``W`` computes ``W x + (alpha / rank) B A x`` while it is trained; afterwards its weight is
``W + (alpha / rank) B A``, which gives the same but for the rounding of float32. The adapters of the paper stand
beside whole blocks, which no weight of a block can take up; LoRA leaves a plain encoder.

Source: "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). The adapters and their folding are
those of peft.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from simomerge.assembly.realign.labels import check_labels
from simomerge.assembly.realign.low_rank import check_no_adapters, only_heads_learn, train_with_heads
from simomerge.assembly.realign.record import after
from simomerge.core.errors import InputError
from simomerge.models.encoders import Encoder
from simomerge.models.model import SimoModel
from simomerge.training.settings import TrainSettings

LORA_SETTINGS = TrainSettings(steps=200, batch_size=32, lr=1e-3)
ALL_LINEAR = "all-linear"


def realign_lora(
    model: SimoModel,
    data: Any,
    settings: TrainSettings = LORA_SETTINGS,
    rank: int = 16,
    alpha: float | None = None,
    targets: str | Sequence[str] = ALL_LINEAR,
    checkpointing: bool = False,
    work_folder: str | Path | None = None,
) -> SimoModel:
    """Train LoRA in the encoder and all heads on the multi-task loss, then fold it into the encoder's weights.

    Args:
        model: a merged model; it stays as it is.
        data: a labelled dataset with the targets of every task (the paper's D_val).
        settings: of the training; ``encoder_lr`` is LoRA's own peak learning rate, where it has one.
        rank: of each change.
        alpha: the change is scaled by ``alpha / rank``, as in peft; the rank by default, so that the scale is 1.
        targets: "all-linear", every linear layer of the backbone; or the ends of names of such layers, as in peft:
            ``["fc1", "fc2"]``. The names are those in memory, which a version of transformers may have changed.
        checkpointing: keep of every block its input alone for the backward pass; the same gradients in less memory.
        work_folder: where the state of a killed run is kept, of this very re-alignment and no other.

    Returns:
        A new model with re-aligned heads and other encoder weights under the same names; no adapters.

    Raises:
        InputError: peft is not installed, a rank or alpha out of its range, a target that is no linear layer, an
            encoder without any, the data lacks labels of a task, or the model has adapters.

    Source:
        "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

    Example:
        >>> model = realign_lora(model, load_data("rooms", split="val"), rank=8)       # doctest: +SKIP
    """
    check_labels(model, data, "LoRA needs")
    check_no_adapters(model)
    config = lora_config(model.encoder, rank, alpha, targets)
    result = copy.deepcopy(model)
    state_file = Path(work_folder) / "lora.pt" if work_folder else None
    only_heads_learn(result, settings.seed)
    with lora(result.encoder, config):
        cost = train_with_heads(result, data, settings, state_file, "lora", checkpointing=checkpointing)
    record = {
        "method": "lora",
        **lora_record(config, targets),
        **asdict(settings),
        "labelled_images": len(data),
        **cost,
    }
    result.provenance = {**model.provenance, "realign": after(model, record)}
    return result.eval()


def lora_config(
    encoder: Encoder, rank: int, alpha: float | None = None, targets: str | Sequence[str] = ALL_LINEAR
) -> Any:
    """peft's LoraConfig for an encoder, the target layers by their full names; see `realign_lora`.

    Raises:
        InputError: as `realign_lora`; all that can be wrong is found here, before anything is trained.
    """
    if rank < 1:
        raise InputError(f"LoRA rank {rank}: use a whole number of at least 1, such as 16.")
    if alpha is not None and not 0 < alpha < math.inf:
        raise InputError(f"LoRA alpha {alpha}: use a number above 0; the rank is the default.")
    names = _target_names(encoder.backbone, targets)
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError(f'LoRA needs peft ({error}): pip install "simomerge[lora]".') from error
    return LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=names)


@contextmanager
def lora(encoder: Encoder, config: Any) -> Iterator[None]:
    """LoRA in an encoder's linear layers, in place, until the block ends, which folds it into their weights.

    Only the layers are replaced, and later put back. The blocks with their hooks stay the same objects, and the names
    of all tensors end as they began. Where the block raises, the encoder is left with its LoRA.
    """
    from peft import LoraModel

    tuner = LoraModel(encoder.backbone, config, "default")
    yield
    tuner.merge_and_unload()


def lora_record(config: Any, targets: str | Sequence[str]) -> dict[str, Any]:
    """What the provenance says of LoRA; the targets as they were given."""
    return {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "targets": targets if isinstance(targets, str) else list(targets),
    }


def _target_names(backbone: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Full names of the linear layers that are meant."""
    linear = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise InputError(
            f"{type(backbone).__name__} has no linear layers, and LoRA is for these; re-align by another method."
        )
    if targets == ALL_LINEAR:
        return linear
    ends = [targets] if isinstance(targets, str) else list(targets)
    chosen = {end: [name for name in linear if f".{name}".endswith(f".{end}")] for end in ends}
    wrong = [end for end, names in chosen.items() if not names]
    if wrong or not ends:
        known = dict.fromkeys(name.rpartition(".")[2] for name in linear)
        raise InputError(
            f"LoRA targets {ends}: "
            + (f"no linear layer ends in {wrong[0]!r}" if wrong else "none named")
            + f"; name some of {', '.join(known)}, or {ALL_LINEAR!r}."
        )
    return list(dict.fromkeys(name for names in chosen.values() for name in names))
