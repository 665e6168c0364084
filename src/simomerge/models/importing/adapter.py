"""LoRA adapters of peft with a head in them as experts: the adapter is folded into its base."""

from __future__ import annotations

from pathlib import Path

import torch

from simomerge.checkpoints.lora import open_lora
from simomerge.checkpoints.parts import joined
from simomerge.core.errors import InputError
from simomerge.models.importing.mapping import (
    check_not_one_layer,
    fill,
    optional_tensors,
    prepared,
    record_base,
    unwrapped,
)
from simomerge.models.importing.options import ImportOptions
from simomerge.models.model import SimoModel

_USED = ("encoder", "head", "head_prefix", "head_settings", "drop", "taps", "apply_layernorm", "mean", "std")
"""The options that an adapter's import takes besides kind, classes and size."""


def read_adapter(folder: Path, source: str, task: str, options: ImportOptions) -> SimoModel:
    """The expert of an adapter's folder; see `simomerge.import_expert`.

    Args:
        folder: The folder with adapter_config.json.
        source: What the user named it by.
    """
    options.check_used(source, "names in an adapter say which tensors are the encoder's", *_USED)
    expert = prepared(source, "LoRA adapter", task, options)
    backbone = expert.encoder.backbone
    own = backbone.state_dict()
    adapted = open_lora(folder, own, [prefix for prefix in (options.head_prefix, *options.drop) if prefix])
    if not adapted.head:
        raise InputError(
            f"{source}: the adapter holds no whole head. If LoRA changed the head, the head's own weights are missing:"
            " name it in modules_to_save, or fold the adapter where it was trained and import that file. If there is no"
            f" head, merge the adapter as it is (simomerge merge BASE {task}={source})."
        )
    record_base(expert, options)
    weights = unwrapped(adapted.head, [options.head_prefix])
    check_not_one_layer(source, weights, options)
    head = expert.heads[task]
    fill(weights, {options.head_prefix: head}, options.drop, optional_tensors(head, options))
    state = {name: torch.from_numpy(joined(name, adapted.__getitem__).copy()) for name in own}
    backbone.load_state_dict(state)
    return expert
