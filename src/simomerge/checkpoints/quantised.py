"""Recognise quantised weights, whose integers or packed codes must not be merged as if they were values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simomerge.checkpoints.tensors import tensor_info
from simomerge.core.documents import read_json
from simomerge.core.errors import InputError

#: Tensors that quantising libraries store next to the codes: bitsandbytes, GPTQ and AWQ, FP8, compressed-tensors,
#: quanto and HQQ.
_COMPANION = re.compile(
    r"(?:^|\.)(?:SCB|absmax|nested_absmax|quant_map|nested_quant_map|quant_state\.[^.]+|qweight|qzeros|g_idx|W_q"
    r"|weight_(?:scale|scale_inv|zero_point|packed|format|scales)|weight\._(?:data|scale|shift|zeropoint))$"
)
_REMEDY = "dequantise it (in transformers: model.dequantize()) or give the model from before quantisation."


def check_not_quantised(tensors: Mapping[str, Any], what: str) -> None:
    """Raise InputError if some of the tensors are codes of a quantised model.

    Args:
        tensors: Name -> numpy array or torch tensor, or a Checkpoint. Only names and dtypes are read.
        what: What the message calls them.

    Example:
        >>> import numpy as np
        >>> check_not_quantised({"fc.weight": np.ones(2), "position_ids": np.arange(2)}, "the base")
    """
    for name in tensors:
        if name.rpartition(".")[2] == "weight" and not (info := tensor_info(tensors, name)).is_float:
            raise InputError(f"{what} is quantised: '{name}' is stored as {info.dtype}. To use it, {_REMEDY}")
        if _COMPANION.search(name):
            raise InputError(f"{what} is quantised: it holds '{name}'. To use it, {_REMEDY}")


def check_config(folder: Path) -> None:
    """Raise InputError if config.json of a transformers folder cannot be read or says that weights are quantised."""
    path = folder / "config.json"
    if not path.is_file():
        return
    found = read_json(path, "take it from its source again.").get("quantization_config")
    if found:
        method = found.get("quant_method", "an unknown method") if isinstance(found, dict) else found
        raise InputError(f"{path}: the weights are quantised ({method}). To use the model, {_REMEDY}")
