"""Canonical names, against what transformers really does in memory and on disk."""

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import (
    Dinov2Backbone,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTConfig,
    ViTModel,
)

from simomerge.checkpoints import canonical_name, canonicalise, fingerprint, open_checkpoint
from simomerge.core.errors import InputError

TINY: dict[str, Any] = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
ENCODERS = [
    (Dinov2Model, Dinov2Config),
    (Dinov2Backbone, Dinov2Config),
    (Dinov2WithRegistersModel, Dinov2WithRegistersConfig),
    (ViTModel, ViTConfig),
    (DINOv3ViTModel, DINOv3ViTConfig),
]


@pytest.mark.parametrize(("model", "config"), ENCODERS)
def test_in_memory_and_on_disk_names_agree(tmp_path: Path, model: Any, config: Any) -> None:
    encoder = model(config(**TINY))
    encoder.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        on_disk = set(file.keys())
    in_memory = canonicalise(encoder.state_dict())
    assert set(in_memory) == on_disk
    assert all(canonical_name(name) == name for name in on_disk)
    # The names agree one by one, not only as sets: the values behind them are the same.
    assert fingerprint(encoder.state_dict()) == fingerprint(open_checkpoint(tmp_path))
    wrapped = {f"module.backbone.{name}": value for name, value in encoder.state_dict().items()}
    assert fingerprint(wrapped) == fingerprint(open_checkpoint(tmp_path))


def test_a_task_model_has_a_prefix() -> None:
    inner = set(canonicalise(Dinov2Model(Dinov2Config(**TINY)).state_dict()))
    outer = set(canonicalise(Dinov2ForImageClassification(Dinov2Config(**TINY)).state_dict()))
    assert outer == inner | {"classifier.weight", "classifier.bias"}


def test_unknown_names_stay() -> None:
    for name in (
        "layers.0.weight",
        "conv1.weight",
        "encoder.layers.0.self_attn.q_proj.weight",
        "model.head.0",
    ):
        assert canonical_name(name) == name


def test_two_names_of_one_tensor() -> None:
    names = [
        "encoder.layer.0.attention.q_proj.bias",
        "backbone.encoder.layer.0.attention.attention.query.bias",
    ]
    with pytest.raises(InputError, match="are the same tensor"):
        canonicalise(names)
