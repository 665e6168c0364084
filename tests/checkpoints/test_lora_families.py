"""LoRA adapters of many settings on an encoder of every family: the merged folder has the weights that peft merges."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from models.encoders.families import TINY, save_tiny
from simomerge.merging.disk.merge import merge_on_disk

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def variants(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings of peft that make sense for the layers of a model."""
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    maps = [name for name, module in modules.items() if isinstance(module, nn.Conv2d) and module.groups == 1]
    norm = next(name for name, module in modules.items() if "Norm" in type(module).__name__)
    some = linear or maps
    yield "rank-stabilised", {"target_modules": some, "use_rslora": True, "lora_alpha": 7}
    ranks, alphas = {some[0]: 2, some[-1]: 6}, {"^" + some[0]: 11, r".*\.1\..*": 5}
    yield "patterns", {"target_modules": some, "rank_pattern": ranks, "alpha_pattern": alphas}
    yield "all biases", {"target_modules": some[:2], "bias": "all"}
    yield "biases of LoRA", {"target_modules": some[:2], "bias": "lora_only"}
    yield "a norm in full", {"target_modules": some[:2], "modules_to_save": [norm]}
    if maps:
        yield "convolutions", {"target_modules": maps}
    if linear:
        with_bias = [name for name in linear if modules[name].bias is not None]
        yield "bias of B", {"target_modules": with_bias, "lora_bias": True}
        yield "orthogonal", {"target_modules": linear[:2], "init_lora_weights": "orthogonal"}


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


# A masked autoencoder is trained with its decoder, which is no part of the encoder; its encoder is that of "vit".
@pytest.mark.parametrize("model_type", [model_type for model_type in TINY if model_type != "vit_mae"])
def test_every_setting_on_every_family(tmp_path: Path, model_type: str) -> None:
    peft = pytest.importorskip("peft")
    base = save_tiny(model_type, tmp_path / "base")
    original = getattr(transformers, TINY[model_type][0]).from_pretrained(base).eval()
    before = original.state_dict()
    for number, (name, settings) in enumerate(variants(original)):
        torch.manual_seed(number)
        chosen = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **settings}
        adapted = peft.get_peft_model(copy.deepcopy(original), peft.LoraConfig(**chosen))
        randomise(adapted)
        adapted.save_pretrained(tmp_path / f"adapter-{number}")
        expected = adapted.eval().merge_and_unload().state_dict()
        output = tmp_path / f"merged-{number}"
        merge_on_disk(base, {"a": tmp_path / f"adapter-{number}"}, output, "average")
        merged = type(original).from_pretrained(output).state_dict()
        assert merged.keys() == expected.keys() and merged.keys() == before.keys()
        for key, wanted in expected.items():
            np.testing.assert_allclose(merged[key], wanted, rtol=0, atol=1e-5, err_msg=f"{name}: {key}")
        assert any(not torch.equal(before[key], wanted) for key, wanted in expected.items()), name
