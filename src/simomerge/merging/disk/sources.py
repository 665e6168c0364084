"""Bases and experts on disk, opened without reading values and without torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from simomerge.checkpoints.card import licence_of
from simomerge.checkpoints.description import FILE, existing, head_file, read_description
from simomerge.checkpoints.experts import origin_of, own_task
from simomerge.checkpoints.fingerprint import fingerprint
from simomerge.checkpoints.lora import LoraExpert, is_lora_folder, open_lora
from simomerge.checkpoints.lora_names import warn_of_head
from simomerge.checkpoints.names import canonical_name, canonicalise, outer_prefix
from simomerge.checkpoints.parts import parts_of, separated
from simomerge.checkpoints.quantised import check_config
from simomerge.checkpoints.reading import Checkpoint, open_checkpoint
from simomerge.core.assets import resolve_source
from simomerge.core.errors import InputError
from simomerge.core.hub import local_source
from simomerge.core.model_files import file_and_key
from simomerge.core.remote import is_url, last_name, shown_url

CONFIGS = ("config.json", "preprocessor_config.json")
"""The files next to the weights of a transformers folder that belong to them."""


@dataclass(frozen=True)
class Source:
    """A base, an expert or a merged model on disk.

    Attributes:
        path: a weight file, a transformers folder, a model folder, or (experts only) a peft adapter folder.
        weights: the weights of its encoder, read when needed.
        description: the content of a model folder's simo.json; None for all others.
        hub_id: what it was named by, if that was not a path.
    """

    path: Path
    weights: Checkpoint | LoraExpert
    description: dict[str, Any] | None
    hub_id: str = ""

    @property
    def provenance(self) -> dict[str, Any]:
        """What simo.json records about where the weights come from; empty if there is none."""
        provenance: dict[str, Any] = (self.description or {}).get("provenance", {})
        return provenance

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the modules that its encoder declares as its blocks; none for most encoders."""
        return tuple((self.description or {}).get("encoder", {}).get("blocks", ()))

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.weights)

    @property
    def place(self) -> str:
        """Its path or hub id, for messages."""
        return self.hub_id or f"{self.path}{self._ending}"

    @property
    def _ending(self) -> str:
        """``::KEY`` if it is one of several sets of weights in a file."""
        _, key = file_and_key(self.weights.path)
        return f"::{key}" if key else ""

    def origin(self) -> dict[str, Any]:
        """What other models record about it, see `origin_of`. The fingerprint of its weights is computed once."""
        named = last_name(self.hub_id) if is_url(self.hub_id) else self.hub_id
        return origin_of(
            named or f"{self.path.name}{self._ending}", self._fingerprint, licence_of(self.path), self.provenance
        )

    def encoder_folder(self) -> Path:
        """The folder where config.json is expected."""
        if self.path.is_file():
            return self.path.parent
        return self.path / "encoder" if self.description else self.path

    def head(self, task: str) -> Path:
        """The file of the head that serves as ``task``. Raises InputError if it is missing or damaged."""
        file = existing(head_file(self.path, own_task((self.description or {})["tasks"], task)))
        open_checkpoint(file)  # reports a truncated file now, and not when the model is loaded
        return file


def open_source(path: str | os.PathLike[str], base: Mapping[str, Any] | None = None) -> Source:
    """Open a base or, with ``base``, an expert of it, without reading a value; by its path, hub id or embedded name.

    A prefix that a wrapper gave to all tensors of a weight file, such as Lightning's ``model.``, is left out if the
    names are those of the base without it.

    Raises:
        InputError: nothing there, a damaged file, quantised weights, or a tree of shared blocks.
    """
    given = os.fspath(path)
    place = local_source(given, bare=False)
    path, named = (Path(file_and_key(each)[0]) for each in (place, given))
    if is_url(given):
        hub_id = shown_url(given)
    else:
        hub_id = "" if Path(resolve_source(named)).exists() or not path.exists() else given
    if base is not None and is_lora_folder(path):
        adapted = open_lora(path, base)
        warn_of_head(path, adapted.head)
        return Source(path, adapted, None, hub_id)
    description = read_description(path) if (path / FILE).is_file() else None
    if description and description["encoder"].get("tree"):
        raise InputError(
            f"{given}: a tree of shared blocks, which has no single set of encoder weights. Give one encoder, or the"
            " experts that the tree was made from."
        )
    weights = open_checkpoint(place)
    if base is not None and path.is_file():
        weights = _unwrapped(weights, base)
    source = Source(path, weights, description, hub_id)
    if path.is_dir():
        check_config(source.encoder_folder())
    return source


def open_experts(
    base: str | os.PathLike[str], experts: Mapping[str, str | os.PathLike[str]]
) -> tuple[Source, dict[str, Source]]:
    """Open a base and experts of it, by name. Raises InputError as `open_source` does.

    If all experts are model folders, tensors of the base that none of them has are left out. Weight files must have
    every tensor of the base, since nothing else says what they are.
    """
    foundation = open_source(base)
    opened = {name: open_source(path, foundation.weights) for name, path in experts.items()}
    if opened and all(expert.description for expert in opened.values()):
        foundation = without_extras(foundation, opened)
    return foundation, opened


def _unwrapped(weights: Checkpoint, base: Mapping[str, Any]) -> Checkpoint:
    """The weights without what a wrapper put before all of their names."""
    known = {canonical_name(name) for own in base for name in (own, *parts_of(own))}
    prefix = outer_prefix(weights.keys(), lambda name: canonical_name(name) in known)
    return weights.renamed({name.removeprefix(prefix): name for name in weights}) if prefix else weights


def check_unchanged(inputs: Iterable[Source]) -> None:
    """Raise InputError if the weights of one are no longer what they were when it was opened."""
    for source in inputs:
        source.weights.check_unchanged()


def without_extras(base: Source, experts: Mapping[str, Source]) -> Source:
    """A base without the tensors that no expert has, such as a pooler or a head, which training drops."""
    assert isinstance(base.weights, Checkpoint)
    known = {name for expert in experts.values() for name in canonicalise(separated(expert.weights))}
    kept = [own for own in base.weights if any(canonical_name(part) in known for part in parts_of(own))]
    return replace(base, weights=base.weights.only(kept))
