"""Find what a user names as a source: the disk first, then the local cache of the hub, then the hub itself."""

from __future__ import annotations

import difflib
import warnings
from pathlib import Path
from typing import Any

from simomerge.core.assets import resolve_source
from simomerge.core.documents import read_json
from simomerge.core.errors import InputError

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_SETTINGS = ("config.json", "preprocessor_config.json", "processor_config.json")
_COMPLETE = ("simo.json", *_WEIGHTS, "adapter_config.json")
"""Files of which a usable copy in the cache holds at least one."""


def local_source(source: str | Path, bare: bool = True) -> str:
    """The local path of a source: a path on the disk, ``rooms-base``, or a hub id, whose files are fetched if needed.

    What exists on the disk is taken first, then what the cache of the hub holds; only what neither has is looked up
    online. A text that can only be a path, and names with a prefix such as ``timm:``, are returned unchanged, whether
    the path exists or not.

    Args:
        source: What the user wrote.
        bare: Whether a name without an owner may be a hub id.

    Raises:
        InputError: No such path, and the hub id is unknown or the hub cannot be reached.

    Example:
        >>> local_source("./nowhere")
        './nowhere'
    """
    given, path = str(source), resolve_source(source)
    if Path(path).exists():
        return path
    if ":" in given or is_only_a_path(given) or not (bare or "/" in given):
        return given
    cached = _cached(given)
    if cached and _is_complete(Path(cached)):
        return cached
    try:
        return _fetched(given)
    except Exception as error:  # no connection, no such id, a gated model, ...: the library raises many classes
        if cached:
            warnings.warn(
                f"{source}: the cache of the hub has no preprocessor_config.json for it or not all of its weights, and"
                " the hub cannot be reached. Without that file the normalisation of ImageNet is assumed.",
                stacklevel=2,
            )
            return cached
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = first_line.partition(". ")[0].rstrip(".")
        raise InputError(
            f"{source}: no such folder, and as a hub id: cannot load an encoder ({reason[:200]}). Give a folder with"
            f" config.json and model.safetensors, or a hub id while online.{similar(given)}"
        ) from error


def is_only_a_path(source: str) -> bool:
    """Whether a source cannot be a hub id, which has the form OWNER/NAME.

    If OWNER is a local folder such as runs/, a path is meant.
    """
    owner, slash, _ = source.partition("/")
    is_file = Path(source).suffix in (".safetensors", ".pt", ".pth", ".bin")
    return (
        is_file or source.startswith((".", "/", "~")) or source.count("/") > 1 or bool(slash and Path(owner).is_dir())
    )


def similar(path: str | Path) -> str:
    """A question with the entry of the same folder that has the most similar name; empty if there is none.

    Example:
        >>> _ = Path("depth").mkdir()
        >>> similar("dept")
        " Did you mean 'depth'?"
    """
    folder = Path(path).parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(Path(path).name, names, 1)
    return f" Did you mean '{folder / near[0]}'?" if near else ""


def _cached(hub_id: str) -> str | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(hub_id, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    return folder if any((Path(folder) / name).is_file() for name in _COMPLETE) else None


def _is_complete(folder: Path) -> bool:
    """Whether a copy has all shards of its weights, and says how images are normalised."""
    if any((folder / name).is_file() for name in ("simo.json", "adapter_config.json")):
        return True
    for index in folder.glob("*.index.json"):
        content = read_json(index, "download it again.", {"weight_map?": {str: str}})
        shards = set(content.get("weight_map", {}).values())
        if not all((folder / shard).is_file() for shard in shards):
            return False
    return any((folder / name).is_file() for name in _SETTINGS[1:])


def _fetched(hub_id: str) -> str:
    from huggingface_hub import HfApi, snapshot_download

    # Without a connection this fails at once, while a download tries again for half a minute.
    found: Any = HfApi().model_info(hub_id, timeout=10)
    names = {sibling.rfilename for sibling in found.siblings or ()}
    if names & {"simo.json", "adapter_config.json"}:
        return snapshot_download(hub_id)
    weights = next((name for name in _WEIGHTS if name in names), "model.safetensors")
    shards = [weights.removesuffix(".index.json").replace(".", "-*.", 1)] if weights.endswith(".index.json") else []
    return snapshot_download(hub_id, allow_patterns=[*_SETTINGS, weights, *shards])
