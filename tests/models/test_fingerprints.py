"""A fingerprint is computed once, and again after any change of a weight."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from simomerge.checkpoints import fingerprint
from simomerge.core.errors import InputError
from simomerge.models.encoders import CustomEncoder, load_encoder
from simomerge.models.fingerprints import encoder_identity, fingerprint_of
from simomerge.models.model import SimoModel
from simomerge.models.model import load as load_model


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one whenever weights are hashed."""
    calls: list[Any] = []

    def counted(weights: Any) -> str:
        calls.append(weights)
        return fingerprint(weights)

    monkeypatch.setattr("simomerge.models.fingerprints.fingerprint", counted)
    return calls


@pytest.fixture
def module() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, dtype=torch.float64).bfloat16().float())


def test_it_is_computed_once(module: nn.Module, hashed: list[Any]) -> None:
    assert fingerprint_of(module) == fingerprint_of(module) == fingerprint(module.state_dict())
    assert len(hashed) == 1
    twin = copy.deepcopy(module)
    assert fingerprint_of(twin) == fingerprint_of(module) and len(hashed) == 2
    module.eval()(torch.ones(2, 4)).sum().backward()  # reading the weights changes nothing
    fingerprint_of(module)
    assert len(hashed) == 2


def step(optimiser: Any, **settings: Any) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        module(torch.randn(8, 4)).square().sum().backward()
        optimiser(module.parameters(), lr=0.01, **settings).step()

    return change


def load(module: Any) -> None:
    module.load_state_dict({name: value + 1 for name, value in module.state_dict().items()})


def add_in_place(module: Any) -> None:
    with torch.no_grad():
        module[0].weight[1, 2] += 1e-6


def add_to_data(module: Any) -> None:
    module[0].bias.data[0] += 1e-6


def halve_data(module: Any) -> None:
    module[0].weight.data.mul_(0.5)


def negate_data(module: Any) -> None:
    module[0].weight.data.neg_()


def permute_data(module: Any) -> None:
    module[0].weight.data.copy_(module[0].weight.data.flip(0).clone())


def assign(module: Any) -> None:
    module[0].weight = nn.Parameter(torch.zeros(4, 4))


def swap(module: Any) -> None:
    """The same values in other places."""
    with torch.no_grad():
        module[0].weight.copy_(module[0].weight.flip(0))


def statistics(module: Any) -> None:
    module.train()(torch.randn(8, 4))


@pytest.mark.parametrize(
    "change",
    [
        step(torch.optim.SGD),
        step(torch.optim.AdamW, foreach=True),
        step(torch.optim.AdamW, fused=True),
        load,
        add_in_place,
        add_to_data,
        halve_data,
        negate_data,
        permute_data,
        assign,
        swap,
        statistics,
    ],
)
def test_a_changed_weight_changes_it(change: Callable[[nn.Module], None], module: nn.Module) -> None:
    before = fingerprint_of(module)
    change(module)
    assert fingerprint_of(module) == fingerprint(module.state_dict()) != before


def test_every_dtype_is_seen() -> None:
    holder = nn.Module()
    values = {
        "float16": torch.ones(3).half(),
        "flags": torch.ones(3) > 0,
        "count": torch.tensor(7),
        "none": torch.ones(0),
    }
    for name, value in values.items():
        holder.register_buffer(name, value)
    for name, value in values.items():
        before = fingerprint_of(holder)
        value.zero_()
        assert (fingerprint_of(holder) == before) == (name == "none")


def test_what_is_not_a_tensor_is_refused() -> None:
    class Odd(nn.Module):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

    with pytest.raises(InputError, match="'_extra_state' is a dict, not a tensor"):
        fingerprint_of(Odd())


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        module = nn.Linear(3, 3)
        before = fingerprint_of(module)
        module.weight.zero_()
        assert fingerprint_of(module) == fingerprint(module.state_dict()) != before


# All of an encoder --------------------------------------------------------------------------------------


def changed(base: Path, folder: Path, file: str = "config.json", **values: Any) -> Path:
    """A copy of a base with other values in a file."""
    copied = Path(shutil.copytree(base, folder))
    content = json.loads((copied / file).read_text())
    (copied / file).write_text(json.dumps({**content, **values}))
    return copied


def test_the_identity_of_an_encoder_covers_what_it_computes(tiny_base: Path, tmp_path: Path) -> None:
    mean, std = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
    others = [
        load_encoder(changed(tiny_base, tmp_path / "0", "preprocessor_config.json", image_mean=mean)),
        load_encoder(changed(tiny_base, tmp_path / "1", "preprocessor_config.json", image_std=std)),
        load_encoder(changed(tiny_base, tmp_path / "2", layer_norm_eps=1e-2)),
        load_encoder(changed(tiny_base, tmp_path / "3", hidden_act="relu")),
        load_encoder(changed(tiny_base, tmp_path / "4", drop_path_rate=0.2)),
        load_encoder(tiny_base, taps=[1, 2]),
        load_encoder(tiny_base, apply_layernorm=False),
    ]
    base = load_encoder(tiny_base)
    assert {fingerprint_of(each.backbone) for each in (base, *others)} == {fingerprint_of(base.backbone)}
    assert len({encoder_identity(each) for each in (base, *others)}) == 1 + len(others)


def test_the_identity_depends_on_no_place_version_or_storage(tiny_base: Path, tmp_path: Path) -> None:
    versions = {"transformers_version": "4.0.0", "_name_or_path": "/home/me/base", "torch_dtype": "bfloat16"}
    base = load_encoder(tiny_base)
    SimoModel(base, {}, {}).save_pretrained(tmp_path / "saved")
    same = [changed(tiny_base, tmp_path / "moved", **versions), tmp_path / "saved"]
    assert {encoder_identity(load_model(each).encoder) for each in same} == {encoder_identity(base)}


OWN = """
from torch import nn

class Mine(nn.Conv2d):
    channels, strides = (4,), (4,)

    def __init__(self, twice=False):
        super().__init__(3, 4, 4, 4)
        self.settings = {"twice": twice}

    def forward(self, images):
        return [1.0 * super().forward(images)]
"""


def test_the_identity_of_a_class_of_ones_own_covers_its_code_and_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def identity(folder: str, code: str, **settings: Any) -> str:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "encoder_of_mine.py").write_text(code)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(tmp_path / folder)
            patch.delitem(sys.modules, "encoder_of_mine", raising=False)
            kind = importlib.import_module("encoder_of_mine").Mine
            torch.manual_seed(0)
            return encoder_identity(CustomEncoder(kind(**settings)))

    first = identity("a", OWN)
    assert identity("b", OWN) == first  # in another place
    assert identity("c", OWN, twice=True) != first
    assert identity("d", OWN.replace("1.0", "2.0")) != first
    sys.modules.pop("encoder_of_mine")
