"""The configuration of a peft LoRA adapter: whether it is plain LoRA, and the rank and scale of each module."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simomerge.checkpoints.lora_names import REMEDY
from simomerge.core.documents import read_json
from simomerge.core.errors import InputError

CONFIG = "adapter_config.json"
_CONFIG_SCHEMA = {
    "peft_type": str,
    "r?": int,
    "lora_alpha?": float,
    "rank_pattern?": (dict, type(None)),
    "alpha_pattern?": (dict, type(None)),
    "modules_to_save?": (list, type(None)),
}

#: Options with which the weights are more than base + scale * B @ A, or belong to more than the base's modules.
_VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer replication",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trainable tokens",
}
#: Initialisations that subtract the first B @ A from the base: the adapter fits only the changed base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_WORD = re.compile(r"\w+")
_SECONDS = 0.02  # for one expression of adapter_config.json and one name


def read_config(path: Path) -> dict[str, Any]:
    """The content of adapter_config.json.

    Raises:
        InputError: no such file, another type of adapter than plain LoRA, or an initialisation that changed the base.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: give the folder of a peft adapter.")
    config: dict[str, Any] = read_json(path, "copy or save the adapter again.", _CONFIG_SCHEMA)
    if config["peft_type"] != "LORA":
        raise InputError(f"{path} holds an adapter of type {config['peft_type']}, not LORA: {REMEDY}.")
    for option, variant in _VARIANTS.items():
        if config.get(option):
            raise not_plain(path, variant)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise InputError(
            f"{path}: it began as '{start}', which also changes the base: save it with peft's "
            "path_initial_model_for_weight_conversion, which makes it plain LoRA."
        )
    return config


def not_plain(path: Path, variant: str) -> InputError:
    """The error for an adapter of a variant of LoRA, whose weights are not base + scale * B @ A."""
    return InputError(f"{path}: the adapter uses {variant}, which is more than base + B @ A: {REMEDY}.")


def rank_and_scale(path: Path, config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """The rank of a module's factors, and the factor of their product.

    Args:
        path: The file of the configuration, for messages.
        config: Its content.
        module: The name of the module.

    Raises:
        InputError: The configuration has no rank and alpha for it.
    """
    try:
        rank = _by_pattern(config.get("rank_pattern") or {}, module, config.get("r", 8))
        alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if isinstance(rank, int) and math.isfinite(scale):
            return rank, float(scale)
    except (ArithmeticError, AttributeError, TypeError, ValueError):
        pass
    raise InputError(f"{path}: no rank and alpha for '{module}' can be read from it: copy or save the adapter again.")


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    # As peft does: the first expression that matches the end of the name, from the start or after a dot.
    return next((value for key, value in patterns.items() if _ends_with(module, key)), default)


def _ends_with(module: str, key: str) -> bool:
    if _WORD.fullmatch(key):
        return f".{module}".endswith(f".{key}")
    import regex  # it can stop: an expression from a file may take forever

    try:
        return regex.match(rf"(.*\.)?({key})$", module, timeout=_SECONDS) is not None
    except (regex.error, TimeoutError) as error:
        raise ValueError(key) from error
