"""Depth Anything on a DINOv2 with registers, which transformers itself cannot run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from simomerge.models.importing import import_expert
from simomerge.models.importing.transformers import source_model


@pytest.mark.filterwarnings("ignore")
def test_the_registers_are_left_out(tmp_path: Path, float32: None) -> None:
    torch.manual_seed(0)
    backbone = transformers.Dinov2WithRegistersConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2,
        num_register_tokens=4,
        image_size=56,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=32, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8
    )
    model = transformers.DepthAnythingForDepthEstimation(config).eval()
    model.save_pretrained(tmp_path)
    assert source_model(str(tmp_path)) is None
    image = np.random.default_rng(0).integers(0, 256, (56, 70, 3), dtype=np.uint8)
    expert = import_expert(tmp_path, "depth")
    pixels = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255 - expert.encoder.mean) / expert.encoder.std
    with torch.no_grad():
        maps = model.backbone(pixels).feature_maps
        assert all(tokens.shape == (1, 1 + 4 + 4 * 5, 32) for tokens in maps)
        tokens = [torch.cat([each[:, :1], each[:, 5:]], 1) for each in maps]
        expected = model.head(model.neck(tokens, 4, 5), 4, 5)[0].numpy()
    found = expert.predict(image)["depth"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
