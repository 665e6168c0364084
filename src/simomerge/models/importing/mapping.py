"""Any training code's checkpoint as an expert: which of its tensors are the encoder's, which the head's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simomerge.checkpoints import Checkpoint, canonical_name, canonicalise, fingerprint, open_checkpoint
from simomerge.core.assets import resolve_source
from simomerge.core.errors import InputError
from simomerge.datasets.tasks import Task
from simomerge.models.encoders import Encoder, load_encoder
from simomerge.models.heads import HEADS, head_for
from simomerge.models.importing.names import from_dinov2, split_gates
from simomerge.models.model import SimoModel


@dataclass(frozen=True)
class Reading:
    """How a weight file is read; see `simomerge.models.importing.import_expert`."""

    encoder: str | Path | None = None
    encoder_prefix: str = ""
    head_prefix: str = ""
    head: str = ""
    head_settings: Mapping[str, Any] = field(default_factory=dict)
    drop: Sequence[str] = ()
    taps: Sequence[int] | None = None
    apply_layernorm: bool | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def allow_only(self, source: str, why: str, *names: str) -> None:
        """Refuse what is given and would be ignored."""
        given = (each.name for each in fields(self) if getattr(self, each.name) not in (None, "", (), [], {}))
        for name in given:
            if name not in names:
                raise InputError(f"{source}: {_OPTIONS.get(name, name)} does nothing here, {why}; leave it out.")

    def load_encoder(self, taps: Sequence[int] | None = None, apply_layernorm: bool | None = None) -> Encoder:
        """The encoder that a checkpoint fine-tuned, or whose features a head reads; what is given here comes first."""
        normed = self.apply_layernorm if self.apply_layernorm is not None else apply_layernorm
        encoder = load_encoder(resolve_source(str(self.encoder)), self.taps or taps, normed)
        for buffer, values in ((encoder.mean, self.mean), (encoder.std, self.std)):
            if values is not None:
                if len(values) != 3:
                    raise InputError(f"mean or std {list(values)}: give three numbers, of red, green and blue.")
                buffer.copy_(torch.tensor(values).view(1, 3, 1, 1))
        return encoder


_OPTIONS = {"head_settings": "--head-arg", "apply_layernorm": "--layernorm"} | {
    name: f"--{name.replace('_', '-')}"
    for name in ("encoder", "encoder_prefix", "head_prefix", "head", "drop", "taps", "mean", "std")
}


def read_mapped(file: Path, task: str, kind: str, classes: Sequence[str], reading: Reading) -> SimoModel:
    """The expert; see `simomerge.models.importing.import_expert`."""
    for name, value, what in (
        ("encoder", reading.encoder, "the folder or hub id of its base"),
        ("head", reading.head, "module:Class, or " + ", ".join(HEADS)),
    ):
        if not value:
            raise InputError(f"{file} is a weight file: give --{name} ({what}) to read it.")
    own, others = reading.encoder_prefix, reading.head_prefix
    if own == others:
        raise InputError(f"{file}: --encoder-prefix and --head-prefix are both {own!r}: say what tells them apart.")
    weights = open_checkpoint(file)
    loaded = reading.load_encoder()
    base = loaded_origin(str(reading.encoder), loaded)
    described = Task(task, kind, tuple(classes))
    decoder = head_for(loaded, reading.head, described.channels, **reading.head_settings)
    parts: dict[str, nn.Module] = {others: decoder} | ({own: loaded.backbone} if own else {})
    fill(weights, parts, reading.drop, [f"{own}embeddings.mask_token"] if own else [])
    origin = {**source_of(str(file), "mapping"), **({"base": base} if own else {})}
    return SimoModel(loaded, {task: described}, {task: decoder}, origin).eval()


def loaded_origin(source: str, encoder: Encoder) -> dict[str, str]:
    """What a model's provenance says of its base."""
    name = Path(source).name if Path(source).exists() else source
    return {"source": name, "fingerprint": fingerprint(encoder.backbone.state_dict())}


def source_of(source: str, how: str) -> dict[str, Any]:
    """The provenance of an imported expert; a folder's name, not its path."""
    return {"imported": {"source": Path(source).name if Path(source).exists() else source, "as": how}}


MAY_LACK = ("num_batches_tracked",)
"""Last parts of names of tensors that no prediction depends on, and that some files leave out."""


def fill(
    weights: Checkpoint, parts: Mapping[str, nn.Module], drop: Sequence[str] = (), may_lack: Sequence[str] = ()
) -> None:
    """Copy a checkpoint's tensors into modules, by the prefix of their names, every one of both.

    Args:
        weights: the checkpoint.
        parts: prefix -> the module of which it is the prefix; the longest that fits counts.
        drop: prefixes of tensors that are left out.
        may_lack: beginnings of names in the file of tensors that it need not hold.

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
    lacking = [f"{prefix}{name}" for prefix, (_, _, names) in plans.items() for name in names]
    unfilled = [name for name in lacking if not name.startswith(tuple(may_lack))]
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
    tensors, stored_as = split_gates(tensors, stored_as, own)
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
    lacking = [name for name in missing if name.rpartition(".")[2] not in MAY_LACK]
    return {**{name: wanted[name] for name in missing}, **state}, unused, lacking
