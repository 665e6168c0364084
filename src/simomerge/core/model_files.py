"""Files of weights by their names: those of a model folder, those that it needs, and single weight files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from simomerge.core.documents import read_json

DESCRIPTION = "simo.json"
"""The file that makes a folder a model."""

TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar")
"""How the names of files end that torch.save wrote."""

FOLDER_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The weight files of a transformers folder, in order of preference."""

WEIGHT_FILES = (".safetensors", *TORCH_FILES)
"""How the names of all weight files end."""

_KEYED = re.compile(rf"(.*?(?:{'|'.join(map(re.escape, WEIGHT_FILES))}))::([^/]+)", re.DOTALL)

_PATTERNS = (
    DESCRIPTION,
    "README.md",
    "picture.png",
    "encoder/*.json",
    "encoder/*.safetensors",
    "heads/*.safetensors",
    "branches/*.safetensors",
    "adapters.safetensors",
    "stitches.safetensors",
)


def is_model_file(name: str) -> bool:
    """Whether a path within a folder can be a file of a model. No such file holds code.

    Only these files are fetched from the hub, sent to it, or removed there.

    Example:
        >>> is_model_file("encoder/config.json"), is_model_file("encoder/private/notes.json")
        (True, False)
    """
    parts = name.split("/")
    return any(
        len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
        for wanted in (pattern.split("/") for pattern in _PATTERNS)
    )


def file_and_key(source: str | Path) -> tuple[str, str]:
    """Split ``FILE::KEY``: a training file, and which of the sets of weights in it is meant; "" if none is named.

    Example:
        >>> file_and_key("runs/last.ckpt::state_dict_ema")
        ('runs/last.ckpt', 'state_dict_ema')
        >>> file_and_key("runs/last.ckpt")
        ('runs/last.ckpt', '')
    """
    found = _KEYED.fullmatch(str(source))
    return (found[1], found[2]) if found else (str(source), "")


def is_weight_file(source: str | Path) -> bool:
    """Whether a source can only be a weight file, to judge by its name.

    Example:
        >>> is_weight_file("last.ckpt::ema"), is_weight_file("facebook/dinov2-base")
        (True, False)
        >>> is_weight_file("https://example.org/a.pth?token=secret")
        True
    """
    file, _ = file_and_key(source)
    return (file.partition("?")[0] if "://" in file else file).endswith(WEIGHT_FILES)


def needed_files(description: Mapping[str, Any], folder: Path) -> list[str]:
    """The files without which a model folder cannot be loaded; paths within the folder.

    Args:
        description: The content of simo.json.
        folder: The model folder, whose index of the encoder's weights is read if it has one.

    Raises:
        InputError: The index cannot be read.

    Example:
        >>> tree = {"tree": "2: depth+edges | 4: depth, edges"}
        >>> for name in needed_files({"tasks": {"depth": {}}, "encoder": tree}, Path()):
        ...     print(name)
        simo.json
        encoder/config.json
        encoder/model.safetensors
        heads/depth.safetensors
        branches/edges.safetensors
        stitches.safetensors
    """
    weights = sorted(shards(folder / "encoder")) or ["model.safetensors"]
    return [
        "simo.json",
        "encoder/config.json",
        *(f"encoder/{name}" for name in weights),
        *(f"heads/{task}.safetensors" for task in description.get("tasks") or {}),
        *["adapters.safetensors"] * bool(description.get("adapters")),
        *_tree_files(description.get("encoder") or {}),
    ]


def shards(folder: Path) -> set[str]:
    """The names of the files that the indices of a folder's weights list. Raises InputError if one cannot be read."""
    found = set[str]()
    for index in folder.glob("*.index.json"):
        content = read_json(index, "download it again.", {"weight_map?": {str: str}})
        found |= set(content.get("weight_map", {}).values())
    return found


def _tree_files(encoder: Mapping[str, Any]) -> list[str]:
    """The files of a tree of shared blocks besides ``encoder/``: a branch for each leaf but the first, and stitches.

    A branch is named by the first task of its leaf. There is a stitch wherever a group splits. Leaves without a task
    that was kept have no files. With a rank, the first leaf may have a file, too.
    """
    if not encoder.get("tree"):
        return []
    levels = [level.rpartition(":")[2].split(",") for level in str(encoder["tree"]).split("|")]
    first, last = ([[task.strip() for task in group.split("+")] for group in levels[place]] for place in (0, -1))
    kept = set(encoder.get("kept") or (task for leaf in last for task in leaf))
    leaves = [leaf for leaf in last if kept & set(leaf)]
    branches = [f"branches/{leaf[0]}.safetensors" for leaf in leaves[1:]]
    whole = [set(group) for group in first]
    return branches + ["stitches.safetensors"] * any(set(leaf) not in whole for leaf in leaves)
