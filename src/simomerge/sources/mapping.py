"""Any training code's checkpoint as an expert: which of its tensors are the encoder's, which the head's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simomerge.assets import resolve_source
from simomerge.checkpoints import Checkpoint, canonical_name, canonicalise, fingerprint, open_checkpoint
from simomerge.encoders import Encoder, load_encoder
from simomerge.errors import InputError
from simomerge.heads import HEADS, head_for
from simomerge.model import SimoModel
from simomerge.sources.names import from_dinov2
from simomerge.tasks import Task


def read_mapped(
    file: Path,
    task: str,
    kind: str,
    classes: Sequence[str],
    encoder: str | Path | None,
    encoder_prefix: str,
    head_prefix: str,
    head: str,
    head_settings: Mapping[str, Any],
    drop: Sequence[str],
    taps: Sequence[int] | None,
    apply_layernorm: bool | None,
) -> SimoModel:
    """The expert; see `simomerge.sources.import_expert`."""
    for name, value, what in (
        ("encoder", encoder, "the folder or hub id of its base"),
        ("head", head, "module:Class, or " + ", ".join(HEADS)),
    ):
        if not value:
            raise InputError(f"{file} is a weight file: give --{name.replace('_', '-')} ({what}) to read it.")
    weights = open_checkpoint(file)
    loaded = encoder_of(str(encoder), taps, apply_layernorm)
    base = loaded_origin(str(encoder), loaded)
    described = Task(task, kind, tuple(classes))
    decoder = head_for(loaded, head, described.channels, **head_settings)
    parts: dict[str, nn.Module] = {head_prefix: decoder}
    if encoder_prefix:
        parts[encoder_prefix] = loaded.backbone
    fill(weights, parts, drop)
    origin = {**source_of(str(file), "mapping"), **({"base": base} if encoder_prefix else {})}
    return SimoModel(loaded, {task: described}, {task: decoder}, origin).eval()


def encoder_of(source: str, taps: Sequence[int] | None, apply_layernorm: bool | None) -> Encoder:
    """The encoder that a checkpoint fine-tuned, or whose features a head reads."""
    return load_encoder(resolve_source(source), taps, apply_layernorm)


def loaded_origin(source: str, encoder: Encoder) -> dict[str, str]:
    """What a model's provenance says of its base."""
    name = Path(source).name if Path(source).exists() else source
    return {"source": name, "fingerprint": fingerprint(encoder.backbone.state_dict())}


def source_of(source: str, how: str) -> dict[str, Any]:
    """The provenance of an imported expert; a folder's name, not its path."""
    return {"imported": {"source": Path(source).name if Path(source).exists() else source, "as": how}}


MAY_LACK = ("num_batches_tracked", "mask_token", "fusion_stage.layers.0.residual_layer1")
"""Parts of names of tensors that no prediction depends on, and that some files leave out."""


def fill(weights: Checkpoint, parts: Mapping[str, nn.Module], drop: Sequence[str] = ()) -> None:
    """Copy a checkpoint's tensors into modules, by the prefix of their names, every one of both.

    Args:
        weights: the checkpoint.
        parts: prefix -> the module of which it is the prefix; the longest that fits counts.
        drop: prefixes of tensors that are left out.

    Raises:
        InputError: tensors that no module takes, that a module lacks, or of another shape; nothing is copied.
    """
    mapped: dict[str, dict[str, str]] = {prefix: {} for prefix in parts}
    unused = []
    for name in weights:
        if name.startswith(tuple(drop)):
            continue
        prefix = max((prefix for prefix in parts if name.startswith(prefix)), key=len, default=None)
        if prefix is None:
            unused.append(name)
        else:
            mapped[prefix][name[len(prefix) :]] = name
    plans = {prefix: _plan(weights, module, mapped[prefix]) for prefix, module in parts.items()}
    unused += [name for _, left, _ in plans.values() for name in left]
    unfilled = [f"{prefix}{name}" for prefix, (_, _, lacking) in plans.items() for name in lacking]
    if unused or unfilled:
        raise InputError(
            f"{weights.path}: "
            + "; ".join(
                f"{len(names)} tensors {what} ({', '.join(names[:6])}{', ...' if len(names) > 6 else ''})"
                for what, names in (("are used by nothing", unused), ("are lacking", unfilled))
                if names
            )
            + ". Mend the prefixes, or drop what is not needed by --drop PREFIX."
        )
    for prefix, module in parts.items():
        module.load_state_dict(plans[prefix][0])


Plan = tuple[dict[str, torch.Tensor], list[str], list[str]]
"""The state dict of a module, names in the file that it does not take, names of its own that the file lacks."""


def _plan(weights: Checkpoint, module: nn.Module, names: Mapping[str, str]) -> Plan:
    wanted = module.state_dict()
    own = {canonical_name(name): name for name in wanted}
    tensors = {name: torch.from_numpy(weights[stored].copy()) for name, stored in names.items()}
    stored_as = dict(names)
    if not any(canonical_name(name) in own for name in names):
        tensors, stored_as = from_dinov2(tensors, stored_as)
    state: dict[str, torch.Tensor] = {}
    unused = []
    for canonical, name in canonicalise(tensors).items():
        target = own.get(canonical)
        if target is None:
            unused.append(stored_as[name])
        elif tensors[name].shape != wanted[target].shape:
            raise InputError(
                f"{weights.path}: {stored_as[name]} is {tuple(tensors[name].shape)}, and {target} of"
                f" {type(module).__name__} is {tuple(wanted[target].shape)}: another architecture or another size."
            )
        else:
            state[target] = tensors[name].to(wanted[target].dtype)
    missing = [name for name in wanted if name not in state]
    lacking = [name for name in missing if not any(part in name for part in MAY_LACK)]
    return {**{name: wanted[name] for name in missing}, **state}, unused, lacking
