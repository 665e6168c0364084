"""Custom encoders and heads: the contract, the example of the docs, and what is refused."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import simomerge as sm
from simomerge.core.errors import InputError
from simomerge.core.images import to_tensor
from simomerge.datasets import load_data
from simomerge.merging.disk.merge import merge_on_disk
from simomerge.models import storage
from simomerge.models.heads.surgery import SurgeryHead

from .encoders.contract import EncoderContract, Make

PAGE = Path(__file__).parents[2] / "docs" / "own-modules.md"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, float32: None) -> Any:
    """The example of docs/own-modules.md as a module that was run in a folder with photos."""
    (code,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
        if "class Head" in block
    ]
    (tmp_path / "photos").mkdir()
    random = np.random.default_rng(0)
    for index in range(8):
        Image.fromarray(random.integers(0, 255, (41, 53, 3), dtype=np.uint8)).save(tmp_path / f"photos/{index}.png")
    module = types.ModuleType("docs_example")
    monkeypatch.setitem(sys.modules, "docs_example", module)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    training = "# ... train each expert ..."
    assert training in code
    code = code.replace(training, "for expert in experts.values():\n    change(expert.encoder)")
    module.__dict__["change"] = _change
    exec(compile(code, PAGE.name, "exec"), module.__dict__)
    return module


def _change(encoder: nn.Module) -> None:
    """Add noise of a third of each tensor's size to it, in place of a training."""
    with torch.no_grad():
        for weight in encoder.parameters():
            weight += 0.3 * weight.square().mean().sqrt() * torch.randn_like(weight)


@pytest.mark.filterwarnings("ignore:expert .* does not record its base")
def test_the_docs_example_runs_and_its_model_loads(example: Any, tmp_path: Path) -> None:
    model, experts, image = example.model, example.experts, tmp_path / "photos/0.png"
    again = sm.load("my-scene")
    assert type(again.encoder.backbone) is example.Encoder and type(again.heads["depth"]) is example.Head
    for name, value in model.predict(image).items():
        np.testing.assert_allclose(again.predict(image)[name], value, atol=1e-6)
    # Folding brought it nearer to its experts than the merge was.
    merged = sm.merge(example.base, experts, scale=0.5)
    tensor = to_tensor(image)
    with torch.no_grad():
        for task, expert in experts.items():
            wanted = expert(tensor)[task]
            before, after = ((each(tensor)[task] - wanted).square().mean() for each in (merged, again))
            assert after < before
    rooms = load_data("rooms", split="val", count=4, size=(24, 32)).select(["depth", "normals"])
    assert set(sm.evaluate(again, rooms)) == {"depth", "normals"}
    crossed = sm.realign(merged, experts, images="photos", variant="cross-tap")
    assert crossed.predict(image)["depth"].shape == (41, 53)


@pytest.mark.filterwarnings("ignore:expert .* does not record its base")
def test_the_docs_encoder_merges_with_learned_coefficients(example: Any) -> None:
    assert example.base.encoder.layout.names == ["stem", "down"]
    for given in ({"scale": "learned"}, {"method": "auto"}):
        model = sm.merge(example.base, example.experts, images="photos", size=(24, 32), **given)
        assert model.predict("photos/0.png")["normals"].shape == (3, 41, 53)
    learned = sm.merge(example.base, example.experts, scale="learned", images="photos", size=(24, 32))
    assert {len(scale) for scale in learned.provenance["merge"]["scale"].values()} == {2}


@pytest.mark.filterwarnings("ignore:expert .* does not record its base")
def test_folders_of_custom_encoders_merge_on_disk(example: Any, tmp_path: Path) -> None:
    example.base.save_pretrained("base")
    folders = {task: expert.save_pretrained(task) for task, expert in example.experts.items()}
    merge_on_disk("base", folders, "merged", "average")
    ours, theirs = sm.merge(example.base, example.experts, "average"), sm.load("merged")
    for name, value in ours.encoder.backbone.state_dict().items():
        torch.testing.assert_close(theirs.encoder.backbone.state_dict()[name], value)


@sm.register_encoder
class Plain(nn.Module):
    channels, strides = (4,), (4,)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, 4)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [self.stem(images)]


@sm.register_encoder
class Pyramid(nn.Module):
    """Two maps, the coarse one first, and a batch norm."""

    channels, strides = (6, 4), (8, 4)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.down = nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 2, 2)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fine = self.norm(self.stem(images))
        return self.down(fine.relu()), fine


@sm.register_encoder
class WithCls(Plain):
    has_cls = True

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale, self.settings = scale, {"scale": scale}

    def forward(self, images: torch.Tensor) -> sm.Features:  # type: ignore[override]
        maps = self.scale * self.stem(images)
        return sm.Features((maps,), (maps.mean((2, 3)),), (8, 8), (8, 8))


MODULES = {"one map": Plain, "pyramid": Pyramid, "CLS tokens": lambda: WithCls(scale=2.0)}


class TestCustomEncoder(EncoderContract):
    cases = tuple(MODULES)
    can_choose_taps = False  # all maps are tapped

    @pytest.fixture
    def make(self, case: str) -> Make:
        def encoder() -> Any:
            torch.manual_seed(0)
            return sm.SimoModel(MODULES[case](), {}, {}).encoder

        return encoder


def test_an_encoder_without_channels_is_refused() -> None:
    with pytest.raises(InputError, match=r"Linear has channels \[\] and strides \[\]"):
        sm.SimoModel(nn.Linear(2, 2), {}, {})


