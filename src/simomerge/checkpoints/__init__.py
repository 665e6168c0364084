"""Checkpoints as files: read, write, fingerprint, and one convention for names. No models here."""

from simomerge.checkpoints.description import FORMAT, model_card, read_description
from simomerge.checkpoints.experts import check_same_encoder
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
    "check_same_encoder",
    "fingerprint",
    "model_card",
    "flat_values",
    "open_checkpoint",
    "parse_size",
    "read_description",
    "tensor_info",
    "write_safetensors",
    "write_sharded",
]
