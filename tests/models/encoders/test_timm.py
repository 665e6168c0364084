"""timm's models as encoders, with a fake timm, and with the real one if it can be imported."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import simomerge as sm
from simomerge.core.errors import InputError
from simomerge.models.encoders.timm import TimmEncoder

from .contract import EncoderContract, Make

try:
    importlib.import_module("timm")
    REAL = ("resnet18",)
except ImportError:
    REAL = ()


class FeatureInfo:
    def __init__(self, channels: list[int], reduction: list[int]) -> None:
        self.channels, self.reduction = (lambda: channels), (lambda: reduction)


class Net(nn.Module):
    """Five maps at strides 2 to 32; with ``last``, channels lie last, as in timm's Swin."""

    pretrained_cfg: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}  # noqa: RUF012

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4 + i, 5 + i, 2, 2) for i in range(5))
        self.feature_info = FeatureInfo([5 + i for i in range(5)], [2 ** (i + 1) for i in range(5)])

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        for conv in self.convs:
            x = conv(x)
            maps.append(x.permute(0, 2, 3, 1) if self.last else x)
        return maps


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def create_model(name: str, pretrained: bool, features_only: bool, **more: Any) -> nn.Module:
        assert features_only
        if name == "unknown":
            raise RuntimeError("Unknown model (unknown)")
        if more and name == "conv":
            raise TypeError("unexpected keyword argument 'dynamic_img_size'")
        torch.manual_seed(1 if pretrained else 2)
        return Net(last=name == "swin")

    fake = types.ModuleType("timm")
    fake.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", fake)
    return create_model


class TestTimm(EncoderContract):
    cases = ("conv", "swin", *REAL)
    can_choose_taps = False

    @pytest.fixture
    def make(self, case: str, request: pytest.FixtureRequest) -> Make:
        if case not in REAL:
            request.getfixturevalue("timm")
        made = TimmEncoder(case)
        weights = made.state_dict()

        def again() -> sm.SimoModel:
            encoder = TimmEncoder(case)
            encoder.load_state_dict(weights)
            return sm.SimoModel(encoder, {}, {})

        return lambda: again().encoder


@pytest.mark.parametrize("name", ["conv", "swin"])
def test_the_last_four_maps_of_normalised_images(timm: Callable[..., Any], tmp_path: Path, name: str) -> None:
    model = sm.load(f"timm:{name}")
    assert (model.encoder.channels, model.encoder.strides) == ((6, 7, 8, 9), (4, 8, 16, 32))
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        features = model.encode(images)
        expected = timm(name, True, True)((images - 0.5) / 0.25)[-4:]
        for ours, theirs in zip(features.maps, expected, strict=True):
            torch.testing.assert_close(ours, theirs.permute(0, 3, 1, 2) if name == "swin" else theirs)
        model.save_pretrained(tmp_path / "base")
        again = sm.load(tmp_path / "base").encode(images)  # its weights are the folder's, not timm's
    assert all(torch.equal(a, b) for a, b in zip(features.maps, again.maps, strict=True))


def test_a_model_of_the_hub_is_stored_by_its_architecture(
    timm: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"architecture": "swin", "mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}
    with monkeypatch.context() as patched:
        patched.setattr(Net, "pretrained_cfg", own)  # as the hub describes this model
        model = sm.load("timm:hf-hub:owner/conv")
    model.save_pretrained(tmp_path / "base")
    again = sm.load(tmp_path / "base")
    assert again.encoder.describe()["settings"] == {"name": "swin", "mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}
    weights = {name: value for name, value in model.state_dict().items() if "convs" in name}
    assert weights and all(torch.equal(value, again.state_dict()[name]) for name, value in weights.items())
    torch.testing.assert_close(again.encoder.backbone.mean.flatten(), torch.tensor([0.4, 0.5, 0.6]))
    torch.testing.assert_close(again.encoder.backbone.std.flatten(), torch.tensor([0.1, 0.2, 0.3]))


def test_what_timm_does_not_have(timm: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"timm:unknown: timm gives no feature maps of this model \(Unknown model"):
        sm.load("timm:unknown")


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"timm:conv: timm cannot be imported .* pip install timm torchvision"):
        sm.load("timm:conv")
