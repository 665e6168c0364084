"""The fingerprint depends on names, shapes and float32 values, and on nothing else."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from simomerge.checkpoints import fingerprint, open_checkpoint

HALF = {"a": torch.randn(3, 2).half(), "b": torch.randn(4).half(), "n": torch.tensor(3)}


def test_storage_does_not_matter(tmp_path: Path) -> None:
    full = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in HALF.items()}
    expected = fingerprint(HALF)
    assert expected == fingerprint(full) == fingerprint(dict(reversed(full.items())))
    assert expected == fingerprint({name: tensor.numpy() for name, tensor in full.items()})
    save_file(HALF, tmp_path / "half.safetensors")
    torch.save(full, tmp_path / "full.pt")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    for name, tensor in full.items():
        save_file({name: tensor}, sharded / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in full}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in ("half.safetensors", "full.pt", "sharded"):
        assert fingerprint(open_checkpoint(tmp_path / path)) == expected


def test_content_matters() -> None:
    array = np.arange(6, dtype=np.float32)
    others = [
        {"w": array.reshape(2, 3)},
        {"v": array},
        {"w": array + 1},
        {"w": array.astype(np.int64)},
        {"w": np.nextafter(array, np.float32(9))},
        {"w": array, "v": array},
    ]
    scalars = [{"w": np.float32(1).reshape(())}, {"w": np.ones(1, np.float32)}]
    prints = [fingerprint(tensors) for tensors in [{"w": array}, *others, *scalars]]
    assert len(set(prints)) == len(prints)


def test_the_definition_is_fixed() -> None:
    # Models on disk name their base and experts by it: a change here would orphan them.
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = hashlib.sha256(b'["w", [2, 3], "float32"]' + array.astype("<f4").tobytes()).hexdigest()
    assert fingerprint({"w": array}) == fingerprint({"backbone.w": array.T.copy().T}) == expected
