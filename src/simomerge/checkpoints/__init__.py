"""Checkpoints as files: read, write, fingerprint, and one convention for names. No models here."""

from simomerge.checkpoints.description import FORMAT, check_same_encoder, model_card, only_task, read_description
from simomerge.checkpoints.fingerprint import fingerprint
from simomerge.checkpoints.lora import LoraExpert, is_lora_folder, open_lora
from simomerge.checkpoints.names import canonical_name, canonicalise
from simomerge.checkpoints.reading import Checkpoint, open_checkpoint
from simomerge.checkpoints.tensors import TensorInfo, as_numpy, flat_values, tensor_info
from simomerge.checkpoints.writing import parse_size, write_safetensors, write_sharded
from simomerge.core.files import atomic_file, atomic_folder, atomic_write_bytes, atomic_write_text, remove_leftovers

__all__ = [
    "FORMAT",
    "Checkpoint",
    "LoraExpert",
    "TensorInfo",
    "as_numpy",
    "atomic_file",
    "atomic_folder",
    "atomic_write_bytes",
    "atomic_write_text",
    "canonical_name",
    "canonicalise",
    "check_same_encoder",
    "fingerprint",
    "flat_values",
    "is_lora_folder",
    "model_card",
    "only_task",
    "open_checkpoint",
    "open_lora",
    "parse_size",
    "read_description",
    "remove_leftovers",
    "tensor_info",
    "write_safetensors",
    "write_sharded",
]
