"""The tensors of a model folder: encoders and trees are written, and tensors are read into modules."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simomerge.checkpoints.description import branch_file, existing
from simomerge.checkpoints.reading import check_safetensors
from simomerge.core.errors import InputError
from simomerge.models.encoders import CustomEncoder, Encoder, TreeEncoder
from simomerge.models.encoders.allocation import check_tensors
from simomerge.models.encoders.loading import quiet


def save_encoder(encoder: Encoder, folder: Path, dtype: str | None = None) -> None:
    """Write a transformers folder, or the tensors and the description of a custom encoder."""
    backbone = encoder.backbone if dtype is None else _in_dtype(encoder.backbone, dtype)
    if isinstance(encoder, CustomEncoder):
        from safetensors.torch import save_file

        folder.mkdir()
        save_file(tensors_of(backbone), folder / "model.safetensors")
        file, content = folder / "config.json", encoder.describe()
    else:
        with quiet():
            backbone.save_pretrained(folder)
        file = folder / "preprocessor_config.json"
        mean, std = encoder.preprocessing["mean"], encoder.preprocessing["std"]
        content = {"image_processor_type": "BitImageProcessor", "image_mean": mean, "image_std": std}
        content |= {"do_resize": False, "do_center_crop": False}
    file.write_text(json.dumps(content, indent=2) + "\n")


def _in_dtype(backbone: nn.Module, dtype: str) -> Any:
    """A copy of a backbone with floats of another dtype. Raises InputError if a weight is too large for it."""
    rounded = copy.deepcopy(backbone).to(getattr(torch, dtype))
    for name, value in rounded.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(f"{name} has values that are too large for {dtype}; store the encoder as float32.")
    return rounded


def save_tree(encoder: TreeEncoder, folder: Path) -> None:
    """Write the first path of a tree as a complete encoder, what every other path has of its own, and the stitches."""
    from safetensors.torch import save_file

    with encoder.plain(0):
        save_encoder(encoder.paths[0], folder / "encoder")
    (folder / "branches").mkdir()
    for place, leaf in enumerate(encoder.tree.leaves):
        if place:
            own = {name: _stored(tensor) for name, tensor in encoder.branch_tensors(place).items()}
            save_file(own, branch_file(folder, encoder.tree.nodes[leaf].tasks[0]))
    if encoder.stitches:
        save_file(tensors_of(nn.ModuleDict(encoder.stitches)), folder / "stitches.safetensors")


def load_branches(encoder: TreeEncoder, folder: Path) -> None:
    """Read what every path but the first has of its own, and the stitches."""
    for place, leaf in enumerate(encoder.tree.leaves):
        if place:
            path = branch_file(folder, encoder.tree.nodes[leaf].tasks[0])
            load_tensors(partial(encoder.load_branch, place), path)
    if encoder.stitches:
        load_tensors(nn.ModuleDict(encoder.stitches).load_state_dict, folder / "stitches.safetensors")


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module as safetensors stores them."""
    return {name: _stored(tensor) for name, tensor in module.state_dict().items()}


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def with_tensors(create: Callable[[], nn.Module], path: Path) -> nn.Module:
    """A module with the tensors of a file. It is created only if it has exactly these tensors."""
    check_tensors(existing(path), create)
    module = create()
    load_tensors(module.load_state_dict, path)
    return module


def load_tensors(assign: Callable[[dict[str, Tensor]], Any], path: Path) -> None:
    """Read a file and assign its tensors. Raises InputError if they do not fit."""
    from safetensors.torch import load_file

    check_safetensors(existing(path))
    try:
        assign(load_file(path))
    except RuntimeError as error:
        first_line = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: does not fit simo.json ({first_line}).") from error
