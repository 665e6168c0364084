"""Compare what a description would allocate with what a file holds, before any of it is allocated.

A description of a few bytes can ask for any amount of memory. Modules are therefore first created on torch's "meta"
device, where tensors have shapes but no values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simomerge.checkpoints import open_checkpoint
from simomerge.core.errors import InputError
from simomerge.core.text import shown

LARGEST_NUMBER = 1_000_000
"""No size or count in a configuration of a vision encoder comes near: vocabularies of text encoders have 256,000."""
MOST_BLOCKS = 1000
_COUNTS_BLOCKS = ("num_hidden_layers", "depths", "depth", "num_layers", "n_layers", "num_encoder_blocks")
_SIZES = re.compile(r"num_\w+|(?:hidden|intermediate|patch|image)_sizes?")
_SPARE = 20_000_000
"""Number of parameters that may be missing from a file. A pooler, which is not loaded, has 17 million at width 4096."""


def check_numbers(file: Path, config: Mapping[str, Any], sizes: bool = True) -> None:
    """Raise InputError if a size or count in a configuration is no number, or one that no real encoder has.

    Args:
        file, config: The file, and what it contains.
        sizes: Whether texts and sizes of 0 are refused, too: in the configuration, and in those inside it. Other
            mappings, such as the parameters of tasks, may have any.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_numbers(file, value, str(key).endswith("_config"))
            continue
        values = value if isinstance(value, list) else [value]
        numbers = [one for one in values if isinstance(one, (int, float))]
        is_text, is_count = any(isinstance(one, str) for one in values), str(key).startswith("num_")
        # A count may be 0, such as that of labels.
        wrong = is_text or (not is_count and min(numbers, default=1) <= 0)
        if sizes and wrong and _SIZES.fullmatch(str(key)):
            raise InputError(
                f"{file}: {key} is {shown(value)}, not a number above 0; take the file from its source again."
            )
        blocks = sum(numbers) if key in _COUNTS_BLOCKS else 0
        if any(abs(number) > LARGEST_NUMBER for number in numbers) or blocks > MOST_BLOCKS:
            raise InputError(
                f"{file}: {key} is {str(value)[:40]}, which no encoder has; take the file from its source again."
            )


def check_size(source: str, config: Any, create: Callable[[Any], nn.Module]) -> None:
    """Raise InputError if an encoder would hold many more parameters than the weights in its folder.

    Args:
        source: The folder.
        config: The configuration of transformers.
        create: Configuration -> the model, with random weights.
    """
    weights = open_checkpoint(source)
    held = sum(weights.info(name).size for name in weights)
    with torch.device("meta"):
        model = create(config)
    wanted = sum(tensor.numel() for tensor in chain(model.parameters(), model.buffers()))
    if wanted > held + _SPARE:
        raise InputError(
            f"{source}: config.json describes an encoder of {wanted / 1e6:,.0f} million parameters, but the weights"
            f" hold {held / 1e6:,.1f} million. The file is incomplete, or its config.json belongs to another model."
        )


def check_tensors(file: Path, create: Callable[[], nn.Module]) -> None:
    """Raise InputError if a module that a description creates would not have exactly the tensors of a file."""
    weights = open_checkpoint(file)
    try:
        problem = difference(create, {name: weights.info(name).shape for name in weights})
    except Exception:  # some custom modules need values: they fit or fail when they are created
        return
    if problem:
        raise InputError(f"{file}: does not fit simo.json ({problem}); take the model from its source again.")


def difference(create: Callable[[], nn.Module], held: Mapping[str, tuple[int, ...]]) -> str:
    """How the tensors of a module, which is created without values, differ from those that are held; else empty.

    Args:
        create: It may raise anything: some custom modules need values.
        held: The shapes by name.
    """
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in create().state_dict().items()}
    for name, shape in wanted.items():
        if name not in held:
            return f"'{name[:200]}' of shape {shape} is missing"
        if held[name] != shape:
            return f"'{name[:200]}' has shape {held[name]}, not {shape}"
    unknown = next((name for name in held if name not in wanted), "")
    return f"'{unknown[:200]}' belongs to nothing" if unknown else ""
