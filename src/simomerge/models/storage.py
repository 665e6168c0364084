"""The tensors of a model folder: encoder, branches of a tree, heads and adapters."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from simomerge.checkpoints.description import branch_file, existing
from simomerge.checkpoints.reading import check_safetensors
from simomerge.checkpoints.tensors import WRITTEN
from simomerge.core.caution import warn
from simomerge.core.classes import class_path, settings_of
from simomerge.core.errors import InputError
from simomerge.core.text import shortened, shown
from simomerge.merging.tree import Tree
from simomerge.models.encoders import CustomEncoder, Encoder, TreeEncoder
from simomerge.models.encoders.allocation import check_tensors, difference
from simomerge.models.encoders.loading import quiet
from simomerge.models.encoders.low_rank import check_rank, own_parameters
from simomerge.models.encoders.units import low_rank_of, unit_names
from simomerge.models.heads.surgery import SurgeryHead

STITCHES = "stitches.safetensors"
LARGE = 500_000_000
"""A module of more parameters is not created a second time to check its settings."""


def save_encoder(encoder: Encoder, folder: Path, dtype: str | torch.dtype | None = None) -> None:
    """Write the encoder into a model folder: ``encoder/`` and, for a tree, what every branch has of its own.

    Args:
        dtype: Of the floats, such as "float16" or "F16"; as they are by default.

    Raises:
        InputError: The dtype is unknown, or a weight is too large for it.
    """
    chosen = None if dtype is None else _known(dtype)
    if isinstance(encoder, TreeEncoder):
        _save_tree(encoder, folder, chosen)
    else:
        _save_plain(encoder, folder / "encoder", chosen)


def _known(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype by its name in torch or in safetensors. Raises InputError for others than `WRITTEN`."""
    name = str(dtype).removeprefix("torch.")
    found = name if name in WRITTEN else next((known for known, code in WRITTEN.items() if code == name), None)
    if found is None:
        raise InputError(f"dtype {dtype!r}: use float32, float16 or bfloat16.")
    return cast(torch.dtype, getattr(torch, found))


def _save_plain(encoder: Encoder, folder: Path, dtype: torch.dtype | None) -> None:
    """Write a transformers folder, or the tensors and the description of a custom encoder."""
    held = {value.dtype for value in encoder.backbone.state_dict().values() if value.is_floating_point()}
    backbone = encoder.backbone if dtype is None or held == {dtype} else _in_dtype(encoder.backbone, dtype)
    if isinstance(encoder, CustomEncoder):
        from safetensors.torch import save_file

        folder.mkdir()
        save_file(stored_tensors(backbone), folder / "model.safetensors")
        file, content = folder / "config.json", encoder.describe()
    else:
        with quiet():
            backbone.save_pretrained(folder)
        file = folder / "preprocessor_config.json"
        mean, std = encoder.preprocessing["mean"], encoder.preprocessing["std"]
        content = {"image_processor_type": "BitImageProcessor", "image_mean": mean, "image_std": std}
        content |= {"do_resize": False, "do_center_crop": False}
    file.write_text(json.dumps(content, indent=2) + "\n")


def _in_dtype(backbone: nn.Module, dtype: torch.dtype) -> Any:
    """A copy of a backbone with floats of another dtype. Raises InputError if a weight is too large for it."""
    rounded = copy.deepcopy(backbone).to(dtype)
    _check_finite(rounded.state_dict(), dtype)
    return rounded


