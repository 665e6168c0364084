"""Checkpoints as files: read, write, fingerprint, and one convention for names. No models here."""

from simomerge.checkpoints.description import FORMAT, read_description
from simomerge.checkpoints.files import atomic_file, atomic_folder, atomic_write_bytes, atomic_write_text
from simomerge.checkpoints.fingerprint import fingerprint
from simomerge.checkpoints.names import canonical_name, canonicalise
from simomerge.checkpoints.reading import Checkpoint, open_checkpoint
from simomerge.checkpoints.tensors import TensorInfo, as_numpy, tensor_info
from simomerge.checkpoints.writing import write_safetensors

__all__ = [
    "FORMAT",
    "Checkpoint",
    "TensorInfo",
    "as_numpy",
    "atomic_file",
    "atomic_folder",
    "atomic_write_bytes",
    "atomic_write_text",
    "canonical_name",
    "canonicalise",
    "fingerprint",
    "open_checkpoint",
    "read_description",
    "tensor_info",
    "write_safetensors",
]
