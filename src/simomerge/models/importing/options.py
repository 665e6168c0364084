"""The options of an import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from simomerge.checkpoints.experts import source_name
from simomerge.core.errors import InputError
from simomerge.datasets.tasks import Task
from simomerge.models.encoders import Encoder, load_encoder
from simomerge.models.model import SimoModel

_FLAGS = {"head_settings": "--head-arg", "apply_layernorm": "--layernorm"}
"""Option -> its flag on the command line, if the names differ."""


@dataclass(frozen=True)
class ImportOptions:
    """How to read a source that simomerge did not train; the keyword arguments of `simomerge.import_expert`.

    Attributes:
        kind: The kind of the task, if its name does not say it.
        classes: Class names of a segmentation, if the source does not name them.
        encoder: Folder or hub id of the encoder that the source fine-tuned (usually the base), or that its head reads.
        encoder_prefix: Prefix of the encoder's tensors in a weight file. Without it, the weights are those of
            ``encoder``.
        head_prefix: Prefix of the head's tensors in a weight file or an adapter.
        head: ``module:Class`` of a custom head (see `simomerge.models.heads.DenseHead`), or a key of
            `simomerge.models.heads.HEADS`.
        head_settings: Keyword arguments of the head.
        drop: Prefixes of tensors that are not needed, such as ``"auxiliary_head."``.
        taps, apply_layernorm: What the head reads; see `Encoder`.
        mean, std: RGB normalisation of the source's images, if it differs from that of ``encoder``.
        size: (height, width) of its training images in pixels, or "HEIGHTxWIDTH". Alignment resizes photographs to it.
    """

    kind: str = ""
    classes: Sequence[str] = ()
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
    size: str | tuple[int, int] | None = None

    def check_used(self, source: str, reason: str, *used: str) -> None:
        """Check that only options from ``used`` are given, or kind, classes and size. Raises InputError otherwise."""
        for name in (spec.name for spec in fields(self)):
            given = getattr(self, name) not in (None, "", (), [], {})
            if given and name not in ("kind", "classes", "size", *used):
                flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
                raise InputError(f"{source}: {flag} does nothing here, {reason}; leave it out.")

    def load_encoder(self, apply_layernorm: bool | None = None) -> Encoder:
        """Load ``encoder``, with the default for ``apply_layernorm`` if that option is not given."""
        for values in (self.mean, self.std):
            if values is not None and len(values) != 3:
                raise InputError(f"mean or std {list(values)}: give three numbers, for red, green and blue.")
        normed = apply_layernorm if self.apply_layernorm is None else self.apply_layernorm
        return load_encoder(str(self.encoder), self.taps, normed, self.mean, self.std)


def as_imported(encoder: Encoder, task: Task, head: nn.Module, source: str, how: str) -> SimoModel:
    """The imported expert; its provenance names the source, and how it was read."""
    provenance = {"imported": {"source": source_name(source), "as": how}}
    return SimoModel(encoder, {task.name: task}, {task.name: head}, provenance).eval()