def _check_finite(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            kind = str(dtype).removeprefix("torch.")
            raise InputError(f"{name} has values that are too large for {kind}; store the encoder as float32.")


def _save_tree(encoder: TreeEncoder, folder: Path, dtype: torch.dtype | None) -> None:
    """Write the first path of a tree as a complete encoder, what every path has of its own, and the stitches."""
    from safetensors.torch import save_file

    with encoder.plain(0):
        _save_plain(encoder.paths[0], folder / "encoder", dtype)
    (folder / "branches").mkdir()
    for place, leaf in enumerate(encoder.leaves):
        if own := encoder.branch_tensors(place):
            save_file(_rounded(own, dtype), branch_file(folder, encoder.tree.nodes[leaf].tasks[0]))
    if encoder.stitches:
        save_file(_rounded(nn.ModuleDict(encoder.stitches).state_dict(), dtype), folder / STITCHES)


def _rounded(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Tensors as a file stores them, with floats of another dtype. Raises InputError as `_in_dtype`."""
    found = {
        name: _stored(value.to(dtype) if dtype and value.is_floating_point() else value)
        for name, value in tensors.items()
    }
    if dtype:
        _check_finite(found, dtype)
    return found


def load_tree(settings: Mapping[str, Any], first: Encoder, folder: Path) -> TreeEncoder:
    """The tree of a model folder.

    Args:
        settings: The entry ``encoder`` of simo.json.
        first: The path of the first leaf.

    Raises:
        InputError: There is no such tree for this encoder, or a file is missing or does not fit.
    """
    tree, rank = Tree.read(settings["tree"]), settings.get("branch_rank")
    kept = settings.get("kept", tree.tasks)
    if not kept or not set(kept) <= set(tree.tasks):
        raise InputError(f"kept is {kept}, but the tasks of the tree are {', '.join(tree.tasks)}.")
    leaves = tree.leaves_of(kept)
    _check_branches(tree, leaves, rank, first, folder)
    encoder = TreeEncoder(tree, first, rank, kept)
    for place, leaf in enumerate(leaves):
        if encoder.branch_tensors(place):
            _load(partial(encoder.load_branch, place), branch_file(folder, tree.nodes[leaf].tasks[0]))
    if encoder.stitches:
        _load(nn.ModuleDict(encoder.stitches).load_state_dict, folder / STITCHES)
    return encoder


def _check_branches(tree: Tree, leaves: Sequence[int], rank: int | None, first: Encoder, folder: Path) -> None:
    """Check that the files of branches can hold the tree's weights, before memory is used for every branch."""
    names, modules = unit_names(first), dict(first.backbone.named_modules())
    low_rank: Mapping[str, Sequence[str]] = {}
    if rank is not None:
        check_rank(rank)
        low_rank = low_rank_of(first, rank)
    whole, needed = set(tree.path(leaves[0])), 0  # what encoder/ has, but for its factors
    for step in {step for leaf in leaves for step in tree.path(leaf)}:
        node = tree.nodes[step]
        for name in names[node.first - 1 : node.last]:
            layers = low_rank.get(name, ()) if node.first >= tree.splits else ()
            needed += own_parameters(modules[name], layers, rank or 0)
            needed -= own_parameters(modules[name], layers, 0) if step in whole else 0
    named = leaves if rank and any(low_rank.values()) else leaves[1:]
    files = [existing(branch_file(folder, tree.nodes[leaf].tasks[0])) for leaf in named]
    if (stored := sum(file.stat().st_size for file in files)) < needed:  # at least one byte per parameter
        raise InputError(
            f"{folder / 'branches'}: the branches hold {stored:,} bytes, but the tree {str(tree)!r} needs {needed:,}"
            " parameters; take the model from its source again."
        )


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module by name, as a file stores them."""
    return {name: _stored(tensor) for name, tensor in module.state_dict().items()}


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def with_tensors(create: Callable[[], nn.Module], path: Path) -> nn.Module:
    """A module with the tensors of a file. It is created only if it has exactly these tensors."""
    check_tensors(existing(path), create)
    module = create()
    _load(module.load_state_dict, path)
    return module


def check_settings(encoder: Encoder, heads: Iterable[nn.Module]) -> None:
    """Check that a loaded folder can create every custom encoder and head again, from the settings that it holds.

    It is no error, because the weights may be the result of a long training, and are worth saving.

    Warns:
        UserWarning: The settings of a class outside simomerge are rejected by it, or create other tensors.
    """
    with encoder.plain(0) if isinstance(encoder, TreeEncoder) else nullcontext():
        first = encoder.paths[0] if isinstance(encoder, TreeEncoder) else encoder
        given: list[nn.Module] = [first.backbone] if isinstance(first, CustomEncoder) else []
        given += [head.inner if isinstance(head, SurgeryHead) else head for head in heads]
        for module in given:
            if type(module).__module__.partition(".")[0] == "simomerge":
                continue
            if problem := _not_created_again(module):
                warn(
                    f"{class_path(module)} cannot be created again with its settings {shown(settings_of(module))}, so"
                    f" the saved model cannot be loaded ({problem}). Set self.settings in the class to the keyword"
                    " arguments that create the module, and save the model again."
                )


def _not_created_again(module: nn.Module) -> str:
    """Why the settings of a module do not create one that can take its tensors; empty if they do, or if it is unknown.

    The module is created without values if its class allows it, and else as a whole, unless it is large.
    """
    state = module.state_dict()
    settings = json.loads(json.dumps(settings_of(module)))  # as simo.json holds them
    create = partial(type(module), **settings)
    with torch.random.fork_rng(devices=[]):  # the random numbers after saving are those without it
        try:
            return difference(create, {name: tuple(value.shape) for name, value in state.items()})
        except Exception as error:
            large = sum(value.numel() for value in state.values()) > LARGE
            if large and not isinstance(error, TypeError):  # this one says that arguments are missing or unknown
                return ""
        try:
            create().load_state_dict(state)
        except Exception as error:
            return f"{type(error).__name__}: {shortened(' '.join(str(error).split()), 200)}"
    return ""


def _load(assign: Callable[[dict[str, Tensor]], Any], path: Path) -> None:
    """Read a file and assign its tensors. Raises InputError if they do not fit."""
    from safetensors.torch import load_file

    check_safetensors(existing(path))
    try:
        assign(load_file(path))
    except RuntimeError as error:
        first_line = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: does not fit simo.json ({first_line}).") from error
