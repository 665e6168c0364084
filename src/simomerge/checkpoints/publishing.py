"""Publish a model folder on the hub: only files that belong to it, private unless asked otherwise, in one commit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simomerge.checkpoints.card import PICTURE, model_card
from simomerge.checkpoints.description import read_description
from simomerge.checkpoints.reading import check_safetensors
from simomerge.core.errors import InputError
from simomerge.core.hub import LOGIN
from simomerge.core.model_files import is_model_file, needed_files
from simomerge.core.text import first_sentence

_OTHERS = (".gitattributes", "README.md")
"""What a repository without a model may hold."""


@dataclass(frozen=True)
class Published:
    """What was sent.

    Attributes:
        url: The page of the model.
        files: The files of the repository now, besides those that the hub adds.
        left_out: Files in the folder that belong to no model, which were not sent.
        private: Whether only its owner can see it.
    """

    url: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    private: bool


def files_to_publish(folder: Path) -> tuple[list[str], list[str]]:
    """The files of a model folder that would be sent, and those that would not; paths within the folder.

    Raises:
        InputError: It is no model folder, a file of the model is missing, damaged or a link that leads out of the
            folder, or a folder in it is a link.
    """
    description = read_description(folder)
    paths = sorted(folder.rglob("*"))
    if linked := [path for path in paths if path.is_symlink() and path.is_dir()]:
        raise InputError(f"{linked[0]} is a link to a folder; copy the folder with its files first.")
    found = [path.relative_to(folder).as_posix() for path in paths if not path.is_dir()]
    chosen = [name for name in found if is_model_file(name)]
    if missing := [name for name in needed_files(description, folder) if name not in chosen]:
        raise InputError(
            f"{folder / missing[0]}: missing, so the model is not complete; take it from its source again."
        )
    for name in chosen:
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{path} is a link to a file outside the folder; copy the folder with its files first.")
        if path.suffix == ".safetensors":
            check_safetensors(path)
    return chosen, [name for name in found if name not in chosen]


def card_to_publish(folder: Path, repository: str, licence: str = "", picture: bool = False) -> str:
    """The model card that would be sent. Raises InputError if the folder is no model folder."""
    return model_card(read_description(folder), picture or (folder / PICTURE).is_file(), repository, licence)


def check_repository(repository: str) -> str:
    """The name of a repository, OWNER/NAME. Raises InputError if it is not one."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        valid = repository.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise InputError(f"{repository!r} cannot be the name of a repository; give OWNER/NAME.")
    return repository


def push_folder(
    folder: str | Path,
    repository: str,
    *,
    private: bool = True,
    licence: str = "",
    message: str = "",
    picture: bytes | None = None,
) -> Published:
    """Send a model folder to the hub, into a repository that is created if there is none.

    The same commit removes the files of an earlier model in it and replaces its README.md. Other files stay, and an
    existing repository keeps its visibility.

    Args:
        folder: The model folder.
        repository: OWNER/NAME.
        private: Whether only its owner can see a new repository.
        licence: As the hub names it, such as "apache-2.0"; by default the one that all parents of the model have.
        message: Of the commit.
        picture: A PNG file that the model card shows, in place of the folder's.

    Raises:
        InputError: No model folder, a wrong name, no token or one that may not write, a repository that holds another
            kind of model, or a hub that cannot be reached. A new repository may have been created by then, which the
            message says; it has no model yet.

    Example:
        >>> push_folder("runs/scene", "me/scene").private                                       # doctest: +SKIP
        True
    """
    folder = Path(folder)
    chosen, left_out = files_to_publish(folder)
    card = card_to_publish(folder, check_repository(repository), licence, picture is not None)
    content: dict[str, Path | bytes] = {name: folder / name for name in chosen}
    content |= {"README.md": card.encode(), **({PICTURE: picture} if picture is not None else {})}
    there: _Repository | None = None
    try:
        there = _create(repository, private)
        _commit(repository, content, there.files, message or "A model of simomerge")
    except InputError:
        raise
    except Exception as error:  # the library raises many classes
        created = " The repository was created before that, and has no model yet." if there and there.is_new else ""
        raise InputError(f"{repository}: {_problem(error)}{created}") from error
    from huggingface_hub import constants

    return Published(f"{constants.ENDPOINT}/{repository}", tuple(content), tuple(left_out), there.private)


@dataclass(frozen=True)
class _Repository:
    """A repository before the model is sent."""

    files: list[str]
    private: bool
    is_new: bool = False


def _create(repository: str, private: bool) -> _Repository:
    """Create a repository if there is none, and look at what is in it."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if not get_token():
        raise InputError(f"{repository}: sending a model needs a token of the hub that may write; {LOGIN}.")
    api = HfApi()
    try:
        found: Any = api.model_info(repository)
    except RepositoryNotFoundError:
        api.create_repo(repository, private=private)
        return _Repository([], private, is_new=True)
    files = [sibling.rfilename for sibling in found.siblings or ()]
    if "simo.json" not in files and (foreign := [name for name in files if name not in _OTHERS]):
        raise InputError(f"{repository} holds something else, such as {foreign[0]}; give the name of a new repository.")
    return _Repository(files, bool(found.private))


def _commit(repository: str, content: Mapping[str, Path | bytes], there: list[str], message: str) -> None:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    stale = [name for name in there if is_model_file(name) and name not in content]
    operations: list[Any] = [CommitOperationDelete(name) for name in stale]
    operations += [
        CommitOperationAdd(name, source if isinstance(source, bytes) else str(source))
        for name, source in content.items()
    ]
    HfApi().create_commit(repository, operations, commit_message=message)


def _problem(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be sent; unset it."
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"your token may not write there; {LOGIN} with one that may."
    return f"the hub did not take it ({first_sentence(error)[:200]})."