def test_maps_of_other_channels_than_declared_are_refused() -> None:
    encoder = Plain()
    encoder.channels = (5,)  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"Plain gave maps of \(4,\) channels, but it declares \(5,\)"):
        sm.SimoModel(encoder, {}, {}).encode(torch.rand(1, 3, 8, 8))


def test_cls_tokens_are_declared() -> None:
    encoder = WithCls()
    encoder.has_cls = False
    with pytest.raises(InputError, match="WithCls gave CLS tokens, but it declares has_cls = False"):
        sm.SimoModel(encoder, {}, {}).encode(torch.rand(1, 3, 8, 8))
    encoder.has_cls = True
    model = sm.SimoModel(encoder, {}, {})
    assert model.encoder.has_cls and model.encode(torch.rand(1, 3, 8, 8)).cls[0].shape == (1, 4)


def test_images_are_padded_to_the_largest_stride() -> None:
    class Up(nn.Module):
        channels, strides = (3, 3), (8, 4)

        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            return [nn.functional.avg_pool2d(images, 8), nn.functional.avg_pool2d(images, 4)]

    features = sm.SimoModel(Up(), {}, {}).encode(torch.rand(1, 3, 12, 12))
    assert [tuple(m.shape[-2:]) for m in features.maps] == [(2, 2), (4, 4)]


def test_adapters_of_unknown_blocks_are_refused() -> None:
    with pytest.raises(InputError, match="Plain is a custom encoder"):
        sm.SimoModel(Plain(), {}, {}).encoder.add_adapters()


def test_a_class_inside_a_function_cannot_be_saved(tmp_path: Path) -> None:
    class Hidden(Plain):
        pass

    with pytest.raises(InputError, match="Hidden is defined inside a function"):
        sm.SimoModel(Hidden(), {}, {}).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_settings_that_are_no_plain_data_are_refused(tmp_path: Path) -> None:
    encoder = Plain()
    encoder.settings = {"norm": nn.ReLU}  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"Plain\.settings cannot be written"):
        sm.SimoModel(encoder, {}, {}).save_pretrained(tmp_path / "model")


# Settings that create a module again --------------------------------------------------------------------


@sm.register_encoder
class Wide(Plain):
    """It declares no settings, and needs them for any other width."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.channels, self.stem = (width,), nn.Conv2d(3, width, 4, 4)


@sm.register_head
class Output(nn.Module):
    """It needs a setting, and declares none."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out = nn.Conv2d(4, channels, 1)

    def forward(self, features: sm.Features) -> torch.Tensor:
        return nn.functional.interpolate(self.out(features.maps[0]), features.padded_size)


@sm.register_encoder
class NeedsValues(Plain):
    """It cannot be created without values."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.largest = self.stem.weight.max().item()


def with_output(head: nn.Module) -> sm.SimoModel:
    return sm.SimoModel(Plain(), {"depth": sm.Task("depth")}, {"depth": head})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: sm.SimoModel(Wide(7), {}, {}),
            r"Wide .* settings \{\}, .*'stem.weight' has shape \(7, 3, 4, 4\), not",
        ),
        (lambda: sm.SimoModel(NeedsValues(7), {}, {}), r"NeedsValues .*size mismatch for stem.weight"),
        (lambda: with_output(Output(1)), r"Output .*missing 1 required positional argument: 'channels'\)\. Set self"),
        (lambda: with_output(SurgeryHead([4], 1, Output(1), rank=1)), "Output .*missing 1 required positional"),
    ],
)
def test_saving_warns_of_a_model_that_cannot_be_loaded(
    make: Callable[[], sm.SimoModel], message: str, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=rf"test_custom_modules:{message}"):
        make().save_pretrained(tmp_path / "model")
    with pytest.raises(InputError):
        sm.load(tmp_path / "model")


def test_settings_are_compared_as_the_folder_holds_them(tmp_path: Path) -> None:
    head = Output(2)
    head.settings = {"channels": 1}  # type: ignore[assignment]
    with pytest.warns(UserWarning, match=r"settings \{'channels': 1\}, .*'out.weight' has shape \(2, 4, 1, 1\), not"):
        with_output(head).save_pretrained(tmp_path / "wrong")
    head.settings = {"channels": 2}  # type: ignore[assignment]
    again = sm.load(with_output(head).save_pretrained(tmp_path / "model"))
    assert torch.equal(again.heads["depth"].out.weight, head.out.weight)  # type: ignore[union-attr]


def test_a_class_that_needs_values_is_created_unless_it_is_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = NeedsValues()
    state = torch.get_rng_state()
    again = sm.load(sm.SimoModel(encoder, {}, {}).save_pretrained(tmp_path / "small"))
    assert torch.equal(again.encoder.backbone.stem.weight, encoder.stem.weight)
    torch.set_rng_state(state)
    sm.SimoModel(encoder, {}, {}).save_pretrained(tmp_path / "once more")
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(storage, "LARGE", 0)
    sm.SimoModel(NeedsValues(7), {}, {}).save_pretrained(tmp_path / "large")  # nothing is known about it
    encoder.settings = {"depth": 3}  # type: ignore[assignment]
    with pytest.warns(UserWarning, match=r"NeedsValues .* unexpected keyword argument 'depth'"):
        sm.SimoModel(encoder, {}, {}).save_pretrained(tmp_path / "wrong")


def test_modules_of_simomerge_are_not_created_again(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_not_created_again", lambda module: pytest.fail(type(module).__name__))
    make_model([sm.Task("depth")], head="dpt").save_pretrained(tmp_path / "model")
