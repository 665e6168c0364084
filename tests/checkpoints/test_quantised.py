"""Quantised weights, in the layouts of several libraries, are refused and not merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from simomerge.checkpoints import open_checkpoint, write_safetensors
from simomerge.checkpoints.quantised import check_not_quantised
from simomerge.core.errors import InputError
from simomerge.merging import merge_state_dicts
from simomerge.merging.disk.compress import compress
from simomerge.merging.disk.diff import diff_on_disk
from simomerge.merging.disk.merge import merge_on_disk

INT8 = torch.ones(4, 4, dtype=torch.int8)
CODES = torch.ones(8, 1, dtype=torch.uint8)
SCALE = torch.ones(4)
LAYOUTS: dict[str, dict[str, torch.Tensor]] = {
    "bitsandbytes, 8 bits": {"l.weight": INT8, "l.SCB": SCALE},
    "bitsandbytes, 4 bits": {"l.weight": CODES, "l.weight.absmax": SCALE},
    "bitsandbytes, 4 bits in bfloat16": {
        "l.weight": torch.ones(8, 1, dtype=torch.bfloat16),
        "l.weight.absmax": SCALE,
        "l.weight.quant_map": torch.linspace(-1, 1, 16),
        "l.weight.quant_state.bitsandbytes__nf4": CODES.reshape(-1),
    },
    "GPTQ and AWQ": {"l.qweight": INT8.int(), "l.qzeros": INT8.int(), "l.scales": SCALE},
    "FP8 as bytes": {"l.weight": CODES, "l.weight_scale_inv": SCALE},
    "compressed-tensors": {"l.weight_packed": INT8.int(), "l.weight_scale": SCALE},
    "quanto": {"l.weight._data": INT8, "l.weight._scale": SCALE},
    "integers alone": {"l.weight": INT8},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_command_refuses_them(tmp_path: Path, layout: str) -> None:
    tensors = LAYOUTS[layout]
    usual = {"l.weight": torch.ones(4, 4), "l.bias": torch.ones(4)}
    for name, content in (("plain", usual), ("quantised", {**tensors, "l.bias": torch.ones(4)})):
        save_file(content, tmp_path / f"{name}.safetensors")
        save_file({key: value + 0 for key, value in content.items()}, tmp_path / f"{name}-2.safetensors")
    plain, plain2, quantised, quantised2 = (
        tmp_path / f"{name}.safetensors" for name in ("plain", "plain-2", "quantised", "quantised-2")
    )
    out = tmp_path / "out.safetensors"
    for base, expert in ((quantised, quantised2), (plain, quantised), (quantised, plain)):
        which = "The base" if base == quantised else "The expert 'a'"
        with pytest.raises(
            InputError, match=rf"{which} \(.*quantised\.safetensors\) is quantised: .*'l\.\S+'.*dequant"
        ):
            merge_on_disk(base, {"a": expert}, out)
        with pytest.raises(InputError, match="is quantised"):
            compress(base, {"a": expert}, tmp_path / "compressed")
        with pytest.raises(InputError, match="is quantised"):
            diff_on_disk(base, expert)
    with pytest.raises(InputError, match="The expert 'a' is quantised"):
        merge_state_dicts(usual, {"a": {**usual, **tensors}}, "average")
    merge_on_disk(plain, {"a": plain2}, out, "average")
    assert not (tmp_path / "compressed").exists()


def test_fp8_is_named_where_it_is_read(tmp_path: Path) -> None:
    save_file({"l.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"'l\.weight' is stored as F8_E4M3: convert it to F32"):
        open_checkpoint(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": {"quant_method": "aqlm"}}, r"config\.json: the weights are quantised \(aqlm\)"),
        ({"quantization_config": {"bits": 2}}, "quantised"),
        ("{", r"config\.json: cannot be read"),
    ],
)
def test_the_configuration_says_so(tmp_path: Path, config: Any, message: str) -> None:
    for name in ("base", "a"):
        write_safetensors(tmp_path / name / "model.safetensors", {"w": np.full(2, len(name), np.float32)})
    merge_on_disk(tmp_path / "base", {"a": tmp_path / "a"}, tmp_path / "fine", "average")
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "a" / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        merge_on_disk(tmp_path / "base", {"a": tmp_path / "a"}, tmp_path / "out", "average")
    (tmp_path / "a" / "config.json").write_text('{"quantization_config": null}')
    merge_on_disk(tmp_path / "base", {"a": tmp_path / "a"}, tmp_path / "out", "average")


def test_integers_of_usual_encoders_are_fine() -> None:
    names = ("embeddings.position_ids", "attention.relative_position_index", "bn.num_batches_tracked", "steps")
    check_not_quantised({name: np.arange(3) for name in names} | {"l.weight": np.ones(2), "scale": np.ones(1)}, "it")
