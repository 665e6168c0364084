"""A sha256 of the values in a checkpoint, independent of how they are stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from simomerge.checkpoints.names import canonicalise
from simomerge.checkpoints.parts import separated
from simomerge.checkpoints.tensors import as_numpy

_UNSAVED = ("num_batches_tracked", "position_ids", "relative_position_index")


def fingerprint(tensors: Mapping[str, Any]) -> str:
    """sha256 (hex) of the sorted canonical names, the shapes and the values as float32.

    It does not depend on the file format, the sharding, the order of the tensors, in-memory or on-disk names, or the
    float width: a float16 file and its float32 copy have the same one. It compares bits, so -0.0 and 0.0 differ.
    Buffers that only some versions of transformers and PyTorch save do not count (counters of batch norms, tables of
    positions). One tensor is in memory at a time.

    Args:
        tensors: a Checkpoint, or name -> numpy array or torch tensor.

    Raises:
        InputError: two names mean the same tensor, or a value is not a tensor.

    Example:
        >>> half, full = np.ones(3, np.float16), np.ones(3, np.float32)
        >>> fingerprint({"w": half}) == fingerprint({"w": full})
        True
    """
    digest, tensors = hashlib.sha256(), separated(tensors)
    for canonical, name in sorted(canonicalise(tensors).items()):
        if canonical.endswith(_UNSAVED):
            continue
        array = as_numpy(tensors[name], name)
        digest.update(json.dumps([canonical, list(array.shape), array.dtype.name]).encode())
        stored = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        digest.update(stored.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
