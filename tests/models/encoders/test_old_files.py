"""Files of other versions of transformers and PyTorch, which save other buffers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import simomerge as sm
from simomerge.checkpoints import fingerprint, open_checkpoint, write_safetensors
from simomerge.cli import cli
from simomerge.core.errors import InputError
from simomerge.merging.disk.merge import merge_on_disk
from simomerge.models.encoders import load_encoder

STEM = "vision_model.embeddings"
WEIGHTS = {f"{STEM}.patch_embedding.weight": np.ones((4, 3), np.float32), "vision_model.norm.weight": np.ones(3)}
IDS = {f"{STEM}.position_ids": np.arange(5)[None]}


def moved(by: float) -> dict[str, Any]:
    return {name: np.asarray(value + by, np.float32) for name, value in WEIGHTS.items()}


@pytest.mark.parametrize("extra", ["nowhere", "in all", "in the base", "in one expert", "in the other expert"])
def test_integers_that_only_some_files_have(tmp_path: Path, extra: str) -> None:
    models = {"base": dict(WEIGHTS), "a": moved(1), "b": moved(3)}
    holders = {"nowhere": "", "in all": "base a b", "in the base": "base", "in one expert": "a"}.get(extra, "b")
    for name in holders.split():
        models[name] |= IDS
    paths = {name: write_safetensors(tmp_path / f"{name}.safetensors", tensors) for name, tensors in models.items()}
    base = paths.pop("base")
    merged = open_checkpoint(merge_on_disk(base, paths, tmp_path / "out.safetensors", "average").output)
    assert list(merged) == list(open_checkpoint(base))
    for name, value in WEIGHTS.items():
        np.testing.assert_array_equal(merged[name], value + 2)
    if "base" in holders:
        np.testing.assert_array_equal(merged[f"{STEM}.position_ids"], IDS[f"{STEM}.position_ids"])


def test_a_float_that_one_file_lacks_is_still_refused(tmp_path: Path) -> None:
    base = write_safetensors(tmp_path / "base.safetensors", {**WEIGHTS, "table": np.ones(2, np.float32)})
    expert = write_safetensors(tmp_path / "a.safetensors", moved(1))
    with pytest.raises(InputError, match="missing 1 tensor of the base: table"):
        merge_on_disk(base, {"a": expert}, tmp_path / "out.safetensors")


def test_the_fingerprint_leaves_such_buffers_out() -> None:
    assert fingerprint({**WEIGHTS, **IDS}) == fingerprint(WEIGHTS)
    counted = {**WEIGHTS, "bn.num_batches_tracked": np.array(3)}
    assert fingerprint(counted) == fingerprint(WEIGHTS) != fingerprint({**WEIGHTS, "steps": np.array(3)})


@pytest.mark.filterwarnings("ignore")
def test_a_resnet_without_counters(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1])
    ResNetModel(config).save_pretrained(tmp_path)
    complete = sm.load(str(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = sm.load(str(tmp_path))
    state = loaded.encoder.backbone.state_dict()
    assert all(int(value) == 0 for name, value in state.items() if name.endswith("num_batches_tracked"))
    assert loaded.encoder_fingerprint() == complete.encoder_fingerprint() == fingerprint(open_checkpoint(tmp_path))
    image = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(loaded.encode(image).maps, complete.encode(image).maps)
    del kept[next(name for name in kept if name.endswith("running_var"))]
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 tensor is missing.*running_var"):
        sm.load(str(tmp_path))


@torch.no_grad()
def test_beit_with_a_recorded_norm_that_is_an_identity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import BeitConfig, BeitModel

    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    for pooling in (True, False):
        folder = tmp_path / f"base-{pooling}"
        BeitModel(BeitConfig(**size, image_size=32, patch_size=8, use_mean_pooling=pooling)).save_pretrained(folder)
        assert sm.load(folder).encoder.apply_layernorm == (not pooling)
    with pytest.raises(InputError, match=r"BeitModel has no final layer norm .* use apply_layernorm=False"):
        load_encoder(tmp_path / "base-True", apply_layernorm=True)
    images = torch.rand(1, 3, 32, 32)
    for pooling, norm in ((True, "off"), (False, "on")):
        model = sm.load(tmp_path / f"base-{pooling}")
        file = model.save_pretrained(tmp_path / f"model-{pooling}") / "simo.json"
        content = json.loads(file.read_text())
        content["encoder"]["apply_layernorm"] = True  # as earlier versions wrote it
        file.write_text(json.dumps(content))
        old = sm.load(file.parent)
        assert old.encoder.apply_layernorm == (not pooling)
        for before, after in zip(model.encode(images).maps, old.encode(images).maps, strict=True):
            assert torch.equal(before, after)
        cli(["inspect", str(file.parent)], standalone_mode=False)
        assert f"final layer norm {norm}" in capsys.readouterr().out
