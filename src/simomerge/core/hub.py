"""Find what a user names as a source: the disk first, then the local cache of the hub, then the hub itself."""

from __future__ import annotations

import difflib
import glob
from pathlib import Path
from typing import Any

from simomerge.core.assets import resolve_source
from simomerge.core.caution import warn
from simomerge.core.documents import read_json
from simomerge.core.errors import InputError
from simomerge.core.model_files import FOLDER_WEIGHTS, file_and_key, is_model_file, is_weight_file, needed_files, shards
from simomerge.core.remote import is_url, local_copy
from simomerge.core.text import first_sentence

_SETTINGS = ("config.json", "preprocessor_config.json", "processor_config.json")
_COMPLETE = ("simo.json", *FOLDER_WEIGHTS, "adapter_config.json")
"""Files of which a usable copy in the cache holds at least one."""
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md")
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def local_source(source: str | Path, bare: bool = True) -> str:
    """The local path of a source: a path, ``rooms-base``, or a hub id or URL, whose files are fetched if needed.

    A hub id is OWNER/NAME or OWNER/NAME@REVISION, with a branch, a tag or a commit. FILE::KEY is a training file with
    the key of the weights that are meant; the key stays at the end of the path. What exists on the disk is taken
    first, then what the cache of the hub holds; only what neither has is looked up online. A text that can only be a
    path, and names with a prefix such as ``timm:``, are returned unchanged, whether the path exists or not.

    Args:
        source: What the user wrote.
        bare: Whether a name without an owner may be a hub id.

    Raises:
        InputError: No such path, and the hub has no such model or revision, asks for a token, or cannot be reached; or
            the id holds no model.

    Example:
        >>> local_source("./nowhere")
        './nowhere'
    """
    if is_url(source):
        file, _ = file_and_key(source)
        return f"{local_copy(file)}{str(source)[len(file) :]}"
    given, (file, key) = str(source), file_and_key(source)
    path = resolve_source(file)
    if Path(path).exists():
        return f"{path}::{key}" if key else path
    if ":" in given or is_only_a_path(given) or not (bare or "/" in given):
        return given
    hub_id, _, revision = given.partition("@")
    cached = _cached(hub_id, revision or None)
    if cached and _is_complete(Path(cached)):
        return cached
    try:
        return _fetched(hub_id, revision or None)
    except Exception as error:  # no connection, no such id, a gated model, ...: the library raises many classes
        if cached:
            warn(
                f"{source}: the cache of the hub has no preprocessor_config.json for it or not all of its weights, and"
                " the hub cannot be reached. Without that file the normalisation of ImageNet is assumed."
            )
            return cached
        problem = _problem(hub_id, revision, error)
        raise InputError(f"{source}: no such folder, and as a hub id: {problem}{similar(given)}") from error


def _problem(hub_id: str, revision: str, error: Exception) -> str:
    """What a failure means, and what to do: one or two sentences."""
    from huggingface_hub import constants, errors

    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, errors.GatedRepoError):
        return f"its owner asks you to accept terms first, at {constants.ENDPOINT}/{hub_id}; then {LOGIN}."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}{_revisions(hub_id)}."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no such model, or it is private. Check the name; for a private model, {LOGIN}."
    if isinstance(error, errors.OfflineModeIsEnabled):
        where = constants.HF_HUB_CACHE
        return f"cannot load it: HF_HUB_OFFLINE is set, and {where} does not hold it; load it once while online."
    reason = first_sentence(error)
    return (
        f"cannot load it ({reason[:200]}). Give a folder with config.json and model.safetensors, or a hub id while"
        " online."
    )


def _revisions(hub_id: str) -> str:
    """The revisions that a model has, as the end of a sentence; empty if the hub does not say."""
    from huggingface_hub import HfApi

    try:
        found = HfApi().list_repo_refs(hub_id)
    except Exception:  # the first error is the one to report
        return ""
    names = [ref.name for ref in (*found.branches, *found.tags)]
    return f"; it has {', '.join(names[:8])}" if names else ""


def is_only_a_path(source: str) -> bool:
    """Whether a source cannot be a hub id, which has the form OWNER/NAME.

    If OWNER is a local folder such as runs/, a path is meant.
    """
    owner, slash, _ = source.partition("/")
    is_path = is_weight_file(source) or source.startswith((".", "/", "~")) or source.count("/") > 1
    return is_path or bool(slash and Path(owner).is_dir())


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


def _cached(hub_id: str, revision: str | None) -> str | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(hub_id, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if any((Path(folder) / name).is_file() for name in _COMPLETE) else None


def _is_complete(folder: Path) -> bool:
    """Whether a copy has all of its files: an interrupted download leaves some out."""
    if (folder / "adapter_config.json").is_file():
        return True
    if (folder / "simo.json").is_file():
        return _is_complete_model(folder)
    if not all((folder / shard).is_file() for shard in shards(folder)):
        return False
    return any((folder / name).is_file() for name in _SETTINGS[1:])


def _is_complete_model(folder: Path) -> bool:
    content = read_json(folder / "simo.json", "download it again.", {"tasks?": dict, "encoder?": dict})
    return all((folder / name).is_file() for name in needed_files(content, folder))


def _fetched(hub_id: str, revision: str | None) -> str:
    from huggingface_hub import HfApi, snapshot_download

    # Without a connection this fails at once, while a download tries again for half a minute.
    found: Any = HfApi().model_info(hub_id, revision=revision, timeout=10)
    names = {sibling.rfilename for sibling in found.siblings or ()}
    if "simo.json" in names:
        wanted = [glob.escape(name) for name in names if is_model_file(name)]
    elif "adapter_config.json" in names:
        wanted = list(_ADAPTER_FILES)
    else:
        weights = next((name for name in FOLDER_WEIGHTS if name in names), None)
        if weights is None or "config.json" not in names:
            raise InputError("it holds no model: neither simo.json, nor config.json with model.safetensors.")
        parts = [weights.removesuffix(".index.json").replace(".", "-*.", 1)] if weights.endswith(".json") else []
        wanted = [*_SETTINGS, "README.md", weights, *parts]
    return snapshot_download(hub_id, revision=revision, allow_patterns=wanted)
