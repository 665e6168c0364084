"""Checkpoints as files: read, write, fingerprint, and one convention for names. No models here."""

from simomerge.checkpoints.description import FORMAT, read_description
from simomerge.checkpoints.fingerprint import fingerprint
from simomerge.checkpoints.names import canonical_name, canonicalise
from simomerge.checkpoints.reading import Checkpoint, open_checkpoint
from simomerge.checkpoints.tensors import TensorInfo, as_numpy, flat_values, tensor_info
from simomerge.checkpoints.writing import parse_size, write_safetensors, write_sharded

__all__ = [
    "FORMAT",
    "Checkpoint",
    "TensorInfo",
    "as_numpy",
    "canonical_name",
    "canonicalise",
    "fingerprint",
    "flat_values",
    "open_checkpoint",
    "parse_size",
    "read_description",
    "tensor_info",
    "write_safetensors",
    "write_sharded",
]
